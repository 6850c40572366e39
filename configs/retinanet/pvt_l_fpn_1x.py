_base_ = './pvt_s_fpn_1x.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.0,
        init_cfg=dict(
            checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_large.pth',
        ),
    ),
)

# The authors train this one with apex O1.
optim_wrapper = dict(type='AmpOptimWrapper')
