# Both MLPs of every block of an MLP-Mixer become μMoEs of 32 experts (arXiv 2402.12550) on
# Fashion-MNIST, with no more parameters than the MLPs have.
_base_ = './mlp_mixer_dense_fashion_mnist.py'
model = dict(
    backbone=dict(type='mmdet_moe.MuMoEMlpMixer', num_experts=32),
)
