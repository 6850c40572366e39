custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
model = dict(type='PVT', arch='tiny', init_cfg=dict(type='Pretrained', checkpoint='pvt_tiny'))
