_base_ = './semfpn_pvt_t.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='work_dirs/compare/nuclei/semfpn_pvt_t/seed_0/iter_1000.pth',
            prefix='backbone.',
        )
    )
)
