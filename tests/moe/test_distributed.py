"""Two processes with four images each behave as one process with eight.

Both worlds run :func:`play`; the two processes are started once for all tests of this file.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mmdet_moe.moe as moe
from mmdet_moe.moe.distributed import own_random
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


def build(seed, num_experts=4, top_k=2, options=None, **kwargs):
    torch.manual_seed(seed)
    router = moe.GAPRouter(3, num_experts, top_k, noise=False, **kwargs)
    nn.init.normal_(router.fc.weight)
    experts = [nn.Conv2d(3, 2, 1) for _ in range(num_experts)]
    options = {'decision_weight': 'positives', **(options or {})}
    layer = moe.MoELayer(experts, num_experts, top_k, router, **options)
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
    levels = moe.Utilization(4)
    calls = [[data[0][:4]], [data[0][4:8], data[1][:4]]]  # one level, and two: a rank has either
    for maps in calls if world_size == 1 else [calls[rank % 2]] if rank < 2 else []:
        layer(maps)
        levels.update(layer.routing, layer.router)
    results['numbers of levels'] = {'shares': torch.tensor(levels.report().level_shares)}

    for norm in ('ln', 'bn'):
        torch.manual_seed(7)
        layer = moe.CPMuMoE(3, 2, (4, 3), 2, norm=norm).double()
        model = wrap(layer)
        model(part(data[0]).flatten(2).mT).square().mean().backward()
        results[f'mumoe {norm}'] = gradients(layer)

    layer = build(8, normalise_levels=1)
    for x in data:
        layer([part(x)])
    for x in data:  # all calls of a pass count as one batch
        layer.begin()
        for calls in (x, 5 - 2 * x):
            layer([part(calls)])
        layer.end()
    results['normalised levels'] = dict(layer.router.norm.state_dict())

    x = part(items_of_four_kinds())
    results['kmeans'] = started_by_clusters(x[:2] if rank else x)  # too few for clusters of its own
    results['unused experts'] = train_with_unused_experts(wrap, part)
    for name in (*LOSSES, *CONSTRAINTS):
        results[f'{name} trained'] = train(name, wrap, part)
    for way, shard in SHARDINGS.items():
        results[way] = train_with_unused_experts(shard if world_size > 1 else wrap, part)
    torch.manual_seed(11)
    router = moe.GAPRouter(3, 4, 2).train()
    for name in ('normal', 'uniform'):
        noise = torch.randn if name == 'normal' else torch.rand
        results[f'{name} noise'] = own_random(noise, torch.empty(1000, dtype=torch.float64))
    results['noisy weights'] = router(data[0, :4].float()).weights.detach()
    options = dict(granularity='patch', grid_size=2, whole_maps=True)
    shard = shard_each if world_size > 1 else wrap
    results['each expert on whole maps'] = train_with_unused_experts(shard, part, options)
    return results


def train(name, wrap, part):
    """20 steps of two backward passes each; nobody likes the last of five experts."""
    loss, constraint = LOSSES.get(name), CONSTRAINTS.get(name)
    layer = build(10, num_experts=5, constraint=constraint and constraint(5))
    layer.router.fc.bias.data[-1] = -100
    model = wrap(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(12)
    losses = []
    for _ in range(20):
        for is_last in (False, True):
            x = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=generator)
            counts = torch.randint(6, (8,), generator=generator).double()
            synced = nullcontext() if is_last or model is layer else model.no_sync()
            with synced:
                y = model(part(x))
                layer.weigh_decisions(part(counts))
                layer.routing.sources = tuple(part(torch.arange(8) % 2).tolist())
                balancing = y.new_zeros(()) if loss is None else 0.1 * loss(layer.routing)
                ((y - 1).square().mean() + balancing).backward()
            losses.append(balancing.detach())
        # A hard constraint forbids others until its turn comes.
        assert constraint is not None or not layer.experts[4].weight.grad.any()
        optimizer.step()
        optimizer.zero_grad()
    return {'losses': torch.stack(losses), **layer.state_dict()}


def shard_whole(layer):
    return fully_shard(layer)


def shard_each(layer):
    for expert in layer.experts:
        fully_shard(expert)
    return fully_shard(layer)


def shard_experts(layer):
    fully_shard(layer.router)
    fully_shard(layer.experts)
    return fully_shard(layer)


SHARDINGS = {'whole': shard_whole, 'each expert': shard_each, 'all experts': shard_experts}


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


def train_with_unused_experts(wrap, part, options=None):
    """The first four images go to expert 0, the others to expert 1, none to expert 2."""
    layer = build(5, num_experts=3, top_k=1, options=options)
    layer.router.fc.weight.data = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 0, 0]]).double()
    x = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(6)).double() + 1
    x[4:, 0] *= -1
    start = {k: v.clone() for k, v in layer.state_dict().items()}
    model = wrap(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    loads = []
    for _ in range(2):
        optimizer.zero_grad()
        model(part(x)).square().mean().backward()
        optimizer.step()
        loads.append(layer.routing.load())
    # The loads differ between the ranks by intent and are checked apart.
    end = {
        k: v.full_tensor() if hasattr(v, 'full_tensor') else v
        for k, v in layer.state_dict().items()
    }
    return {'local loads': torch.stack(loads), 'start': start, **end}


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


@pytest.mark.parametrize('what', ['utilization', 'numbers of levels'])
def test_utilization(what, one_rank, two_ranks):
    for rank in two_ranks:
        torch.testing.assert_close(rank[what], one_rank[what], rtol=0, atol=1e-6)


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


@pytest.mark.parametrize('name', [*LOSSES, *CONSTRAINTS])
def test_trained_for_20_iterations(name, one_rank, two_ranks):
    """With two backward passes for each step, and an expert that nobody chooses."""
    expected = one_rank[f'{name} trained']
    for rank in two_ranks:
        torch.testing.assert_close(rank[f'{name} trained'], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('way', ['unused experts', *SHARDINGS, 'each expert on whole maps'])
def test_ranks_that_choose_different_experts(way, one_rank, two_ranks):
    """Neither data parallelism nor shards of single experts let ranks wait for ever."""
    expected = one_rank[way]
    loads = [rank[way].pop('local loads').tolist() for rank in two_ranks]
    n = 16 if 'maps' in way else 4  # items of a rank
    assert loads == [[[n, 0, 0]] * 2, [[0, n, 0]] * 2]
    assert expected['local loads'].tolist() == [[n, n, 0]] * 2
    for key, start in expected['start'].items():
        first, second = (rank[way][key] for rank in two_ranks)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected[key], rtol=0, atol=1e-12)
        assert torch.equal(first, start) == ('experts.2' in key)


def test_noise_differs_between_ranks(one_rank, two_ranks):
    """Although both have the same seed; that of the first rank is that of one process."""
    for name, mean, std in (('normal', 0, 1), ('uniform', 0.5, 12**-0.5)):
        first, second = (rank[f'{name} noise'] for rank in two_ranks)
        assert torch.equal(first, one_rank[f'{name} noise'])
        assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.1
        for noise in (first, second):
            assert abs(noise.mean() - mean) < 0.15
            assert abs(noise.std() - std) < 0.1
    first, second = (rank['noisy weights'] for rank in two_ranks)
    assert not torch.equal(first, second)
