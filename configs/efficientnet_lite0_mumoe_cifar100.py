# A μMoE (arXiv 2402.12550) as the classifier on a frozen EfficientNet-Lite0: 16 experts with as
# many parameters as the linear layer that they replace. More leave too small a rank, see
# docs/results.md.
_base_ = './efficientnet_lite0_dense_cifar100.py'
model = dict(
    type='mmdet_moe.WithExperts',
    of='ImageClassifier',
    experts=[dict(at='head.fc', type='mmdet_moe.TRMuMoE', num_experts=16, rank='match')],
)
