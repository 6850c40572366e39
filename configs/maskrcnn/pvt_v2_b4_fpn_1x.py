_base_ = './pvt_v2_b2_fpn_1x.py'
model = dict(backbone=dict(arch='b4', init_cfg=dict(checkpoint='pvt_v2_b4')))

# One image per GPU, and the learning rate that goes with it.
train_dataloader = dict(batch_size=1, num_workers=1)
optim_wrapper = dict(optimizer=dict(lr=2e-4 / 1.4))
auto_scale_lr = dict(base_batch_size=8)
