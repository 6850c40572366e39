"""Semantic FPN as in MMSegmentation's ``_base_/models/fpn_r50.py``, for PVT and ADE20K.

This file and its neighbours do not inherit from ``mmseg::``, which mmengine cannot resolve if
MMSegmentation is installed under the name of its fork.
"""

custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)

model = dict(
    _scope_='mmseg',  # for pvt_mm::, which is no scope of mmengine
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        size=(512, 512),
        pad_val=0,
        seg_pad_val=255,
    ),
    neck=dict(type='FPN', in_channels=[64, 128, 320, 512], out_channels=256, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
tta_model = dict(_scope_='mmseg', type='SegTTAModel')
