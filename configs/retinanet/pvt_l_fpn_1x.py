_base_ = './pvt_s_fpn_1x.py'
model = dict(backbone=dict(arch='large', drop_path_rate=0.0, init_cfg=dict(checkpoint='pvt_large')))

# The authors train this one with apex O1.
optim_wrapper = dict(type='AmpOptimWrapper')
