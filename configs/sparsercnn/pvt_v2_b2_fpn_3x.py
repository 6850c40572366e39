_base_ = './pvt_v2_b2_li_fpn_3x.py'
model = dict(backbone=dict(arch='b2', init_cfg=dict(checkpoint='pvt_v2_b2')))

# One image per GPU, and the learning rate that goes with it.
train_dataloader = dict(batch_size=1, num_workers=1)
optim_wrapper = dict(optimizer=dict(lr=2.5e-5 / 1.4))
auto_scale_lr = dict(base_batch_size=8)
