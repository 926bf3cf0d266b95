# ResNet-18 for images of 32×32 pixels: a 3×3 stem without pooling. The schedule brings its loss.
# Another depth, 50 for example, takes two lines: backbone.depth=50 and head.in_channels=2048 (that
# of 18 and 34 is 512).
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=18),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=100, in_channels=512),
)
