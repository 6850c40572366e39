"""Semantic FPN with PVT-Tiny from random weights on cell nuclei, crops of 256 x 256."""

_base_ = '../camvid/semfpn_pvt_t.py'

data_root = '{{$NUCLEI_ROOT:data/dsb2018}}'
metainfo = dict(classes=('background', 'nucleus'), palette=[[60, 60, 60], [255, 200, 0]])
model = dict(decode_head=dict(num_classes=2, loss_decode=dict(class_weight=None)))

train_pipeline = _base_.train_pipeline
train_pipeline[2] = dict(type='RandomFlip', prob=0.5, direction='vertical')
train_pipeline[3].cat_max_ratio = 1.0  # some crops are background alone
test_pipeline = _base_.test_pipeline
del test_pipeline[1]
tta_pipeline = _base_.tta_pipeline
del tta_pipeline[1].transforms[0]
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        data_prefix=dict(img_path='train2017', seg_map_path='annotations/training'),
        metainfo=metainfo,
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        data_prefix=dict(img_path='val2017', seg_map_path='annotations/validation'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=1000, val_interval=250)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(T_max=1000, end=1000)
