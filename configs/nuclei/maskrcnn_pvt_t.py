"""Mask R-CNN with PVT-Tiny from random weights on cell nuclei, enlarged 1.5 times."""

_base_ = '../maskrcnn/pvt_t_fpn_1x.py'

data_root = '{{$NUCLEI_ROOT:data/dsb2018}}'
metainfo = dict(classes=('nucleus',), palette=[(255, 200, 0)])
model = dict(
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(out_channels=128),
    rpn_head=dict(in_channels=128, feat_channels=128, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=128),
        bbox_head=dict(in_channels=128, fc_out_channels=512, num_classes=1),
        mask_roi_extractor=dict(out_channels=128),
        mask_head=dict(in_channels=128, conv_out_channels=128, num_classes=1),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=500), rcnn=dict(sampler=dict(num=64))
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=500)),
)

enlarge = dict(type='Resize', scale_factor=1.5)  # half of the nuclei are below 17 pixels
train_pipeline = _base_.train_pipeline
train_pipeline[3].direction = ['horizontal', 'vertical']
train_pipeline[2:3] = [dict(type='RandomCrop', crop_size=(256, 256)), enlarge]
test_pipeline = _base_.test_pipeline
test_pipeline[1] = enlarge
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
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1500, val_interval=250)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max=1500, end=1500),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(by_epoch=False, interval=250, max_keep_ckpts=1),
    visualization=dict(score_thr=0.4),
)
log_processor = dict(by_epoch=False)
visualizer = dict(line_width=2)
