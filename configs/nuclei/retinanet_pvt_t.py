"""RetinaNet with PVT-Tiny from random weights on cell nuclei, enlarged 1.5 times."""

_base_ = '../bccd/retinanet_pvt_t.py'

data_root = '{{$NUCLEI_ROOT:data/dsb2018}}'
metainfo = dict(classes=('nucleus',), palette=[(255, 200, 0)])
model = dict(bbox_head=dict(num_classes=1))

enlarge = dict(type='Resize', scale_factor=1.5)  # half of the nuclei are below 17 pixels
train_pipeline = _base_.train_pipeline
train_pipeline[2:3] = [dict(type='RandomCrop', crop_size=(256, 256)), enlarge]
test_pipeline = _base_.test_pipeline
test_pipeline[1] = enlarge
train_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=f'{data_root}/annotations/instances_val2017.json')
test_evaluator = val_evaluator

train_cfg = dict(max_iters=1500)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=1500, end=1500)
