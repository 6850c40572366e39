"""Semantic FPN with PVT-Tiny from scratch on the street scenes of CamVid, for some minutes."""

_base_ = '../../configs/semfpn/pvt_t_fpn_40k.py'

data_root = '{{$CAMVID_ROOT:data/camvid}}'
classes = (
    *('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian'),
    'bicyclist',
)
crop = (352, 352)
model = dict(
    data_preprocessor=dict(size=crop),
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    decode_head=dict(num_classes=11, norm_cfg=dict(type='BN')),
)

train_pipeline = _base_.train_pipeline
train_pipeline[2] = dict(
    type='RandomResize', scale=(480, 360), ratio_range=(0.75, 2.0), keep_ratio=True
)
train_pipeline[3].crop_size = crop
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (480, 360)
dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=dict(classes=classes),
    img_suffix='.jpg',
    seg_map_suffix='.png',
    reduce_zero_label=True,
)
train_dataloader = dict(
    batch_size=16, num_workers=12, dataset=dict(dataset, pipeline=train_pipeline)
)
val_dataloader = dict(batch_size=8, num_workers=8, dataset=dict(dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=4e-4), clip_grad=dict(max_norm=5.0))
train_cfg = dict(max_iters=2000, val_interval=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=2000, end=2000),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=400, max_keep_ckpts=1))
