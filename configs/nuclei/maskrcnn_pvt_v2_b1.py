_base_ = './maskrcnn_pvt_t.py'
model = dict(backbone=dict(_delete_=True, type='PVTv2', arch='b1', drop_path_rate=0.0))
