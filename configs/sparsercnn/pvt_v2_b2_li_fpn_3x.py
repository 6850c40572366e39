"""Sparse R-CNN with PVTv2-B2-Li, 36 epochs of COCO, 8 GPUs x 2 images: the authors' recipe.

Optimizer, schedule and pipeline are MMDetection's for ResNet-50.
"""

_base_ = 'mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_300-proposals_crop-ms-480-800-3x_coco.py'
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
        arch='b2_li',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='pvt_v2_b2_li'),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)

data_root = '{{$COCO_ROOT:data/coco/}}'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='FastCocoMetric', ann_file=f'{data_root}/annotations/instances_val2017.json'
)
test_evaluator = dict(val_evaluator, classwise=True)
