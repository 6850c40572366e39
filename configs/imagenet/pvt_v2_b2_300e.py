"""PVTv2-B2 with the recipe of PVT: the mean over the last map in place of the class token."""

_base_ = './pvt_small_300e.py'
model = dict(
    backbone=dict(
        _delete_=True, type='PVTv2', arch='b2', out_type='avg_featmap', drop_path_rate=0.1
    ),
)
