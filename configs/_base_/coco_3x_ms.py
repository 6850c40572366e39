"""Common parts of the 3x recipes for COCO; no base of MMDetection uses these names."""

scales = [(side, 1333) for side in range(480, 801, 32)]
# The steps between loading and packing.
ms_crop = [
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 1333), (500, 1333), (600, 1333)],
                    keep_ratio=True,
                ),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                dict(type='RandomChoiceResize', scales=scales, keep_ratio=True),
            ],
        ],
    ),
]
# The authors copied Swin's three keys; only this one matches a parameter of PVT. It matches every
# norm of the backbone, and none of the heads, whose names are gn and bn.
norms_undecayed = dict(custom_keys={'norm': dict(decay_mult=0.0)})
