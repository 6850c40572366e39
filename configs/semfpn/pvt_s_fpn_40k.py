"""Semantic FPN with PVT-Small, 40k iterations of ADE20K, 8 GPUs x 4 crops: the authors' recipe."""

_base_ = [
    '../_base_/semfpn.py',
    '../_base_/ade20k.py',
    '../_base_/adamw_40k.py',
    '../_base_/mmseg_runtime.py',
]

model = dict(
    backbone=dict(
        type='PVT',
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='pvt_small'),
    ),
)
