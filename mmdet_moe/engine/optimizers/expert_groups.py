"""One parameter group for each expert, for any model with MoE layers."""

from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from mmdet_moe.engine.optimizers.normalized_gd import NormalizedGD
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import find_moe_layers
from mmdet_moe.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ExpertGroupsConstructor:
    """Gives every expert of every MoE layer a group of its own, and the rest of the model one.

    Experts with stacked weights share a group with ``stacked=True``, which comes to the same.
    Frozen parameters are left out.

    Args:
        optim_wrapper_cfg: Config of the optim wrapper; its optimizer is a
            :class:`~mmdet_moe.engine.optimizers.NormalizedGD`, whose options are the experts'.
        paramwise_cfg: ``others``: options of the group of the rest, such as
            ``dict(lr=0.1, normalize=False)`` for plain gradient descent.

    Raises:
        ConfigError: For another optimizer, other keys, and for a model without MoE layers.
    """

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        if unknown := set(paramwise_cfg or {}) - {'others'}:
            raise ConfigError(
                f'optim_wrapper.paramwise_cfg has unknown keys {sorted(unknown)}; '
                'ExpertGroupsConstructor takes dict(others=dict(lr=..., normalize=...))'
            )
        self.optim_wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = self.optim_wrapper_cfg.pop('optimizer')
        self.others = dict((paramwise_cfg or {}).get('others', {}))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer of a model, and its wrapper."""
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, 'params': self.groups(model)})
        if not isinstance(optimizer, NormalizedGD):
            raise ConfigError(
                f'optim_wrapper.optimizer: {type(optimizer).__name__} treats all groups alike; use '
                'mmdet_moe.NormalizedGD, or remove optim_wrapper.constructor'
            )
        config = {'type': 'OptimWrapper', **self.optim_wrapper_cfg}
        return OPTIM_WRAPPERS.build({**config, 'optimizer': optimizer})

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameter groups: those of the experts, layer by layer, then that of the rest."""
        layers = find_moe_layers(model)
        if not layers:
            raise ConfigError(
                f'ExpertGroupsConstructor found no MoE layer in {type(model).__name__}; use an MoE '
                'model or remove optim_wrapper.constructor'
            )
        groups = []
        for layer in layers.values():
            experts = range(layer.num_experts)
            own = [layer.experts.parameters_of(e) for e in experts]
            if any(own):
                groups += [{'params': parameters} for parameters in own]
            else:  # all experts in common parameters
                groups.append({'params': list(layer.experts.parameters()), 'stacked': True})
        for group in groups:
            group['params'] = [p for p in group['params'] if p.requires_grad]
        groups = [group for group in groups if group['params']]
        taken = {id(p) for group in groups for p in group['params']}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        return [*groups, {'params': rest, **self.others}] if rest else groups
