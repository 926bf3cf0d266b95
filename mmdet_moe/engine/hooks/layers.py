"""What the hooks share: the MoE layers of the model that a Runner trains."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, find_moe_layers


def unwrapped_model(runner: Runner) -> nn.Module:
    """The model without its (distributed) wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def moe_layers_of(runner: Runner, hook: Hook) -> dict[str, MoELayer]:
    """The MoE layers of the runner's model by name.

    Raises:
        ConfigError: If there are none: the hook would do nothing.
    """
    model = unwrapped_model(runner)
    layers = find_moe_layers(model)
    if not layers:
        raise ConfigError(
            f'{type(hook).__name__} found no MoE layer in {type(model).__name__}; '
            "use an MoE model (such as bbox_head=dict(type='mmdet_moe.MoERetinaHead', ...)) or "
            'remove the hook from custom_hooks'
        )
    return layers
