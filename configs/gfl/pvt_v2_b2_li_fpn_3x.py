_base_ = './pvt_v2_b2_fpn_3x.py'
model = dict(backbone=dict(arch='b2_li', init_cfg=dict(checkpoint='pvt_v2_b2_li')))
