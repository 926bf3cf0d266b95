# Both MLPs of every block of an MLP-Mixer become μMoEs of 64 experts (arXiv 2402.12550) on
# CIFAR-100, with no more parameters than the MLPs have.
_base_ = './mlp_mixer_dense_cifar100.py'
model = dict(
    backbone=dict(type='mmdet_moe.MuMoEMlpMixer', num_experts=64),
)
