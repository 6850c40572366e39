"""A PVT fine-tuned on a folder of your own: DATA_ROOT/train/CLASS/*.jpg, DATA_ROOT/val/CLASS/*.jpg.

    DATA_ROOT=photos python tools/train.py configs/imagenet/finetune.py
    DATA_ROOT=photos python tools/test.py configs/imagenet/finetune.py \
        work_dirs/imagenet/finetune/epoch_30.pth

The classes are the folders of train, and their number is set everywhere. IMAGE_SIZE=384 trains and
tests with other sizes, EPOCHS=100 trains longer, and BATCH_SIZE=64 also sets the learning rate.
Linear probing, which trains the head alone, takes --cfg-options model.backbone.frozen_stages=4.
docs/imagenet.md has more.
"""

_base_ = '../_base_/finetune.py'

from pvt_mm.data.folders import class_names  # noqa: E402 (mmengine reads _base_ first)

data_root = '{{$DATA_ROOT:data/}}'
image_size = int('{{$IMAGE_SIZE:224}}')
batch_size = int('{{$BATCH_SIZE:32}}')
epochs = int('{{$EPOCHS:30}}')
classes = class_names(data_root)

model = dict(head=dict(num_classes=len(classes)))
data_preprocessor = dict(num_classes=len(classes))
optim_wrapper = dict(optimizer=dict(lr=1e-3 * batch_size / 1024))
auto_scale_lr = dict(base_batch_size=batch_size)
train_cfg = dict(max_epochs=epochs)
param_scheduler = _base_.param_scheduler
param_scheduler[1].T_max = epochs

train_pipeline = _base_.train_dataloader.dataset.pipeline
train_pipeline[1].scale = image_size
test_pipeline = _base_.val_dataloader.dataset.pipeline
test_pipeline[1].scale = round(image_size * 256 / 224)
test_pipeline[2].crop_size = image_size

images = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(batch_size=batch_size, dataset=dict(pipeline=train_pipeline, **images))
val_dataloader = dict(batch_size=batch_size, dataset=dict(pipeline=test_pipeline, **images))
test_dataloader = val_dataloader
accuracy = dict(type='Accuracy', topk=(1, 5) if len(classes) >= 5 else (1,))
val_evaluator = dict(_delete_=True, **accuracy)
test_evaluator = [accuracy, dict(type='ClassAccuracy')]
