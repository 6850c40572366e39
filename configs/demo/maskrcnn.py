"""Mask R-CNN with PVT-Tiny from random weights on the cell nuclei of `make demo`."""

_base_ = '../nuclei/maskrcnn_pvt_t.py'

data_root = '{{$DEMO_ROOT:demo/nuclei}}'
train_pipeline = _base_.train_pipeline
train_pipeline[2].crop_size = (128, 128)
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_val2017.json')
test_evaluator = val_evaluator

train_cfg = dict(max_iters=250, val_interval=125)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=250, end=250)
default_hooks = dict(checkpoint=dict(interval=125))
