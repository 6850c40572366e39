custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)

model = dict(
    type='PVT',
    arch='small',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth',
    ),
)
