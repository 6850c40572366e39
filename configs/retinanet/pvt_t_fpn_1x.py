_base_ = './pvt_s_fpn_1x.py'
model = dict(backbone=dict(arch='tiny', init_cfg=dict(checkpoint='pvt_tiny')))
