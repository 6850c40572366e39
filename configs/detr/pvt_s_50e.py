"""DETR with PVT-Small, 50 epochs of COCO, 8 GPUs x 2 images: the authors' recipe."""

_base_ = './r50_50e.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='PVT',
        arch='small',
        out_indices=3,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='pvt_small'),
    ),
    neck=dict(in_channels=[512]),
)
