"""Semantic FPN with PVT-Tiny, overfitted to the photographs of benchmarks/pick_images.py."""

_base_ = '../semfpn/pvt_t_fpn_40k.py'

model = dict(
    data_preprocessor=dict(size=(192, 192)),
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(out_channels=128),
    decode_head=dict(
        in_channels=[128, 128, 128, 128],
        dropout_ratio=0.0,
        # mIoU counts every class alike, and some have only a few hundred pixels in all.
        sampler=dict(type='OHEMPixelSampler', thresh=0.9, min_kept=1000),
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(192, 192), keep_ratio=False),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(192, 192), keep_ratio=False),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [test_pipeline[1]]
train_dataloader = dict(num_workers=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=2, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

auto_scale_lr = dict(base_batch_size=4)  # of this rate
optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=10.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', power=0.9, eta_min=0.0, begin=100, end=500, by_epoch=False),
]
train_cfg = dict(max_iters=500, val_interval=100)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100, max_keep_ckpts=1))
