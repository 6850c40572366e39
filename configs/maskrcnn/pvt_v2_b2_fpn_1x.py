_base_ = './pvt_s_fpn_1x.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='PVTv2',
        arch='b2',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='pvt_v2_b2'),
    ),
)
