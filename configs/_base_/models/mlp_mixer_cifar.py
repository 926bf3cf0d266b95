# An MLP-Mixer for images of 32×32 pixels: half of Mixer-S in every width, on 64 patches of 4×4
# pixels. The schedule brings its loss.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MlpMixer',
        arch=dict(embed_dims=256, num_layers=8, tokens_mlp_dims=128, channels_mlp_dims=1024),
        img_size=32,
        patch_size=4,
        init_cfg=dict(type='Kaiming', layer='Conv2d', mode='fan_in', nonlinearity='linear'),
    ),
    neck=dict(type='GlobalAveragePooling', dim=1),
    head=dict(type='LinearClsHead', num_classes=100, in_channels=256),
)
