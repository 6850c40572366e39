custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
model = dict(type='PVTv2', arch='b0', init_cfg=dict(type='Pretrained', checkpoint='pvt_v2_b0'))
