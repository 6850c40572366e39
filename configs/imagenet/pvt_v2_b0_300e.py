_base_ = './pvt_v2_b2_300e.py'
model = dict(backbone=dict(arch='b0'), head=dict(in_channels=256))
