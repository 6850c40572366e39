"""RetinaNet with PVT-Tiny from scratch on the shapes of tools/make_shapes.py."""

_base_ = '../retinanet/pvt_t_fpn_1x.py'

metainfo = dict(
    classes=('disk', 'square', 'triangle', 'star', 'ring', 'cross'),
    palette=[
        (230, 60, 60),
        (60, 180, 75),
        (255, 225, 25),
        (0, 130, 200),
        (245, 130, 48),
        (145, 30, 180),
    ],
)
model = dict(
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(out_channels=128),
    bbox_head=dict(num_classes=6, in_channels=128, feat_channels=128),
)

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (128, 128)
train_pipeline[3].direction = ['horizontal', 'vertical']
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (128, 128)
train_dataloader = dict(batch_size=4, dataset=dict(metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader

auto_scale_lr = dict(base_batch_size=4)  # of this rate
optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True, T_max=6, end=6),
]
train_cfg = dict(max_epochs=6, val_interval=1)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(max_keep_ckpts=1),
    visualization=dict(score_thr=0.4),
)
visualizer = dict(line_width=2)
