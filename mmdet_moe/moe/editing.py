"""Expert editing: change what one expert contributes to one output (arXiv 2402.12550, section 4.3).

A layer returns ``y = sum_n a_n c_n(x)``; an edit replaces ``c_n(x)_o`` by ``scale · c_n(x)_o``, by
``c_n(x)_o + add`` or by 0, and leaves the decision ``a_n`` alone. It is made in the weights: an
edited model is an ordinary one, with an ordinary checkpoint and nothing more to compute.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdet_moe.checks import check_flag, check_integer, check_number
from mmdet_moe.errors import ConfigError, explained
from mmdet_moe.moe.dispatcher import Dispatcher, unpack
from mmdet_moe.moe.experts import ConvExperts, LinearExperts, MLPExperts, ModuleExperts
from mmdet_moe.moe.layer import MoELayer, find_moe_layers

#: Vectors, or pixels, on which it is seen whether an edit did what it says.
_PROBES = 64
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Edit:
    """One change of what an expert contributes, before it is weighted.

    Args:
        layer: Name of the layer in the model, such as ``'head.fc'``.
        expert: n, from 0. With several levels of experts: the index in row-major order.
        output: o, from 0: a class of a classifier's last layer, a channel of a feature map. None:
            all outputs.
        scale: ``c -> scale · c``.
        add: ``c -> c + add``.
        zero: ``c -> 0``.

    Raises:
        ConfigError: Unless exactly one of the three is given, and all values are of their kind.
    """

    layer: str
    expert: int
    output: int | None
    scale: float | None = None
    add: float | None = None
    zero: bool = False

    def __post_init__(self) -> None:
        check_integer('Edit', 'expert', self.expert, 0)
        if self.output is not None:
            check_integer('Edit', 'output', self.output, 0)
        check_flag('Edit', 'zero', self.zero)
        given = {
            'scale': self.scale is not None, 'add': self.add is not None, 'zero': self.zero
        }  # fmt: skip
        if sum(given.values()) != 1:
            names = ' and '.join(name for name, is_given in given.items() if is_given) or 'none'
            raise ConfigError(
                f'Edit of layer "{self.layer}": give exactly one of scale, add and zero=True, '
                f'not {names}'
            )
        for name in ('scale', 'add'):
            if given[name]:
                check_number('Edit', name, getattr(self, name))

    @property
    def factor(self) -> float | None:
        """What the contribution is multiplied with; None for ``add``."""
        return 0.0 if self.zero else self.scale

    def of(self, contribution: Tensor, dim: int) -> Tensor:
        """The edited contribution of a given one, whose outputs lie along ``dim``."""
        edited = contribution.clone()
        part = edited if self.output is None else edited.select(dim, self.output)
        part.add_(self.add) if self.factor is None else part.mul_(self.factor)
        return edited

    def __str__(self) -> str:
        outputs = 'all outputs' if self.output is None else f'output {self.output}'
        change = f'{self.add:+g}' if self.factor is None else f'× {self.factor:g}'
        return f'layer "{self.layer}", expert {self.expert}, {outputs}: {change}'


@contextmanager
def edit_experts(model: nn.Module, edits: Iterable[Edit]) -> Iterator[nn.Module]:
    """The model with edits, until the end of the block; then its weights are bitwise as before.

    Args:
        model: Any model with MoE layers.
        edits: Made one after the other; several on the same expert compose.

    Raises:
        ConfigError: As :func:`apply_edits`.
    """
    with ExitStack() as undo:
        _apply(model, edits, undo)
        yield model


def apply_edits(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Edit a model for good.

    Sparse experts: a row of the expert's last linear layer, convolution or affine normalisation is
    changed. The outcome is compared on random inputs, for what follows that layer decides whether
    the edit is exact: after a ReLU a contribution can be scaled by what is not negative, but
    nothing can be added to it.

    Args:
        model: As for :func:`edit_experts`; left as it was if an error is raised.
        edits: As for :func:`edit_experts`.

    Raises:
        ConfigError: If there is no such layer, expert or output, or the expert is built in a way
            that its weights cannot express the edit.
    """
    with ExitStack() as undo:
        _apply(model, edits, undo)
        undo.pop_all()


@torch.no_grad()
def _apply(model: nn.Module, edits: Iterable[Edit], undo: ExitStack) -> None:
    edits = list(edits)
    layers = find_moe_layers(model)
    handles = [_find(model, layers, edit) for edit in edits]  # all are checked before any is made
    for edit, handle in zip(edits, handles, strict=True):
        handle.apply(edit, undo)


def _find(model: nn.Module, layers: dict[str, MoELayer], edit: Edit) -> '_SparseExpert':
    """What an edit is about.

    Raises:
        ConfigError: If there is no such thing in the model.
    """
    if edit.layer not in layers:
        close = difflib.get_close_matches(edit.layer, list(layers), cutoff=0.4) or list(layers)[:8]
        there = f'there is {", ".join(close)}' if close else f'{type(model).__name__} has none'
        raise ConfigError(f'Edit: no layer "{edit.layer}" has experts; {there}')
    layer = layers[edit.layer]
    if edit.expert >= layer.num_experts:
        raise ConfigError(
            f'Edit of layer "{edit.layer}": expert={edit.expert} is out of range; it has '
            f'{layer.num_experts} experts, from 0'
        )
    handle = _SparseExpert(model, layer, edit.expert)
    if edit.output is not None and edit.output >= handle.num_outputs:
        raise ConfigError(
            f'Edit of layer "{edit.layer}": output={edit.output} is out of range; an expert has '
            f'{handle.num_outputs} outputs, from 0'
        )
    return handle


class _SparseExpert:
    """One expert of an MoE layer, and the weights behind its outputs.

    Args:
        model: Which must not use the weights elsewhere.
        layer: Its layer.
        expert: Its index.

    Raises:
        ConfigError: If the weights are not found.
    """

    def __init__(self, model: nn.Module, layer: MoELayer, expert: int) -> None:
        self.layer, self.expert = layer, expert
        self._where = f'expert {expert} of layer "{layer.name}" cannot be edited'
        last = self._last_layer()
        self._kind = type(last).__name__
        if any(
            value is last.weight
            for module in self._other_modules(model)
            for value in module._parameters.values()
        ):
            raise ConfigError(
                f'{self._where}: the weights of its last layer, {self._kind}, are used elsewhere, '
                'too; choose a layer whose experts share none'
            )
        # Of experts in one stack the expert's part, of modules the whole.
        self._index = ... if isinstance(layer.experts, nn.ModuleList) else expert
        self._weight, self._bias = last.weight, last.bias
        #: How many outputs it has.
        self.num_outputs = self._weight[self._index].shape[0]
        contribution = self._contribution()
        self._dim = -1 if contribution.dim() == 3 else 1
        if contribution.shape[self._dim] != self.num_outputs:
            raise ConfigError(
                f'{self._where}: its last layer with weights, {self._kind}, has '
                f'{self.num_outputs} outputs, of which it makes {contribution.shape[self._dim]}'
            )

    def apply(self, edit: Edit, undo: ExitStack) -> None:
        """Change the weights.

        Args:
            edit: What to change.
            undo: Told how to change them back.

        Raises:
            ConfigError: If the outcome is not the edit.
        """
        if edit.factor is None and self._bias is None:
            raise ConfigError(
                f'{self._where}: add={edit.add} needs a bias, which its last layer, {self._kind}, '
                'has not; build it with bias=True, or use scale'
            )
        before = self._contribution()
        rows = slice(None) if edit.output is None else edit.output
        for parameter in (self._weight, self._bias):
            if parameter is None:
                continue
            values = parameter[self._index]
            undo.callback(_put, parameter, self._index, values.clone())
            if edit.factor is not None:
                values[rows] = values[rows] * edit.factor
        if edit.factor is None:
            self._bias[self._index][rows] += edit.add
        wanted, found = edit.of(before, self._dim), self._contribution()
        eps = torch.finfo(before.dtype).eps
        allowed = eps**0.5 * (wanted - before).abs().max() + 8 * eps * before.abs().max()
        if not (found - wanted).abs().max() <= allowed:
            raise ConfigError(
                f'{self._where} by {"add" if edit.factor is None else f"scale={edit.factor:g}"}: '
                f'what follows its last layer with weights, {self._kind}, changes the outcome (an '
                'activation, or a sum with its input); after a ReLU use zero=True or scale >= 0, '
                'or choose a layer inside of it'
            )

    def _last_layer(self) -> nn.Module:
        """The layer with weights that is run last; its weights' first dimension is the outputs."""
        experts = self.layer.experts
        if isinstance(experts, (LinearExperts, ConvExperts)):
            return experts
        if isinstance(experts, MLPExperts):
            return experts.layers[-1]
        if not isinstance(experts, ModuleExperts):
            raise ConfigError(
                f'{self._where}: known are LinearExperts, ConvExperts, MLPExperts and modules, '
                f'not {type(experts).__name__}'
            )
        ran: list[nn.Module] = []
        with ExitStack() as stack:
            for module in experts[self.expert].modules():
                hook = module.register_forward_hook(lambda module, *_: ran.append(module))
                stack.callback(hook.remove)
            self._contribution()
        last = next((m for m in reversed(ran) if any(True for _ in m.parameters(False))), None)
        weight = None if last is None else last._parameters.get('weight')
        is_norm = isinstance(last, _NORMS) and weight is not None and weight.dim() == 1
        if weight is None or not (is_norm or isinstance(last, (nn.Linear, *_CONVS))):
            raise ConfigError(
                f'{self._where}: its last layer with weights is '
                f'{"none" if last is None else type(last).__name__}, and has to be a linear layer, '
                'a convolution or an affine normalisation; choose a layer inside of it'
            )
        return last

    def _other_modules(self, model: nn.Module) -> list[nn.Module]:
        """All modules but those that are the expert's alone."""
        experts = self.layer.experts
        mine, others = experts.modules(), []
        if isinstance(experts, nn.ModuleList):
            mine = experts[self.expert].modules()
            others = [expert for e, expert in enumerate(experts) if e != self.expert]
        mine = set(mine).difference(*(other.modules() for other in others))
        return [module for module in model.modules() if module not in mine]

    def _contribution(self) -> Tensor:
        """What the expert makes of the same random inputs every time, in evaluation mode."""
        experts = self.layer.experts
        modes = {module: module.training for module in experts.modules()}
        experts.eval()
        try:
            x_T = self._inputs()
            ids = torch.full((len(x_T), 1), self.expert, device=x_T.device)
            dispatcher = Dispatcher(ids, x_T.new_ones(ids.shape), self.layer.num_experts)
            with explained(f'{self._where}: it does not run on inputs {tuple(x_T.shape)}'):
                return unpack(experts(x_T, dispatcher))[0]
        finally:
            for module, training in modes.items():
                module.training = training

    def _inputs(self) -> Tensor:
        layer = self.layer
        like = next(layer.experts.parameters())
        channels = layer.router.in_channels
        if layer.granularity == 'token':
            shape = (_PROBES, channels)
        elif layer.experts.take_vectors:
            shape = (_PROBES, like.shape[-1])
        elif layer.granularity == 'pixel':
            shape = (_PROBES, channels, 1, 1)
        elif any(
            isinstance(m, (ConvExperts, nn.modules.conv._ConvNd)) for m in layer.experts.modules()
        ):
            shape = (2, channels, 32, 32)
        else:
            shape = (2, _PROBES, channels)
        generator = torch.Generator().manual_seed(0)  # the program's random numbers stay its own
        return torch.randn(shape, generator=generator).to(like)


def _put(parameter: nn.Parameter, index: object, values: Tensor) -> None:
    with torch.no_grad():
        parameter[index].copy_(values)
