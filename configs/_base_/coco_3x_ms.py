"""What the 3x recipes for COCO share, under names that no base of MMDetection has."""

scales = [(side, 1333) for side in range(480, 801, 32)]
# Between loading and packing.
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
# The authors took over Swin's three keys; this is the one that fits a parameter of PVT. It fits
# every norm of the backbone, and none of the heads, which are named gn and bn.
norms_undecayed = dict(custom_keys={'norm': dict(decay_mult=0.0)})
