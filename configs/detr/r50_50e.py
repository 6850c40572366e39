"""DETR with ResNet-50, 50 epochs of COCO, 8 GPUs x 2 images: the authors' baseline."""

_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
default_hooks = dict(
    checkpoint=dict(type='DurableCheckpointHook'),
    nan_guard=dict(type='NaNGuardHook'),
    classes=dict(type='ClassesByNameHook'),
)

# The authors train with 32. They test the baseline, but not PVT, with 1; a data preprocessor has
# one divisor for both.
model = dict(data_preprocessor=dict(pad_size_divisor=32))

max_epochs = 50
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[0].update(end=max_epochs, milestones=[33])

data_root = '{{$COCO_ROOT:data/coco/}}'
train_pipeline = [
    *_base_.train_pipeline[:2],
    dict(
        type='RandomChoiceResize',
        scales=[(1333, side) for side in range(640, 801, 32)],
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='FastCocoMetric', ann_file=f'{data_root}/annotations/instances_val2017.json'
)
test_evaluator = dict(val_evaluator, classwise=True)
