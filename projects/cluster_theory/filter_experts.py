"""Two-layer convolutional networks as experts, whose filters see one position at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_moe.checks import check_integer, check_number
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.dispatcher import Dispatcher
from mmdet_moe.moe.experts.base import StackedExperts
from mmdet_moe.registry import MODELS

ACTIVATIONS = ('cubic', 'linear')


@MODELS.register_module()
class FilterExperts(StackedExperts):
    """``y_c = sum_j sum_p act(w_cj · x_p + b_cj)``: the experts of arXiv 2208.02813.

    Every class has filters of its own, which are applied to each position p of a feature map and
    summed over all of them: a convolution of stride and width d over a signal of P patches of d
    numbers each is a 1×1 convolution over the map (N, d, 1, P).

    Args:
        in_channels: d.
        num_classes: C', the outputs.
        num_filters: J, for each class.
        num_experts: E.
        activation: ``'cubic'`` (``z³``) or ``'linear'`` (none).
        init_scale: Factor on the initial weights and biases, which are those of ``nn.Linear``;
            above 0.

    Raises:
        ConfigError: If the activation is unknown, and for numbers out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_filters: int,
        num_experts: int,
        activation: str = 'cubic',
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_integer(owner, 'in_channels', in_channels, least=1)
        check_integer(owner, 'num_classes', num_classes, least=1)
        check_integer(owner, 'num_filters', num_filters, least=1)
        check_integer(owner, 'num_experts', num_experts, least=1)
        check_number(owner, 'init_scale', init_scale, above=0)
        if activation not in ACTIVATIONS:
            raise ConfigError(f'activation={activation!r} is unknown; use one of {ACTIVATIONS}')
        self.num_classes = num_classes
        self.activation = activation
        self.init_scale = init_scale
        outputs = num_classes * num_filters
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, in_channels))
        self.bias = nn.Parameter(torch.empty(num_experts, outputs))
        for e in range(num_experts):
            self.set_expert(e, self.dense())

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        _, outputs, in_channels = self.weight.shape
        filters = nn.Linear(in_channels, outputs)
        for parameter in filters.parameters():
            parameter *= self.init_scale
        return filters

    def forward(self, x_T: Tensor, dispatcher: Dispatcher) -> Tensor:
        """(T, d, H, W) to (T, C')."""
        x_TPC = x_T.flatten(2).transpose(1, 2)
        bias = self.bias
        if self.activation == 'linear':
            # The sum over the positions may then come first, which leaves one to be computed.
            bias = x_TPC.shape[1] * bias
            x_TPC = x_TPC.sum(1, keepdim=True)
        rows = dispatcher.split(dispatcher.dispatch(x_TPC))
        # With the experts without rows: so the weights of every expert have a gradient.
        experts = zip(rows, self.weight.unbind(), bias.unbind(), strict=True)
        return dispatcher.combine(torch.cat([self._compute(*expert) for expert in experts]))

    def _compute(self, x_RPC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = F.linear(x_RPC, weight, bias)
        y = (z.pow(3) if self.activation == 'cubic' else z).sum(1)
        return y.unflatten(1, (self.num_classes, -1)).sum(2)

    def receptive_field(self, in_channels: int) -> tuple[int, int]:
        raise ConfigError(
            "FilterExperts sum over the whole item, so that a patch's neighbours are out of their "
            'sight; use granularity="image"'
        )

    def extra_repr(self) -> str:
        num_experts, outputs, in_channels = self.weight.shape
        return (
            f'num_experts={num_experts}, in_channels={in_channels}, '
            f'num_classes={self.num_classes}, num_filters={outputs // self.num_classes}, '
            f'activation={self.activation!r}'
        )
