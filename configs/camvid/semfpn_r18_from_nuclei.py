_base_ = './semfpn_r18.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/compare/nuclei/semfpn_r18/seed_0/iter_1000.pth',
            prefix='backbone.',
        )
    )
)
