# Setting 1 of arXiv 2208.02813: the mixture of linear experts.
_base_ = './moe_theory_s1.py'
model = dict(activation='linear')
