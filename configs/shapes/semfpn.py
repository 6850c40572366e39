"""Semantic FPN with PVT-Tiny from scratch on the shapes of tools/make_shapes.py."""

_base_ = '../semfpn/pvt_t_fpn_40k.py'

classes = ('background', 'disk', 'square', 'triangle', 'star', 'ring', 'cross')
palette = [
    [60, 60, 60], [230, 60, 60], [60, 180, 75], [255, 225, 25],
    [0, 130, 200], [245, 130, 48], [145, 30, 180],
]  # fmt: skip
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(out_channels=128),
    decode_head=dict(in_channels=[128, 128, 128, 128], num_classes=7),
)

dataset = dict(
    type='BaseSegDataset',  # ADE20KDataset accepts only its own classes
    metainfo=dict(classes=classes, palette=palette),
    reduce_zero_label=True,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackSegInputs'),
]
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (128, 128)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(side, side), keep_ratio=True) for side in (96, 128, 160)
]
train_dataloader = dict(
    batch_size=4, num_workers=2, dataset=dict(**dataset, pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=2, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

auto_scale_lr = dict(base_batch_size=4)  # of this rate
optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=400, begin=100, end=500, by_epoch=False),
]
train_cfg = dict(max_iters=500, val_interval=100)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100, max_keep_ckpts=1))
