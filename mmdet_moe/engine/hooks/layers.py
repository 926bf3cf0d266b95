"""What the hooks share: the layers of experts of the model that a Runner trains."""

from collections.abc import Iterable

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import ExpertLayer, MoELayer, find_expert_layers


def unwrapped_model(runner: Runner) -> nn.Module:
    """The model without its (distributed) wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def expert_layers_of(runner: Runner, hook: Hook) -> dict[str, ExpertLayer]:
    """The layers of experts of the runner's model by name.

    Raises:
        ConfigError: If there are none: the hook would do nothing.
    """
    model = unwrapped_model(runner)
    layers = find_expert_layers(model)
    if not layers:
        raise ConfigError(
            f'{type(hook).__name__} found no MoE layer in {type(model).__name__}; '
            "use an MoE model (such as bbox_head=dict(type='mmdet_moe.MoERetinaHead', ...)) or "
            'remove the hook from custom_hooks'
        )
    return layers


def moe_layers_of(runner: Runner, hook: Hook) -> dict[str, MoELayer]:
    """Those that can be balanced, the sparse ones.

    Raises:
        ConfigError: If there are none: the hook would do nothing.
    """
    layers = expert_layers_of(runner, hook)
    sparse = {name: layer for name, layer in layers.items() if isinstance(layer, MoELayer)}
    if not sparse:
        raise ConfigError(
            f'{type(hook).__name__}: the model has only μMoE layers ({", ".join(layers)}), whose '
            'experts all take part in every item and need no balancing; remove the hook from '
            'custom_hooks'
        )
    return sparse


def sources_of(samples: Iterable | None) -> tuple[int, ...] | None:
    """The number of the data set of each image of a batch.

    Args:
        samples: Its data samples, in whose metainfo :class:`~mmdet_moe.datasets.JointDataset` has
            left it.

    Returns:
        (N,), or None where it is not known of every image.
    """
    found = [getattr(sample, 'metainfo', {}).get('dataset_source') for sample in samples or ()]
    return tuple(map(int, found)) if found and None not in found else None
