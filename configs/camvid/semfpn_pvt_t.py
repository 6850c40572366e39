"""Semantic FPN with PVT-Tiny from random weights on the street scenes of CamVid, 480 x 360."""

_base_ = '../semfpn/pvt_t_fpn_40k.py'

data_root = '{{$CAMVID_ROOT:data/camvid}}'
metainfo = dict(
    classes=(
        *('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car'),
        *('pedestrian', 'bicyclist'),
    ),
    palette=[
        *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222]),
        *([128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0]),
        [0, 128, 192],
    ],
)
crop = (256, 256)
model = dict(
    data_preprocessor=dict(size=crop),
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(out_channels=128),
    decode_head=dict(
        in_channels=[128, 128, 128, 128],
        num_classes=11,
        # Else the rare classes are never predicted: square roots of the median frequency balance
        # of the training maps (arXiv 1411.4734, as SegNet has it), in the order of the classes.
        loss_decode=dict(
            class_weight=[0.53, 0.45, 2.19, 0.39, 1.0, 0.65, 1.96, 1.41, 0.89, 2.52, 2.98]
        ),
    ),
)

train_pipeline = _base_.train_pipeline
train_pipeline[2].update(scale=(480, 360), ratio_range=(0.75, 1.5))
train_pipeline[3].crop_size = crop
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (480, 360)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type='Resize', scale=(int(480 * r), int(360 * r)), keep_ratio=True)
    for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
]
dataset = dict(
    type='BaseSegDataset',  # ADE20KDataset accepts only its own classes
    data_root=data_root,
    metainfo=metainfo,
    reduce_zero_label=True,
)
train_dataloader = dict(num_workers=1, dataset=dict(dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

auto_scale_lr = dict(base_batch_size=4)  # of this rate
optim_wrapper = dict(optimizer=dict(lr=4e-4), clip_grad=dict(max_norm=5.0))
train_cfg = dict(max_iters=6000, val_interval=1000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=6000, end=6000),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=250, max_keep_ckpts=1))
