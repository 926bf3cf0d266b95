# Setting 1 of arXiv 2208.02813: a single linear model.
_base_ = './moe_theory_s1_single.py'
model = dict(activation='linear')
optim_wrapper = dict(optimizer=dict(lr=3e-3))
