"""PVT-Small, 300 epochs of ImageNet-1k, 8 GPUs x 128 images: the authors' recipe.

docs/imagenet.md lists where MMPretrain cannot say the same.
"""

_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)
default_hooks = dict(
    checkpoint=dict(type='DurableCheckpointHook'), nan_guard=dict(type='NaNGuardHook')
)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='PVT', arch='small', out_type='cls_token', drop_path_rate=0.1),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=512,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

optim_wrapper = dict(
    type='AmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={'.cls_token': dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type='LaggingCosineLR', epochs=300, eta_min=1e-5, warmup_epochs=5, warmup_lr=1e-6),
]
auto_scale_lr = dict(enable=False, base_batch_size=1024)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

data_root = '{{$IMAGENET_ROOT:data/imagenet/}}'
# As the authors' loader: by Pillow, which converts CMYK, and without the rotation of EXIF.
load = dict(
    type='LoadImageFromFile', color_type='color_ignore_orientation', imdecode_backend='pillow'
)
train_dataloader = dict(
    batch_size=128,
    drop_last=True,
    sampler=dict(_delete_=True, type='RepeatAugSampler', num_repeats=3),
    dataset=dict(
        data_root=data_root, data_prefix='train', pipeline=[load, *_base_.train_pipeline[1:]]
    ),
)
val_dataloader = dict(
    batch_size=192,
    dataset=dict(
        data_root=data_root, data_prefix='val', pipeline=[load, *_base_.test_pipeline[1:]]
    ),
)
test_dataloader = val_dataloader
test_evaluator = [dict(type='Accuracy', topk=(1, 5)), dict(type='ClassAccuracy')]
