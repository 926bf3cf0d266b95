# Sparse experts as the classifier on a frozen EfficientNet-Lite0: 2 of 16 linear classifiers for
# each image; beside efficientnet_lite0_mumoe_cifar100.py.
_base_ = [
    './efficientnet_lite0_dense_cifar100.py',
    './_base_/balancing/soft_importance.py',
]
model = dict(
    type='mmdet_moe.WithExperts',
    of='ImageClassifier',
    router={{_base_.router}},
    experts=[dict(at='head.fc', granularity='token', num_experts=16, top_k=2)],
)
