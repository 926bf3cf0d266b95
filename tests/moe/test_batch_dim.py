"""Inputs (T, N, C): experts that mix what is along T, against each of them on single images."""

import copy

import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import GAPRouter, MoELayer, add_experts

T, N, C = 5, 6, 8


class Recurrent(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.gru = nn.GRU(C, C, batch_first=batch_first)

    def forward(self, x):
        return self.gru(x)[0]


class Gated(nn.Module):
    """Attention beside another sequence, in a structure; views need a contiguous input."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(C, 2)

    def forward(self, x, other, scale=1.0):
        y = self.attention(x.view(len(x), -1, C), other, other)[0]
        return {'y': y * scale}


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.takes_another = isinstance(layer, nn.TransformerDecoderLayer)

    def forward(self, x):
        return self.layer(x, x.flip(2)) if self.takes_another else self.layer(x)


class Mean(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.mean(0, keepdim=True)


MODULES = {
    'encoder': lambda first: nn.TransformerEncoderLayer(C, 2, 16, dropout=0.0, batch_first=first),
    'decoder': lambda first: nn.TransformerDecoderLayer(C, 2, 16, dropout=0.0, batch_first=first),
    'attention': lambda first: MultiheadAttention(C, 2, batch_first=first),
    'recurrent': Recurrent,
}


@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('name', MODULES)
def test_untrained_experts_are_the_dense_module(name, batch_first):
    dense = Model(MODULES[name](batch_first)).double().eval()
    moe, batch_dim = copy.deepcopy(dense), 0 if batch_first else 1
    options = {'in_channels': C, 'batch_dim': batch_dim, 'shared': 1}
    add_experts(moe, {'layer': options})
    nn.init.normal_(moe.layer.router.fc.weight, std=3.0)
    x = torch.randn(T, N, C, dtype=torch.float64)
    torch.testing.assert_close(moe(x), dense(x))
    assert moe.layer.routing.num_items == x.shape[batch_dim]
    assert len(set(moe.layer.routing.expert_ids.flatten().tolist())) > 1  # there is a choice

    other = copy.deepcopy(dense)
    message = rf'batch_dim={1 - batch_dim} says .*; set batch_dim={batch_dim}, or'
    with pytest.raises(ConfigError, match=message):
        add_experts(other, {'layer': {**options, 'batch_dim': 1 - batch_dim}})


@pytest.mark.parametrize('dense', [False, True])
def test_each_image_by_itself(dense, randomise):
    """Experts that differ, with another sequence and a number, beside them and around them."""
    experts = [Gated() for _ in range(3)]
    router = GAPRouter(C, 3, 2, noise=False)
    beside = {'shared': [Gated()], 'shortcut': Mean(C, C)}
    layer = randomise(MoELayer(experts, 3, 2, router, batch_dim=1, **beside)).double()
    x, other = torch.randn(2, T, N, C, dtype=torch.float64)
    logits = layer.router.fc(x.mean(0))
    kept = logits >= logits.topk(2).values[:, 1:]
    weights = logits.masked_fill(~kept, float('-inf')).softmax(1)
    expected = []
    for n in range(N):
        inputs = x[:, n : n + 1].contiguous(), other[:, n : n + 1].contiguous(), 0.5
        mixed = sum(weights[n, e] * layer.experts[e](*inputs)['y'] for e in range(3))
        beside = layer.shared[0](*inputs)['y']
        expected.append((mixed + beside) / 2 + layer.shortcut(inputs[0]))
    expected = torch.cat(expected, 1)
    called = torch.compile(layer.eval(), fullgraph=True, backend='eager') if dense else layer
    y = called(x, other, scale=0.5)['y']
    torch.testing.assert_close(y, expected)
    parameters = [*layer.experts.parameters(), *layer.router.fc.parameters()]
    gradients = [torch.autograd.grad(z.sin().sum(), parameters) for z in (y, expected)]
    torch.testing.assert_close(*gradients)


def test_tokens_with_another_and_a_shared_expert(randomise):
    """What stands beside the experts takes both tensors in one layout, though T is N."""

    class Sum(nn.Linear):
        def forward(self, x, other):
            return super().forward(x) + other

    layer = MoELayer(
        Sum(C, C), 2, 2, in_channels=C, granularity='token', batch_dim=1, shared=[Sum(C, C)]
    )
    layer = randomise(layer).double().eval()
    x, other = torch.randn(2, T, T, C, dtype=torch.float64)
    y = [expert(x, other) for expert in (*layer.experts, *layer.shared)]
    weights = layer.router.fc(x).softmax(2)
    expected = (weights[..., :1] * y[0] + weights[..., 1:] * y[1] + y[2]) / 2
    torch.testing.assert_close(layer(x, other), expected)


@pytest.mark.parametrize('other', [torch.tensor(2.0), torch.ones(N)], ids=['scalar', 'lengths'])
def test_another_tensor_without_items_is_refused_in_a_sentence(other):
    class Scaled(nn.Linear):
        def forward(self, x, other):
            return super().forward(x) * other

    layer = MoELayer(Scaled(C, C), 2, 2, in_channels=C, granularity='token', batch_dim=1)
    with pytest.raises(ConfigError, match=r'called with another tensor of shape'):
        layer(torch.randn(T, N, C), other)


class Last(nn.Module):
    def forward(self, x):
        return x[-1]


def test_refused():
    for granularity, grid_size in (('patch', 2), ('pixel', 1)):
        with pytest.raises(ConfigError, match=f"granularity='{granularity}' divides .*; leave"):
            MoELayer(
                nn.Conv2d(C, C, 1), 2, 1, in_channels=C, granularity=granularity,
                grid_size=grid_size, batch_dim=1,
            )  # fmt: skip
    layer = MoELayer(nn.Linear(C, C), 2, 1, in_channels=C, batch_dim=1)
    for shape in ((C, C), (C, C, C, C)):
        with pytest.raises(ConfigError, match=r'takes inputs \(T, N, C\), got \(8, 8'):
            layer(torch.randn(shape))
    layer = MoELayer([Last(), Last()], 2, 1, in_channels=C, batch_dim=1)
    with pytest.raises(ConfigError, match=r'an expert made \((\d), 8\) of N = \1 items'):
        layer(torch.randn(T, N, C))
