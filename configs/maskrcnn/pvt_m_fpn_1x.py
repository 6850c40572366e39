_base_ = './pvt_s_fpn_1x.py'
model = dict(
    backbone=dict(arch='medium', drop_path_rate=0.0, init_cfg=dict(checkpoint='pvt_medium')),
)
