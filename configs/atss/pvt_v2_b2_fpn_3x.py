"""ATSS with PVTv2-B2, 36 epochs of COCO, 8 GPUs x 2 images: the authors' recipe."""

_base_ = ['mmdet::atss/atss_r50_fpn_1x_coco.py', '../_base_/coco_3x_ms.py']
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
default_hooks = dict(
    checkpoint=dict(type='DurableCheckpointHook'),
    nan_guard=dict(type='NaNGuardHook'),
    classes=dict(type='ClassesByNameHook'),
)

model = dict(
    backbone=dict(
        _delete_=True,
        type='PVTv2',
        arch='b2',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='pvt_v2_b2'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

optim_wrapper = dict(
    type='AmpOptimWrapper',  # the authors use apex O1
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=_base_.norms_undecayed,
)
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=36, milestones=[27, 33])

data_root = '{{$COCO_ROOT:data/coco/}}'
train_pipeline = [*_base_.train_pipeline[:2], *_base_.ms_crop, _base_.train_pipeline[-1]]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='FastCocoMetric', ann_file=f'{data_root}/annotations/instances_val2017.json'
)
test_evaluator = dict(val_evaluator, classwise=True)
