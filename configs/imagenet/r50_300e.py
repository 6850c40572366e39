"""ResNet-50 with the recipe of PVT: a baseline of the first paper, which has no config of it."""

_base_ = './pvt_small_300e.py'
model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=50, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(in_channels=2048),
)
