"""One parameter group for each expert, for any model with MoE layers."""

from collections import Counter
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from mmdet_moe.checks import check_options
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, find_moe_layers
from mmdet_moe.registry import OPTIM_WRAPPER_CONSTRUCTORS
from projects.cluster_theory.normalized_gd import OPTIONS, NormalizedGD, check_values


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ExpertGroupsConstructor:
    """Gives every expert of every MoE layer a group of its own, and the rest of the model one.

    Experts with stacked weights share a group with ``stacked=True``, which comes to the same.
    An MoE layer inside an expert of another one gives groups to its own experts; its router stays
    in the group of the expert around it. Frozen parameters are left out.

    Args:
        optim_wrapper_cfg: Config of the optim wrapper; its optimizer is a
            :class:`~projects.cluster_theory.NormalizedGD`, whose options are the experts'.
        paramwise_cfg: ``others``: options of the group of the rest, such as
            ``dict(lr=0.1, normalize=False)`` for plain gradient descent.

    Raises:
        ConfigError: For another optimizer, other keys, options of a wrong type or size, for a model
            without MoE layers, and for one whose experts share parameters.
    """

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        name, place = type(self).__name__, 'optim_wrapper.paramwise_cfg'
        paramwise_cfg = {} if paramwise_cfg is None else paramwise_cfg
        check_options(name, place, paramwise_cfg, ('others',))
        others = paramwise_cfg.get('others', {})
        check_options(name, f'{place}.others', others, OPTIONS)
        check_values(name, f'{place}.others.', others)
        self.optim_wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = self.optim_wrapper_cfg.pop('optimizer', None)
        if not isinstance(self.optimizer_cfg, dict):
            raise ConfigError(
                f'{name}: optim_wrapper.optimizer={self.optimizer_cfg!r} must be a dict such as '
                "dict(type='mmdet_moe.NormalizedGD', lr=1e-3)"
            )
        self.others = dict(others)

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
            inner = [m for m in layer.experts.modules() if isinstance(m, MoELayer)]
            nested = {id(p) for m in inner for p in m.experts.parameters()}
            own = [layer.experts.parameters_of(e) for e in range(layer.num_experts)]
            if any(own):
                own = [[p for p in parameters if id(p) not in nested] for parameters in own]
                groups += [{'params': parameters} for parameters in own]
            else:  # all experts in common parameters
                groups.append({'params': list(layer.experts.parameters()), 'stacked': True})
        for group in groups:
            group['params'] = [p for p in group['params'] if p.requires_grad]
        groups = [group for group in groups if group['params']]
        uses = Counter(p for group in groups for p in group['params'])
        if shared := [name for name, p in model.named_parameters() if uses[p] > 1]:
            raise ConfigError(
                f'ExpertGroupsConstructor: several experts share the parameters {shared}; give '
                'each expert its own or remove optim_wrapper.constructor'
            )
        rest = [p for p in model.parameters() if p.requires_grad and p not in uses]
        return [*groups, {'params': rest, **self.others}] if rest else groups
