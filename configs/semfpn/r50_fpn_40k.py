"""Semantic FPN with ResNet-50, 40k iterations of ADE20K, 8 GPUs x 4: the authors' baseline."""

_base_ = [
    '../_base_/semfpn.py',
    '../_base_/ade20k.py',
    '../_base_/adamw_40k.py',
    '../_base_/mmseg_runtime.py',
]

model = dict(
    backbone=dict(
        type='ResNetV1c',
        depth=50,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://resnet50_v1c'),
    ),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9, weight_decay=5e-4),
)
train_cfg = dict(val_interval=8000)
