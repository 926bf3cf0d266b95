"""Active, worst and all FLOPs and parameters, against counts by hand."""

import pytest
import torch
from torch import nn

from mmdet_moe.moe import CPMuMoE, MoELayer, add_experts
from mmdet_moe.moe.surgery.costs import cost_table, costs_of

#: A 3×3 convolution from 4 to 4 channels, in FLOPs for each pixel and in parameters.
CONV, WEIGHTS = 2 * 4 * 4 * 9, 4 * 4 * 9 + 4
ROUTERS_OWN = 4 * 5 + 5 + 4 * 5  # of 5 experts: weights, bias, noise


def model(**options):
    """A stem and a layer of 5 experts."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1))
    add_experts(model, {'1': {'num_experts': 5, 'top_k': 2, **options}})
    return model


def test_one_decision_for_the_image():
    layer, whole = costs_of(net := model(), lambda: net(torch.randn(1, 3, 6, 6)))
    router = 2 * 4 * 5
    assert layer.row.dense_flops == CONV * 36
    assert layer.row.flops == layer.worst_flops == 2 * CONV * 36 + router
    assert layer.all_flops == 5 * CONV * 36 + router
    assert (layer.row.dense, layer.row.active) == (WEIGHTS, 2 * WEIGHTS + ROUTERS_OWN)
    assert layer.worst == layer.row.active
    assert layer.row.total == 5 * WEIGHTS + ROUTERS_OWN
    stem = 2 * 3 * 4 * 36
    assert whole.all_flops == stem + layer.all_flops
    assert whole.worst_flops == stem + layer.worst_flops
    assert whole.worst == 3 * 4 + 4 + layer.worst


@pytest.mark.parametrize(('side', 'used'), [(6, 5), (1, 2)])
def test_whole_maps_compute_what_anybody_chose(side, used):
    """Of 4 decisions any of the 5 experts may be among the chosen, of one decision 2 are."""
    net = model(granularity='patch', grid_size=2, whole_maps=True)
    with torch.no_grad():
        net[1].router.fc.weight.zero_()  # all decisions are alike
    layer, _ = costs_of(net, lambda: net(torch.randn(1, 3, side, side)))
    # Also the means over patches, and the weights of the experts at every pixel.
    router = layer.row.flops - 2 * CONV * side**2
    assert layer.worst_flops == used * CONV * side**2 + router
    assert layer.all_flops == 5 * CONV * side**2 + router
    assert layer.worst == used * WEIGHTS + ROUTERS_OWN


def test_experts_that_are_not_alike():
    convs = [nn.Conv2d(4, 4, k, padding=k // 2, bias=False) for k in (1, 5, 3)]
    net = nn.Sequential(MoELayer(convs, 3, 1, {'softmax': 'straight_through'}, in_channels=4))
    with torch.no_grad():
        net[0].router.fc.bias.copy_(torch.tensor([5.0, 0, 0]))  # the cheapest
    layer, whole = costs_of(net, lambda: net(torch.randn(1, 4, 6, 6)))
    router, own = 2 * 4 * 3, 4 * 3 + 3 + 4 * 3
    conv = 2 * 4 * 4 * 36
    assert layer.row.flops == conv + router
    assert layer.worst_flops == 25 * conv + router
    assert layer.all_flops == whole.all_flops == (1 + 25 + 9) * conv + router
    assert layer.worst == 16 * 25 + own
    assert layer.row.total == 16 * 35 + own


def test_all_experts_of_a_mumoe_take_part():
    net = nn.Sequential(CPMuMoE(4, 3, 8, rank=2, norm='ln'))
    layer, whole = costs_of(net, lambda: net(torch.randn(1, 4)))
    assert layer.row.flops == layer.worst_flops == layer.all_flops == whole.all_flops > 0
    assert layer.row.active == layer.worst == layer.row.total == whole.worst
    assert cost_table([layer, whole]).splitlines()[1].split()[3:5] == ['all', 'token']


def test_the_model_stays_as_it_was():
    net = model().train()
    costs_of(net, lambda: net(torch.randn(1, 3, 6, 6)))
    assert net[1].training
    assert not net[1].router._forward_hooks
    with pytest.raises(RuntimeError, match='has not been run yet'):
        net[1].routing  # noqa: B018
