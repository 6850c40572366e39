"""The recipe of configs/imagenet/finetune.py without its data: PVTv2-B0, the authors' weights."""

_base_ = '../imagenet/pvt_v2_b0_300e.py'

model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='pvt_v2_b0')))

# The recipe's rate is for 1024 images.
batch_size = 32
epochs = 30
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3 * batch_size / 1024, weight_decay=0.05),
    paramwise_cfg=_base_.optim_wrapper.paramwise_cfg,
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=20),
    dict(type='CosineAnnealingLR', T_max=epochs, eta_min=1e-7),
]
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(base_batch_size=batch_size)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=1, max_keep_ckpts=1, save_best='accuracy/top1', rule='greater'),
)

images = dict(type='CustomDataset', data_root='data/')
train_dataloader = dict(
    batch_size=batch_size,
    drop_last=False,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(
        _delete_=True,
        data_prefix='train',
        pipeline=_base_.train_dataloader.dataset.pipeline,
        **images,
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        _delete_=True,
        data_prefix='val',
        pipeline=_base_.val_dataloader.dataset.pipeline,
        **images,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='Accuracy', topk=(1, 5))
test_evaluator = [val_evaluator, dict(type='ClassAccuracy')]
