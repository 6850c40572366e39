"""A PVT fine-tuned on a folder of your own: DATA_ROOT/train/CLASS/*.jpg, DATA_ROOT/val/CLASS/*.jpg.

    DATA_ROOT=photos python tools/train.py configs/imagenet/finetune.py
    DATA_ROOT=photos python tools/test.py configs/imagenet/finetune.py \
        work_dirs/imagenet/finetune/epoch_30.pth

The classes are the folders of train, and their number is set everywhere. IMAGE_SIZE=384 trains and
tests with other sizes, EPOCHS=100 trains longer, and BATCH_SIZE=64 also sets the learning rate.
Linear probing, which trains the head alone, takes --cfg-options model.backbone.frozen_stages=4.
docs/imagenet.md has more.
"""

_base_ = './pvt_v2_b0_300e.py'

from pvt_mm.data.folders import class_names  # noqa: E402 (mmengine reads _base_ first)

data_root = '{{$DATA_ROOT:data/}}'
image_size = int('{{$IMAGE_SIZE:224}}')
classes = class_names(data_root)

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='pvt_v2_b0')),
    head=dict(num_classes=len(classes)),
)
data_preprocessor = dict(num_classes=len(classes))

# The recipe's rate is for 1024 images.
batch_size = int('{{$BATCH_SIZE:32}}')
epochs = int('{{$EPOCHS:30}}')
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

train_pipeline = _base_.train_dataloader.dataset.pipeline
train_pipeline[1].scale = image_size
test_pipeline = _base_.val_dataloader.dataset.pipeline
test_pipeline[1].scale = round(image_size * 256 / 224)
test_pipeline[2].crop_size = image_size

images = dict(type='CustomDataset', data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=batch_size,
    drop_last=False,
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
    dataset=dict(_delete_=True, data_prefix='train', pipeline=train_pipeline, **images),
)
val_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(_delete_=True, data_prefix='val', pipeline=test_pipeline, **images),
)
test_dataloader = val_dataloader
accuracy = dict(type='Accuracy', topk=(1, 5) if len(classes) >= 5 else (1,))
val_evaluator = dict(_delete_=True, **accuracy)
test_evaluator = [accuracy, dict(type='ClassAccuracy')]
