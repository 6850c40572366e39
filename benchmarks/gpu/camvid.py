"""Semantic FPN with PVT-Tiny from scratch on the street scenes of CamVid, for some minutes."""

_base_ = '../../configs/camvid/semfpn_pvt_t.py'

crop = (352, 352)
model = dict(
    data_preprocessor=dict(size=crop),
    neck=dict(out_channels=256),
    decode_head=dict(in_channels=[256, 256, 256, 256], norm_cfg=dict(type='BN')),
)
train_pipeline = _base_.train_pipeline
train_pipeline[2].ratio_range = (0.75, 2.0)
train_pipeline[3].crop_size = crop
train_dataloader = dict(batch_size=16, num_workers=12, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=8)
test_dataloader = val_dataloader
