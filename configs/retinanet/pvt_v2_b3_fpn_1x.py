_base_ = './pvt_v2_b2_fpn_1x.py'
model = dict(backbone=dict(arch='b3', init_cfg=dict(checkpoint='pvt_v2_b3')))
