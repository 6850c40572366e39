"""Mask R-CNN with PVT-Small, 12 epochs of COCO, 8 GPUs x 2 images: the authors' recipe."""

_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
default_hooks = dict(
    checkpoint=dict(type='DurableCheckpointHook'),
    nan_guard=dict(type='NaNGuardHook'),
    classes=dict(type='ClassesByNameHook'),
)

model = dict(
    backbone=dict(
        _delete_=True,
        type='PVT',
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='pvt_small'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4),
)

data_root = '{{$COCO_ROOT:data/coco/}}'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='FastCocoMetric', ann_file=f'{data_root}/annotations/instances_val2017.json'
)
test_evaluator = dict(val_evaluator, classwise=True)
