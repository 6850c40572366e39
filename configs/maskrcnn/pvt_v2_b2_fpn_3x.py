"""Mask R-CNN with PVTv2-B2, 36 epochs of COCO at many scales: the authors' recipe."""

_base_ = ['./pvt_v2_b2_fpn_1x.py', '../_base_/coco_3x_ms.py']

train_pipeline = [*_base_.train_pipeline[:2], *_base_.ms_crop, _base_.train_pipeline[-1]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=_base_.norms_undecayed,
)
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(end=36, milestones=[27, 33])
