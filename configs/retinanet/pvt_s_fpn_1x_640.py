"""RetinaNet with PVT-Small at a short side of 640 pixels, in training and in testing."""

_base_ = './pvt_s_fpn_1x.py'

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (1066, 640)
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (1066, 640)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
