_base_ = './pvt_v2_b2_fpn_3x.py'

model = dict(
    backbone=dict(
        arch='b2_li',
        init_cfg=dict(
            checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b2_li.pth',
        ),
    ),
)
