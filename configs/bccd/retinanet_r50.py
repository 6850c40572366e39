_base_ = './retinanet_pvt_t.py'
model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=50, norm_eval=False),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
