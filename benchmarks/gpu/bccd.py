"""RetinaNet with PVT-Tiny from scratch on the blood cells of BCCD, 512 pixels, for some minutes."""

_base_ = '../../configs/bccd/retinanet_pvt_t.py'

model = dict(
    neck=dict(out_channels=256),
    bbox_head=dict(in_channels=256, feat_channels=256, anchor_generator=dict(octave_base_scale=4)),
)
scale = (683, 512)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = scale
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale
train_dataloader = dict(batch_size=16, num_workers=12, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=8, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
