_base_ = './maskrcnn_pvt_t.py'
model = dict(
    backbone=dict(_delete_=True, type='PVTv2', arch='b0', drop_path_rate=0.0),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
