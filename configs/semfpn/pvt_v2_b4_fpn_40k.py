_base_ = './pvt_v2_b2_fpn_40k.py'
model = dict(backbone=dict(arch='b4', init_cfg=dict(checkpoint='pvt_v2_b4')))
