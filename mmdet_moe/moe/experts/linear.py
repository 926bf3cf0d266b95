"""Linear layers and multilayer perceptrons as experts, whose items are vectors."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.dispatcher import Dispatcher, EveryExpert
from mmdet_moe.moe.experts.base import StackedExperts
from mmdet_moe.moe.precision import autocast
from mmdet_moe.registry import MODELS, build


class VectorExperts(StackedExperts):
    """Base class of experts on vectors: an item of any shape (T, ...) is flattened to (T, C).

    Items are copied to their experts and back once, however many layers an expert has.
    """

    take_vectors = True

    @abstractmethod
    def compute(self, x_R: Tensor, dispatcher: Dispatcher) -> Tensor:
        """Every expert on its own rows: (R, C) to (R, C'), in the order of the experts."""

    def forward(self, x_T: Tensor, dispatcher: Dispatcher) -> Tensor:
        vectors_T = x_T.flatten(1)
        in_features = next(self.parameters()).shape[-1]
        if vectors_T.shape[1] != in_features:
            raise ValueError(
                f'{type(self).__name__} take items of in_features={in_features} numbers, but an '
                f'item of shape {tuple(x_T.shape[1:])} has {vectors_T.shape[1]}'
            )
        # Cast before the copying: half the bytes.
        x_R = dispatcher.dispatch(autocast(vectors_T))
        return dispatcher.combine(self.compute(x_R, dispatcher))

    def receptive_field(self, in_channels: int) -> tuple[int, int]:
        raise ConfigError(
            f'{type(self).__name__} take an item as one vector, so that its neighbours are out of '
            'their sight; use granularity="image", "pixel" or "token"'
        )


@MODELS.register_module()
class LinearExperts(VectorExperts):
    """E linear layers; for pixels, E 1×1 convolutions.

    Args:
        in_features: C, the numbers of one item: C·h·w for feature maps (C, h, w) as items.
        out_features: C'.
        num_experts: E.
        bias: Whether they have a bias.
        init_cfg: MMEngine's initialisation of one expert, seen as an ``nn.Linear``. Default: that
            of ``nn.Linear`` itself. Each expert draws its own values.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        bias: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        stacked = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self.register_parameter('bias', stacked)
        for e in range(num_experts):
            self.set_expert(e, self.dense())

    def dense(self) -> nn.Linear:
        _, out_features, in_features = self.weight.shape
        return nn.Linear(in_features, out_features, self.bias is not None)

    def compute(self, x_R: Tensor, dispatcher: Dispatcher) -> Tensor:
        return grouped_linear(x_R, self.weight, self.bias, dispatcher)

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return (
            f'num_experts={num_experts}, in_features={in_features}, out_features={out_features}, '
            f'bias={self.bias is not None}'
        )


@MODELS.register_module()
class MLPExperts(VectorExperts):
    """E multilayer perceptrons: linear layers with an activation in between.

    One expert's entries are called as the linear layers of an ``nn.ModuleList`` (``0.weight``,
    ``0.bias``, ``1.weight``, …), such as ``shared_fcs`` of MMDetection's RoI heads.

    Args:
        in_features: C, the numbers of one item: C·h·w for feature maps (C, h, w) as items.
        hidden_features: Outputs of the hidden layer, or of each of several hidden layers.
        out_features: C'.
        num_experts: E.
        bias: Whether the layers have biases.
        activation: Name (``'ReLU'``) or config of a module without parameters.
        activate_last: Whether the activation follows the last layer, too.
        init_cfg: MMEngine's initialisation of one expert, seen as an ``nn.ModuleList`` of
            ``nn.Linear``. Default: that of ``nn.Linear`` itself. Each expert draws its own values.

    Raises:
        ConfigError: If the activation has parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int,
        num_experts: int,
        bias: bool = True,
        activation: str | dict = 'ReLU',
        activate_last: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        hidden = [hidden_features] if isinstance(hidden_features, int) else hidden_features
        features = [in_features, *hidden, out_features]
        self.num_layers = len(features) - 1
        for i, (inputs, outputs) in enumerate(pairwise(features)):
            self.add_module(str(i), LinearExperts(inputs, outputs, num_experts, bias))
        config = {'type': activation} if isinstance(activation, str) else activation
        self.activation = build(config)
        if any(True for _ in self.activation.parameters()):
            raise ConfigError(
                f'activation={activation!r} has parameters, which all experts would share; use one '
                "without, such as 'ReLU'"
            )
        self.activate_last = activate_last

    @property
    def layers(self) -> list[LinearExperts]:
        """The linear layers, first to last."""
        return [layer for layer in self.children() if isinstance(layer, LinearExperts)]

    def dense(self) -> nn.ModuleList:
        return nn.ModuleList(layer.dense() for layer in self.layers)

    def compute(self, x_R: Tensor, dispatcher: Dispatcher) -> Tensor:
        for i, layer in enumerate(self.layers):
            x_R = layer.compute(x_R, dispatcher)
            if self.activate_last or i < self.num_layers - 1:
                x_R = self.activation(x_R)
        return x_R


def grouped_linear(
    x_R: Tensor, weight: Tensor, bias: Tensor | None, dispatcher: Dispatcher
) -> Tensor:
    """``W_e x_r + b_e`` for the rows r of each expert e, as one grouped matrix product.

    Args:
        x_R: Rows in the order of the experts, (R, in).
        weight: (E, out, in).
        bias: (E, out).
        dispatcher: Whose rows they are.

    Returns:
        (R, out), under autocast of its dtype.
    """
    weight = dispatcher.cast(weight)
    if isinstance(dispatcher, EveryExpert):
        y = autocast(x_R).unflatten(0, (len(weight), -1)) @ weight.transpose(1, 2)
        return (y if bias is None else y + bias[:, None].to(y.dtype)).flatten(0, 1)
    y_R = _grouped_product(autocast(x_R), weight, dispatcher)
    return y_R if bias is None else _AddBias.apply(y_R, bias.to(y_R.dtype), dispatcher.bounds)


def _grouped_product(x_R: Tensor, weight: Tensor, dispatcher: Dispatcher) -> Tensor:
    """``W_e x_r`` for the rows r of each expert e: (R, in) and (E, out, in) to (R, out)."""
    if _grouped_mm_serves(x_R, weight, dispatcher):
        ends = dispatcher.offsets[1:].to(torch.int32)
        return F.grouped_mm(x_R, weight.transpose(1, 2), offs=ends)
    rows = dispatcher.split(x_R)
    # With the empty ones: so the weights of every expert have a gradient.
    return torch.cat([x @ w.T for x, w in zip(rows, weight.unbind(), strict=True)])


def _grouped_mm_serves(x_R: Tensor, weight: Tensor, dispatcher: Dispatcher) -> bool:
    """Whether ``grouped_mm`` takes these operands and those of its backward pass, and is no slower.

    It came with PyTorch 2.10, knows no float64, and wants every row to start at a multiple of 16
    bytes. On a GPU it is more than a loop only for bfloat16 from Hopper on; its backward pass has
    hung or given wrong gradients there for experts without rows (PyTorch's issues 152668, 172439).
    """
    aligned = 16 // weight.itemsize
    if (
        not hasattr(F, 'grouped_mm')
        or x_R.dtype != weight.dtype
        or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or x_R.shape[0] == 0
        or dispatcher.is_whole  # one product, of rows that may lie anyhow
        or any(n % aligned for n in (*weight.shape[1:], weight.storage_offset()))
    ):
        return False
    if x_R.device.type == 'cuda':
        return (
            weight.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(x_R.device) >= (9, 0)
            and len(weight) < 1024
            and all(start < stop for start, stop in pairwise(dispatcher.bounds))
        )
    return x_R.device.type == 'cpu'


class _AddBias(torch.autograd.Function):
    """Adds each expert's bias to its rows, in place: (R, C) and (E, C) to (R, C).

    Spelled out, because a row of biases for every row of outputs would be as large as they are.
    """

    @staticmethod
    def forward(ctx, y_R: Tensor, bias: Tensor, bounds: list[int]) -> Tensor:
        ctx.bounds = bounds
        ctx.mark_dirty(y_R)
        for e, (start, stop) in enumerate(pairwise(bounds)):
            y_R[start:stop] += bias[e]
        return y_R

    @staticmethod
    def backward(ctx, grad_R: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = torch.stack([grad_R[a:b].sum(0) for a, b in pairwise(ctx.bounds)])
        return grad_R, grad_bias, None
