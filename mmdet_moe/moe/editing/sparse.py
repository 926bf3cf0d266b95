"""The weights behind the outputs of one sparse expert."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mmdet_moe.errors import ConfigError, explained
from mmdet_moe.moe.dispatcher import Dispatcher, unpack
from mmdet_moe.moe.editing.edit import Edit
from mmdet_moe.moe.experts import ConvExperts, LinearExperts, MLPExperts, ModuleExperts
from mmdet_moe.moe.layer import MoELayer

#: Vectors, or pixels, on which it is seen whether an edit did what it says.
_PROBES = 64
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_Last = LinearExperts | ConvExperts | nn.Linear | _ConvNd | _NormBase | nn.GroupNorm | nn.LayerNorm


class SparseExpert:
    """One expert of an MoE layer, and the weights behind its outputs.

    Those are the rows of its last layers: the linear layers, convolutions and affine normalisations
    behind which nothing with weights follows. There is one, or several whose outputs are summed
    (the end of a residual block, and the projection beside it).

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
        self._last = self._last_layers()
        self._names = ' and '.join(dict.fromkeys(type(last).__name__ for last in self._last))
        others = [value for m in self._other_modules(model) for value in m._parameters.values()]
        if any(value is last.weight for last in self._last for value in others):
            raise ConfigError(
                f'{self._where}: the weights of its last layer, {self._names}, are used elsewhere, '
                'too; choose a layer whose experts share none'
            )
        # Of experts in one stack the expert's part, of modules the whole.
        self._index = ... if isinstance(layer.experts, nn.ModuleList) else expert
        contribution = self._contribution()
        self._dim = -1 if contribution.dim() == 3 else 1
        #: How many outputs it has.
        self.num_outputs = contribution.shape[self._dim]
        for last in self._last:
            if (rows := last.weight[self._index].shape[0]) != self.num_outputs:
                raise ConfigError(
                    f'{self._where}: its last layer, {type(last).__name__}, has {rows} outputs, of '
                    f'which it makes {self.num_outputs}'
                )

    def apply(self, edit: Edit, undo: ExitStack) -> None:
        """Change the weights.

        Args:
            edit: What to change.
            undo: Told how to change them back.

        Raises:
            ConfigError: If the outcome is not the edit.
        """
        biases = [last.bias for last in self._last if last.bias is not None]
        if edit.factor is None and not biases:
            raise ConfigError(
                f'{self._where}: add={edit.add} needs a bias, which its last layer, {self._names}, '
                'has not; build it with bias=True, or use scale'
            )
        rows = slice(None) if edit.output is None else edit.output
        weights = [last.weight for last in self._last]
        changed = [*weights, *biases] if edit.factor is not None else biases[:1]
        old = [parameter[self._index].clone() for parameter in changed]
        for parameter, values in zip(changed, old, strict=True):
            undo.callback(_put, parameter, self._index, values)
        # In half precision the outcome would tell nothing but rounding.
        with _at_least_float32(self.layer.experts):
            before = self._contribution()
            for parameter in changed:
                values = parameter[self._index]
                if edit.factor is None:
                    values[rows] += edit.term
                else:
                    values[rows] *= edit.factor
            exact = [parameter[self._index].clone() for parameter in changed]
            wanted, found = edit.of(before, self._dim), self._contribution()
        for parameter, values, should in zip(changed, old, exact, strict=True):
            if (parameter[self._index] - should).norm() > (should - values).norm() / 2:
                raise ConfigError(
                    f'{self._where}: {parameter.dtype} rounds so small a change of its last '
                    f'layer, {self._names}, away; edit the model in float32'
                )
        eps = torch.finfo(before.dtype).eps
        allowed = eps**0.5 * (wanted - before).abs().max() + 8 * eps * before.abs().max()
        if not (found - wanted).abs().max() <= allowed:
            raise ConfigError(
                f'{self._where} by {"add" if edit.factor is None else f"scale={edit.factor:g}"}: '
                f'what follows its last layer, {self._names}, changes the outcome (an activation, '
                'or a sum with its input); after a ReLU use scale >= 0, after others zero=True, or '
                'choose a layer inside of it'
            )

    def _last_layers(self) -> Sequence[_Last]:
        """The layers with weights whose outputs reach the expert's through no other such layer."""
        experts = self.layer.experts
        if isinstance(experts, (LinearExperts, ConvExperts)):
            return [experts]
        if isinstance(experts, MLPExperts):
            return [experts.layers[-1]]
        if not isinstance(experts, ModuleExperts):
            raise ConfigError(
                f'{self._where}: known are LinearExperts, ConvExperts, MLPExperts and modules, '
                f'not {type(experts).__name__}'
            )
        ends: list[tuple[nn.Module, Tensor]] = []

        def cut(module: nn.Module, _: tuple, y: Any) -> Tensor | None:
            if not isinstance(y, Tensor):
                return None
            ends.append((module, y.detach().requires_grad_()))
            return ends[-1][1].clone()  # a later layer may work in place

        with ExitStack() as stack:
            for module in experts[self.expert].modules():
                if any(True for _ in module.parameters(recurse=False)):
                    stack.callback(module.register_forward_hook(cut).remove)
            with torch.enable_grad():
                total = self._contribution().sum()
        grads: Sequence[Tensor | None] = [None] * len(ends)
        if total.requires_grad and ends:
            grads = torch.autograd.grad(total, [y for _, y in ends], allow_unused=True)
        found = zip(ends, grads, strict=True)
        last: list[_Last] = []
        for module in dict.fromkeys(m for (m, _), grad in found if grad is not None):
            weight = module._parameters.get('weight')
            if weight is not None and (
                isinstance(module, nn.Linear)
                or (isinstance(module, _ConvNd) and not module.transposed)
                or (isinstance(module, _NORMS) and weight.dim() == 1)
            ):
                last.append(module)
                continue
            raise ConfigError(
                f'{self._where}: its last layer with weights is {type(module).__name__}, and '
                'has to be a linear layer, a convolution or an affine normalisation; choose a '
                'layer inside of it'
            )
        if not last:
            raise ConfigError(f'{self._where}: nothing in it has weights')
        return last

    def _other_modules(self, model: nn.Module) -> list[nn.Module]:
        """All modules but those that are the expert's alone."""
        experts = self.layer.experts
        mine = set(experts.modules())
        if isinstance(experts, nn.ModuleList):
            others = [expert for e, expert in enumerate(experts) if e != self.expert]
            mine = set(experts[self.expert].modules()).difference(*(o.modules() for o in others))
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
        like = next(layer.experts.parameters(), torch.empty(0))
        channels = layer.router.in_channels
        shape: tuple[int, ...]
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


@contextmanager
def _at_least_float32(module: nn.Module) -> Iterator[None]:
    """Inside, what is in half precision is in float32; then it is rounded to what it was."""
    tensors = (*module.parameters(), *module.buffers())
    halves = [(t, t.dtype) for t in tensors if t.is_floating_point() and t.dtype.itemsize < 4]
    for tensor, _ in halves:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


def _put(parameter: Tensor, index: EllipsisType | int, values: Tensor) -> None:
    with torch.no_grad():
        parameter[index].copy_(values)
