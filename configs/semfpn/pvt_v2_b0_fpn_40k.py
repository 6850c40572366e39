_base_ = './pvt_v2_b2_fpn_40k.py'

model = dict(
    backbone=dict(
        arch='b0',
        init_cfg=dict(
            checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b0.pth',
        ),
    ),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
