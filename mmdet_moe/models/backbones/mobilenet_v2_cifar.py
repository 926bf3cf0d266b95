"""MobileNetV2 for images of 32×32 pixels."""

from mmcv.cnn import ConvModule
from mmpretrain.models.backbones import MobileNetV2

from mmdet_moe.registry import MODELS


@MODELS.register_module()
class MobileNetV2_CIFAR(MobileNetV2):
    """MMPretrain's ``MobileNetV2`` without its first two strides, as ``ResNet_CIFAR`` is one.

    The last of 32×32 pixels are then 4×4 instead of 1×1, of which batch normalisation could tell
    nothing when a single image is routed to an expert.

    Args:
        in_channels: Channels of the images.
        **kwargs: As for ``MobileNetV2``.
    """

    # As in the base class, but for the stride of the second group of blocks.
    arch_settings = [
        [expansion, channels, blocks, 1 if index == 1 else stride]
        for index, (expansion, channels, blocks, stride) in enumerate(MobileNetV2.arch_settings)
    ]

    def __init__(self, in_channels: int = 3, **kwargs) -> None:
        super().__init__(**kwargs)
        self.conv1 = ConvModule(
            in_channels,
            self.conv1.out_channels,
            kernel_size=3,
            padding=1,
            conv_cfg=self.conv_cfg,
            norm_cfg=self.norm_cfg,
            act_cfg=self.act_cfg,
        )
