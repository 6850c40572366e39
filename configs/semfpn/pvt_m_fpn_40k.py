_base_ = './pvt_s_fpn_40k.py'
model = dict(backbone=dict(arch='medium', init_cfg=dict(checkpoint='pvt_medium')))
