_base_ = './maskrcnn_pvt_t.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='work_dirs/compare/camvid/semfpn_pvt_t/seed_0/iter_6000.pth',
            prefix='backbone.',
        )
    )
)
