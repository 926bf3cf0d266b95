"""Feature maps pixel by pixel in memory: ``tools/train.py --channels-last``."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError

#: Numbers of float32 in a vector of AVX2.
_VECTOR = 8


class ChannelsLastHook(Hook):
    """Gives the weights of convolutions that memory format before the training begins.

    A convolution whose weights lie so makes maps that do, whatever it is given. Only once the
    weights have been drawn or loaded: random numbers are drawn in the order of the memory, so the
    model would be another one.

    PyTorch's group normalisation on a CPU takes 12 times as long for such maps in bfloat16, so
    there it is given its maps channel by channel.
    """

    def before_train(self, runner: Runner) -> None:
        """Change the format in place; parameters stay the same objects."""
        # Module.to() fails for weights of five dimensions, as 3D convolutions have.
        runner.model._apply(_pixel_by_pixel)
        for module in runner.model.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_channel_by_channel)


def check_float32(model: nn.Module) -> None:
    """Refuse a model whose gradients PyTorch gets wrong in this memory format, in float32 on a CPU.

    They are those of 1×1 convolutions with a stride and with fewer input channels than a vector of
    AVX2 has numbers: oneDNN's kernel writes beyond its memory (its issue 6035), which ends
    in other gradients or in a crash.

    Raises:
        ConfigError: With the name of the convolution.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1):
            continue
        if max(module.stride) > 1 and module.in_channels // module.groups < _VECTOR:
            raise ConfigError(
                f'--channels-last: {name} is a 1×1 convolution with a stride and fewer than '
                f'{_VECTOR} input channels, of which PyTorch gets wrong gradients in float32 on a '
                'CPU; leave --channels-last out'
            )


def _pixel_by_pixel(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _channel_by_channel(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    slow = x.dtype == torch.bfloat16 and x.device.type == 'cpu'
    return (x.contiguous() if slow else x,)
