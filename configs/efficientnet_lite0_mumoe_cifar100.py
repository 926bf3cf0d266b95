# A μMoE (arXiv 2402.12550) as the classifier on a frozen EfficientNet-Lite0: 64 experts with as
# many parameters as the linear layer that they replace.
_base_ = './efficientnet_lite0_dense_cifar100.py'
model = dict(
    type='mmdet_moe.WithExperts',
    of='ImageClassifier',
    experts=[dict(at='head.fc', type='mmdet_moe.CPMuMoE', num_experts=64, rank='match')],
)
