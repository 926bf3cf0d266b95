"""The residual variant of an MoE stage (arXiv 2204.10598)."""

from mmcv.cnn import build_conv_layer, build_norm_layer
from torch import nn


def make_shortcut(
    in_channels: int, out_channels: int, stride: int, conv_cfg: dict | None, norm_cfg: dict
) -> nn.Module:
    """What is added around an MoE: the identity, or a 1×1 convolution with normalisation.

    Args:
        in_channels, out_channels: Channels before and behind the MoE.
        stride: Its stride.
        conv_cfg, norm_cfg: Of the backbone.
    """
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    conv = build_conv_layer(
        conv_cfg, in_channels, out_channels, kernel_size=1, stride=stride, bias=False
    )
    return nn.Sequential(conv, build_norm_layer(norm_cfg, out_channels)[1])
