"""Gradient descent whose steps have a fixed length, for each expert by itself."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.registry import OPTIMIZERS as MMENGINE_OPTIMIZERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mmdet_moe.checks import check_flag, check_number, check_options
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, find_moe_layers
from mmdet_moe.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS

OPTIONS = ('lr', 'weight_decay', 'normalize', 'stacked')
# What PyTorch, the schedulers and the toolboxes' optimizer constructors note down in a group.
_NOTES = {'param_names', 'param_name', 'group_name', 'layer_id', 'lr_scale', 'swa_lr'} | {
    f'{prefix}_{name}' for prefix in ('initial', 'max', 'min') for name in ('lr', 'weight_decay')
}


@OPTIMIZERS.register_module()
class NormalizedGD(Optimizer):
    """``w ← w − lr · (g / ‖g‖ + weight_decay · w)``, ‖g‖ the norm of all gradients of a group.

    So an expert that gets few samples moves as far as one that gets many (arXiv 2208.02813),
    however small or large its gradient is. A gradient of 0 stays 0; one with a NaN or an infinity
    makes all that it is normalised with NaN, as loudly as plain gradient descent.
    :class:`ExpertGroupsConstructor` makes the groups.

    Steps are computed in the widest dtype of a group's gradients, at least float32.

    Args:
        params: Parameters, or groups of them, which may have options of their own.
        lr: Length of a step without weight decay; a number, or a tensor of one element.
        weight_decay: As above: it is not part of what is normalised.
        normalize: False: ``‖g‖`` is replaced by 1, which is plain gradient descent.
        stacked: Each slice along the first axis of the parameters, which they must have in common,
            is normalised by itself: experts with stacked weights.

    Raises:
        ConfigError: For options that are unknown, of a wrong type or negative, and for stacked
            parameters of different lengths; in a step, for sparse or complex gradients that are to
            be normalised.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        normalize: bool = True,
        stacked: bool = False,
    ) -> None:
        defaults = {
            'lr': lr,
            'weight_decay': weight_decay,
            'normalize': normalize,
            'stacked': stacked,
        }
        check_values('NormalizedGD', '', defaults)  # also where each group has its own
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; one that is refused is not added.

        Args:
            param_group: ``params``, and options of their own.

        Raises:
            ConfigError: As for the class.
        """
        options = param_group
        if isinstance(options, dict):
            options = {key: value for key, value in options.items() if key not in _NOTES}
        check_options('NormalizedGD', 'a parameter group', options, ('params', *OPTIONS))
        check_values('NormalizedGD', '', options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        lengths = {p.shape[0] if p.dim() else None for p in group['params']}
        if group['stacked'] and (len(lengths) != 1 or None in lengths):
            self.param_groups.pop()
            raise ConfigError(
                'NormalizedGD: stacked=True needs parameters with the same length along the '
                f'first axis, got {sorted(map(str, lengths))}; give them groups of their own'
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step.

        Args:
            closure: Computes the loss and the gradients anew.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group['params'] if p.grad is not None and p.numel()]
            if not parameters:
                continue
            steps: Iterable[Tensor] = [p.grad for p in parameters]
            if group['normalize']:
                steps = _normalized(steps, group['stacked'])
            lr, weight_decay = float(group['lr']), float(group['weight_decay'])
            for p, step in zip(parameters, steps, strict=True):
                if weight_decay:
                    step = step.add(p, alpha=weight_decay)
                p.add_(step, alpha=-lr)
        return loss


def check_values(owner: str, prefix: str, options: dict[str, Any]) -> None:
    """Refuse options of :class:`NormalizedGD` of a wrong type or size.

    Args:
        owner: The class that got them.
        prefix: What stands before their names where the user wrote them.
        options: Some of ``OPTIONS``, and maybe other things.

    Raises:
        ConfigError: Naming the option.
    """
    for name in OPTIONS:
        if name not in options:
            continue
        value = options[name]
        if name in ('normalize', 'stacked'):
            check_flag(owner, prefix + name, value)
        else:
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            check_number(owner, prefix + name, value, least=0)


def _normalized(gradients: list[Tensor], stacked: bool) -> Iterator[Tensor]:
    """The gradients over their common norm, or slice by slice; 0 where that is 0.

    Squares of small and large gradients leave the range of floats, so each row of numbers with a
    norm of their own is scaled first, by a power of two, which rounds nothing.

    Args:
        gradients: Of any shapes without empty ones; (E, ...) each if stacked.
        stacked: Whether each of the E slices has a norm of its own.

    Yields:
        The normalised gradients, of the same shapes, in the widest dtype, at least float32.
    """
    for g in gradients:
        if g.layout != torch.strided or g.is_complex():
            raise ConfigError(
                f'NormalizedGD: a gradient of shape {tuple(g.shape)} is {g.dtype}, {g.layout}, but '
                'only real dense ones can be normalised; give its parameter a group with '
                'normalize=False'
            )
    dtype = reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
    rows = [g.to(dtype).reshape(len(g) if stacked else 1, -1) for g in gradients]
    rows = torch.cat(rows, dim=1)
    largest = rows.abs().amax(dim=1)
    scale = _power_of_two_over(largest)
    # One power of two does not reach far enough for subnormal numbers.
    rescale = _power_of_two_over(largest * scale)
    norm = torch.linalg.vector_norm(rows * scale[:, None] * rescale[:, None], dim=1)
    factor = torch.where(norm == 0, 0, rescale / norm)
    for g in gradients:
        shape = (-1, *(1,) * (g.dim() - 1)) if stacked else ()
        yield g.to(dtype) * scale.view(shape) * factor.view(shape)


def _power_of_two_over(x: Tensor) -> Tensor:
    """The power of two that takes x ≥ 0 to [0.5, 1), or the nearest normal float; NaN for ∞."""
    tiny = torch.finfo(x.dtype).tiny
    # A quotient is rounded correctly on every device, unlike torch.ldexp, which computes a power.
    power = (torch.frexp(x).mantissa / x).clamp(tiny, 1 / tiny)
    return torch.where(x == 0, 1, power)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ExpertGroupsConstructor:
    """Gives every expert of every MoE layer a group of its own, and the rest of the model one.

    Experts with stacked weights share a group with ``stacked=True``, which comes to the same.
    An MoE layer inside an expert of another one gives groups to its own experts; its router stays
    in the group of the expert around it. Frozen parameters are left out.

    Args:
        optim_wrapper_cfg: Config of the optim wrapper; its optimizer is a
            :class:`NormalizedGD`, whose options are the experts'.
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
        optimizer = MMENGINE_OPTIMIZERS.build({**self.optimizer_cfg, 'params': self.groups(model)})
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
