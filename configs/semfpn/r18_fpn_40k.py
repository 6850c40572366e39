_base_ = './r50_fpn_40k.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='open-mmlab://resnet18_v1c')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
