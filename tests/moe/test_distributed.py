"""Two processes with four images each behave as one process with eight.

Both worlds run :func:`play`; the two processes are started once for all tests of this file.
"""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mmdet_moe.moe as moe
from mmdet_moe.moe.kmeans_start import by_clusters

LOSSES = {
    'importance': moe.ImportanceLoss(1.0),
    'kl': moe.KLLoss(1.0),
    'variance': moe.VarianceLoss(1.0),
    'switch': moe.SwitchLoss(1.0),
    'z': moe.RouterZLoss(1.0),
    'batch entropy': moe.EntropyLoss(1.0, over='batch'),
    'item entropy': moe.EntropyLoss(1.0, over='item'),
    'data sets': moe.DatasetLoss(1.0, sources=2),
    'importance within levels': moe.ImportanceLoss(1.0, within='level'),
}
CONSTRAINTS = {
    'relative': moe.RelativeImportanceConstraint,
    'mean': moe.MeanImportanceConstraint,
    'bias': moe.BiasBalancing,
}


def build(seed, num_experts=4, top_k=2, **kwargs):
    torch.manual_seed(seed)
    router = moe.GAPRouter(3, num_experts, top_k, noise=False, **kwargs)
    nn.init.normal_(router.fc.weight)
    experts = [nn.Conv2d(3, 2, 1) for _ in range(num_experts)]
    layer = moe.MoELayer(experts, num_experts, top_k, router, decision_weight='positives')
    return layer.double()


def gradients(layer):
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


def play(rank, world_size):
    """Everything that is compared; rank r of R takes the r-th part of every batch."""

    def part(x):
        return x.chunk(world_size)[rank]

    def wrap(layer):
        return DistributedDataParallel(layer) if dist.is_initialized() else layer

    results = {}
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(3, 8, 3, 4, 4, dtype=torch.float64, generator=generator)
    # Rank 0 holds most of what counts.
    counts = torch.tensor([5.0, 3, 0, 4, 0, 1, 0, 0]).double()

    for name, loss in LOSSES.items():
        layer = build(1)
        model = wrap(layer)
        y = model(part(data[0]))
        layer.weigh_decisions(part(counts))
        layer.routing.sources = tuple(part(torch.tensor([0, 1, 1, 0, 0, 0, 0, 1])).tolist())
        balancing = loss(layer.routing)
        (y.square().mean() + balancing).backward()
        results[name] = {'loss': balancing.detach(), **gradients(layer)}

    for name, make in CONSTRAINTS.items():
        layer = build(2, constraint=make(4))
        for x in data:
            layer(part(x))
            layer.weigh_decisions(part(counts))
        results[name] = dict(layer.router.constraint.state_dict())
        logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
        results[name]['decisions'] = layer.router.choose(logits, training=True)[0]

    layer = build(4)
    utilization = moe.Utilization(4)
    for x in data:
        layer(part(x))
        utilization.update(layer.routing, layer.router)
    scalars = utilization.report().scalars()
    results['utilization'] = {k: torch.tensor(v) for k, v in scalars.items()}

    for norm in ('ln', 'bn'):
        torch.manual_seed(7)
        layer = moe.CPMuMoE(3, 2, (4, 3), 2, norm=norm).double()
        model = wrap(layer)
        model(part(data[0]).flatten(2).mT).square().mean().backward()
        results[f'mumoe {norm}'] = gradients(layer)

    layer = build(8, normalise_levels=1)
    for x in data:
        layer([part(x)])
    results['normalised levels'] = dict(layer.router.norm.state_dict())

    x = part(items_of_four_kinds())
    results['kmeans'] = started_by_clusters(x[:2] if rank else x)  # too few for clusters of its own
    results['unused experts'] = train_with_unused_experts(wrap, part)
    return results


def items_of_four_kinds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 3, 1, 1, generator=generator) + 1
    x[:, 0] += 20 * (torch.arange(600) % 2).view(-1, 1, 1)
    x[:, 1] += 20 * (torch.arange(600) % 4 // 2).view(-1, 1, 1)
    return x.double()


def started_by_clusters(x):
    layer = build(9, init='kmeans')
    layer(x)
    return layer.router.fc.state_dict()


def train_with_unused_experts(wrap, part):
    """The first four images go to expert 0, the others to expert 1, none to expert 2."""
    layer = build(5, num_experts=3, top_k=1)
    layer.router.fc.weight.data = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 0, 0]]).double()
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(6)).double() + 1
    x[4:, 0] *= -1
    model, start = wrap(layer), {k: v.clone() for k, v in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    loads = []
    for _ in range(2):
        optimizer.zero_grad()
        model(part(x)).square().mean().backward()
        optimizer.step()
        loads.append(layer.routing.load())
    # The loads differ between the ranks by intent and are checked apart.
    return {'local loads': torch.stack(loads), 'start': start, **layer.state_dict()}


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    return run_on_ranks(play, 2, tmp_path_factory.mktemp('two_ranks'))


@pytest.fixture(scope='module')
def one_rank():
    return play(0, 1)


@pytest.mark.parametrize('name', LOSSES)
def test_losses_and_gradients(name, one_rank, two_ranks):
    expected = one_rank[name]
    assert expected['loss'].abs() > 1e-3
    assert expected['router.fc.weight'].abs().max() > 1e-3
    for rank in two_ranks:
        torch.testing.assert_close(rank[name], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', CONSTRAINTS)
def test_constraints(name, one_rank, two_ranks):
    expected = one_rank[name]
    assert next(iter(expected.values())).any()
    for rank in two_ranks:
        torch.testing.assert_close(rank[name], expected, rtol=1e-6, atol=1e-6)


def test_utilization(one_rank, two_ranks):
    for rank in two_ranks:
        torch.testing.assert_close(rank['utilization'], one_rank['utilization'], rtol=0, atol=1e-6)


def test_normalised_levels(one_rank, two_ranks):
    for rank in two_ranks:
        for key, value in one_rank['normalised levels'].items():
            torch.testing.assert_close(rank['normalised levels'][key], value)


def test_a_start_by_clusters_is_that_of_the_first_rank(two_ranks):
    """Of its items, normalised over those of all ranks."""
    items = items_of_four_kinds().flatten(1)[:302]  # the second rank had but two
    scale = (items.var(0, unbiased=False) + 1e-5).sqrt()
    torch.manual_seed(9)
    weight, bias = by_clusters(((items[:300] - items.mean(0)) / scale).numpy(), 4)
    for rank in two_ranks:
        torch.testing.assert_close(
            rank['kmeans']['weight'], torch.from_numpy(weight), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            rank['kmeans']['bias'], torch.from_numpy(bias), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize('norm', ['ln', 'bn'])
def test_multilinear_mixture(norm, one_rank, two_ranks):
    """Its gate, which starts at 0, gets gradients; batch statistics are those of each rank."""
    expected = one_rank[f'mumoe {norm}']
    first, second = (rank[f'mumoe {norm}'] for rank in two_ranks)
    assert all(gradient.any() for gradient in first.values())
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    if norm == 'ln':
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)


def test_unused_experts_train_without_hanging(one_rank, two_ranks):
    expected = one_rank['unused experts']
    loads = [rank['unused experts'].pop('local loads').tolist() for rank in two_ranks]
    assert loads == [[[4, 0, 0]] * 2, [[0, 4, 0]] * 2]
    assert expected['local loads'].tolist() == [[4, 4, 0]] * 2
    for key, start in expected['start'].items():
        first, second = (rank['unused experts'][key] for rank in two_ranks)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected[key], rtol=0, atol=1e-12)
        assert torch.equal(first, start) == ('experts.2' in key)
