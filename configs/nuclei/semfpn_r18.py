_base_ = './semfpn_pvt_t.py'
model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=18),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
