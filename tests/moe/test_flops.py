"""Counting floating-point operations."""

import torch
from torch import nn

from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.flops import count_flops


def test_formulas_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(200, 7)
    )
    model[1].eval()
    # Two for each multiplication and addition; 10×10 becomes 5×5.
    convolution, linear = 2 * 8 * 3 * 9 * 25, 2 * 200 * 7
    assert count_flops(model, torch.randn(2, 3, 10, 10)) == 2 * (convolution + linear)
    assert [part.training for part in model] == [True, False, True, True]


def test_nothing_is_computed_on_meta():
    with torch.device('meta'):
        assert count_flops(nn.Linear(10**6, 10**6), torch.empty(1, 10**6)) == 2 * 10**12


def test_only_active_experts_count():
    layer = MoELayer(nn.Conv2d(4, 4, 3, padding=1), num_experts=8, top_k=2, in_channels=4)
    one = 2 * 4 * 4 * 9 * 6 * 6
    router = 2 * 4 * 8
    assert count_flops(layer, torch.randn(1, 4, 6, 6)) == 2 * one + router


def test_attention_counts():
    """Also where PyTorch has one operator for it, on which its own counter is silent."""
    n, tokens, width = 2, 5, 8
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
    projections = 2 * n * tokens * (4 * width * width + 2 * width * 16)
    products = 2 * 2 * n * tokens * tokens * width
    assert count_flops(layer, torch.randn(n, tokens, width)) == projections + products
