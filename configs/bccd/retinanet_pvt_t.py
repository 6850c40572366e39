"""RetinaNet with PVT-Tiny from random weights on the blood cells of BCCD, at 320 x 240."""

_base_ = '../retinanet/pvt_t_fpn_1x.py'

data_root = '{{$BCCD_ROOT:data/bccd}}'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))
scale = (320, 240)
model = dict(
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(out_channels=128),
    bbox_head=dict(
        num_classes=3,
        in_channels=128,
        feat_channels=128,
        # Sides of 16 pixels and more: a platelet has 17, a red cell 51.
        anchor_generator=dict(octave_base_scale=2),
    ),
)

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = scale
train_pipeline[3].direction = ['horizontal', 'vertical']
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = scale
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    sampler=dict(type='InfiniteSampler'),
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=1, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_val2017.json')
test_evaluator = val_evaluator

auto_scale_lr = dict(base_batch_size=4)  # of this rate
optim_wrapper = dict(optimizer=dict(lr=4e-4), clip_grad=dict(max_norm=5.0))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2000, val_interval=250)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=2000, end=2000),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=250, max_keep_ckpts=1),
    visualization=dict(score_thr=0.4),
)
log_processor = dict(by_epoch=False)
visualizer = dict(line_width=2)
