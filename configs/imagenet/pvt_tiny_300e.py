_base_ = './pvt_small_300e.py'
model = dict(backbone=dict(arch='tiny'))
