"""How far an expert sees, measured with a NaN, which spreads to all that depends on it."""

import copy

import torch
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.dispatcher import unpack

_SIDES = (16, 32, 64, 128, 256)
#: Of the axis that is not measured: a small one costs little, large kernels need a large one.
_OTHER_SIDES = (8, 64)


def receptive_field(module: nn.Module, in_channels: int) -> tuple[int, int]:
    """Radius of the receptive field in input pixels, and total stride, of a convolutional expert.

    A map of ones with one NaN is sent through a copy in eval mode, with positive weights. Output
    pixels that become NaN see that input pixel. Along each axis the map grows until its middle does
    not reach its borders.

    Args:
        module: From (N, C, H, W) to (N, C', H', W').
        in_channels: C.

    Returns:
        The larger ones of both axes.

    Raises:
        ConfigError: If the module does not map images so, or sees more than a neighbourhood of at
            most half of :data:`_SIDES` (global pooling, group normalisation, attention, padding
            from the other side), for which patches cannot be exact.
    """
    probe = probe_of(module)
    axes: list[tuple[int, int] | None] = []
    for other_side in _OTHER_SIDES:
        try:
            with torch.no_grad():
                axes = [_along(probe, in_channels, axis, other_side) for axis in (2, 3)]
            break
        except Exception:  # of any kind: the module is the user's
            continue
    measured = [axis for axis in axes if axis is not None]
    if len(measured) < 2:
        raise ConfigError(
            'granularity="patch" or "pixel" needs to know how far the experts see, and cannot tell '
            f'the receptive field of {type(module).__name__}; use granularity="image", or experts '
            'made of convolutions, pointwise layers and batch norm'
        )
    return max(r for r, _ in measured), max(s for _, s in measured)


def check_tokenwise(module: nn.Module, in_channels: int) -> None:
    """Refuse an expert on single tokens that computes one of several.

    Args:
        module: From tokens (T, C) to (T, C'). One that takes more than them, or has no values, is
            let pass: its first call will tell.
        in_channels: C.

    Raises:
        ConfigError: If a NaN in one token reaches another one.
    """
    if _is_mixing(module, torch.ones(3, in_channels, dtype=torch.float64), 0):
        raise ConfigError(
            f"granularity='token' needs experts that look at one token at a time, and "
            f'{type(module).__name__} mixes them; choose a layer inside that does not, such as an '
            "FFN, or granularity='image'"
        )


def check_images_apart(module: nn.Module, in_channels: int, batch_dim: int) -> None:
    """Refuse an expert on sequences whose parts take another dimension for that of the images.

    PyTorch's and mmcv's attention, transformers and recurrent layers have ``batch_first``; only
    modules with such parts are tried, as many others take three dimensions for something else.

    Args:
        module: From (A, B, C) to (A, B, C'). One that takes something else is let pass.
        in_channels: C.
        batch_dim: 0 if A is the images, 1 if B is.

    Raises:
        ConfigError: If a NaN in one image reaches another one.
    """
    if not any(hasattr(part, 'batch_first') for part in module.modules()):
        return
    side = 3 if in_channels != 3 else 4  # so that no convolution takes A for the channels
    x = torch.ones(side, side, in_channels, dtype=torch.float64)
    # A decoder layer takes another sequence besides.
    if _is_mixing(module, x, batch_dim) or _is_mixing(module, x, batch_dim, x):
        raise ConfigError(
            f'batch_dim={batch_dim} says that dimension {batch_dim} of an input holds the images, '
            f'but {type(module).__name__} mixes what lies along it (see batch_first of its parts); '
            f'set batch_dim={1 - batch_dim}, or choose a path inside of it'
        )


def _is_mixing(module: nn.Module, x: Tensor, dim: int, *others: Tensor) -> bool:
    """Whether a NaN in one slice along a dimension reaches another; no if it cannot be told."""
    x.select(dim, 1).fill_(torch.nan)
    try:
        with torch.no_grad():
            y, _ = unpack(probe_of(module)(x, *others))
        apart = y.movedim(dim, 0)
    except Exception:  # of any kind: the module is the user's
        return False
    return len(apart) != x.shape[dim] or bool(apart[::2].isnan().any())


def probe_of(module: nn.Module) -> nn.Module:
    """A copy in which no value is zero, and none grows large."""
    # In double precision there are no Winograd kernels, which spread a NaN to its neighbours.
    probe = copy.deepcopy(module).cpu().double()
    probe.eval()  # not in a chain: MMPretrain's returns None
    for layer in probe.modules():
        reset = getattr(layer, 'reset_running_stats', None)
        if callable(reset):
            reset()
    for parameter in probe.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        nn.init.constant_(parameter, 1 / fan_in)
    return probe


def _along(probe: nn.Module, channels: int, axis: int, other_side: int) -> tuple[int, int] | None:
    """Radius and stride along one axis; None if there are none."""
    for side in _SIDES:
        shape = [channels, other_side, other_side]
        shape[axis - 1] = side
        middle = side // 2
        (alone,) = _seen(probe, shape, axis, torch.tensor([middle]))
        length = len(alone)
        if 4 * length > 5 * side:  # upsampled
            return None
        stride = round(side / length)
        if 4 * stride > side or alone[0] or alone[-1]:
            continue
        middle -= middle % stride
        places = torch.tensor([0, side - 1, *range(middle, middle + stride)])
        seen = _seen(probe, shape, axis, places)
        # What does not keep the size is refused later, by the place that has to put it together.
        surplus = (length - -(-side // stride)) // 2
        centres = (torch.arange(length) - surplus) * stride
        distances = (centres - places[:, None]).abs() * seen
        radius = int(distances[2:].max())
        # At the borders, padding may bring pixels from afar.
        return (radius, stride) if seen[2:].any() and distances.max() <= radius else None
    return None


def _seen(probe: nn.Module, shape: list[int], axis: int, places: Tensor) -> Tensor:
    """bool (places, length): which outputs along the axis see each of these places."""
    x = torch.ones(len(places), *shape, dtype=torch.float64)
    other = 5 - axis
    line = x.select(other, x.shape[other] // 2)  # (places, C, side), a view
    line[torch.arange(len(places)), :, places] = torch.nan
    return probe(x).isnan().any(1).any(other - 1)
