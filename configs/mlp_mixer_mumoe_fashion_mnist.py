# Both MLPs of every block of an MLP-Mixer become μMoEs of 32 experts (arXiv 2402.12550) on
# Fashion-MNIST, with no more parameters than the MLPs have.
_base_ = [
    './_base_/models/mlp_mixer_fashion_mnist.py',
    './_base_/datasets/fashion_mnist.py',
    './_base_/schedules/fashion_mnist_adam.py',
    './_base_/classification_runtime.py',
]
model = dict(
    backbone=dict(type='mmdet_moe.MuMoEMlpMixer', num_experts=32),
    head=dict(loss={{_base_.classification_loss}}),
)
