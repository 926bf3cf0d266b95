# Both MLPs of every block of an MLP-Mixer become μMoEs of 64 experts (arXiv 2402.12550) on
# CIFAR-100, with no more parameters than the MLPs have.
_base_ = [
    './_base_/models/mlp_mixer_cifar.py',
    './_base_/datasets/cifar100.py',
    './_base_/schedules/cifar_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(
    backbone=dict(type='mmdet_moe.MuMoEMlpMixer', num_experts=64),
    head=dict(loss={{_base_.classification_loss}}),
)
