"""RetinaNet with PVT-Tiny, overfitted to the photographs of benchmarks/pick_images.py."""

_base_ = '../retinanet/pvt_t_fpn_1x.py'

model = dict(
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128),
)

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (320, 224)
train_pipeline[3].prob = 0.0
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (320, 224)
train_dataloader = dict(
    batch_size=4,
    sampler=dict(type='InfiniteSampler'),
    batch_sampler=None,
    dataset=dict(pipeline=train_pipeline),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

auto_scale_lr = dict(base_batch_size=4)  # of this rate
optim_wrapper = dict(optimizer=dict(lr=3e-4), clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=100, end=500, by_epoch=False),
]
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=500, val_interval=100)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
