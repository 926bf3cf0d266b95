# A quarter of Mixer-S in every width for grey images of 28×28 pixels (49 patches) and 10 classes.
_base_ = './mlp_mixer_cifar.py'
model = dict(
    backbone=dict(
        arch=dict(embed_dims=128, num_layers=4, tokens_mlp_dims=64, channels_mlp_dims=512),
        img_size=28,
        patch_cfg=dict(in_channels=1),
    ),
    head=dict(num_classes=10, in_channels=128),
)
