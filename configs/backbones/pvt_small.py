custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
model = dict(type='PVT', arch='small', init_cfg=dict(type='Pretrained', checkpoint='pvt_small'))
