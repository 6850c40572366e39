_base_ = './maskrcnn_r18.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/compare/camvid/semfpn_r18/seed_0/iter_6000.pth',
            prefix='backbone.',
        )
    )
)
