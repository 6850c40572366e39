_base_ = './semfpn_pvt_t.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='work_dirs/compare/nuclei/maskrcnn_pvt_t/seed_0/iter_1500.pth',
            prefix='backbone.',
        )
    )
)
