_base_ = './semfpn_r18.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/compare/nuclei/maskrcnn_r18/seed_0/iter_1500.pth',
            prefix='backbone.',
        )
    )
)
