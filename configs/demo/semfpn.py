"""Semantic FPN with PVT-Tiny from random weights on the cell nuclei of `make demo`."""

_base_ = '../nuclei/semfpn_pvt_t.py'

data_root = '{{$DEMO_ROOT:demo/nuclei}}'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=150, val_interval=50)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=150, end=150)
default_hooks = dict(checkpoint=dict(interval=50))
