"""Experts spread over ranks train as those of one process.

Four processes are started once for all tests of this file; both worlds run :func:`play`.
"""

import pytest
import torch
from ranks import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mmdet_moe.moe as moe
from mmdet_moe.moe import expert_parallel

RANKS = 4
ITERATIONS = 20
C = 4


def make_experts(kind):
    if kind == 'modules':
        return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.GroupNorm(2, C), nn.Tanh())
    if kind == 'pixels':
        return moe.MLPExperts(C, 6, C, 8)
    return moe.ConvExperts(C, C, 3, 8, padding=1)


KINDS = {
    'modules': {},
    'convolutions': {},
    'patches': dict(granularity='patch', grid_size=2),
    'pixels': dict(granularity='pixel'),
}


class Model(nn.Module):
    def __init__(self, kind, parts, constraint):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, C, 1)
        router = moe.GAPRouter(C, 8, 2, noise=False, constraint=constraint)
        nn.init.normal_(router.fc.weight, std=3)
        nn.init.normal_(router.fc.bias)
        experts = make_experts(kind)
        self.moe = moe.MoELayer(experts, 8, 2, router, expert_parallel=parts, **KINDS[kind])
        self.head = nn.Linear(C, 2)

    def forward(self, x):
        return self.head(self.moe(self.stem(x)).mean((2, 3)))


def train(kind, parts, rank, world_size, constraint=None):
    """20 steps of two backward passes each, with clipping that clips."""
    model = Model(kind, parts, constraint).double()
    wrapped = model
    if world_size > 1:
        expert_parallel.keep_from_ddp(model)
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    loss = moe.ImportanceLoss(0.1)
    generator = torch.Generator().manual_seed(1)
    norms, outputs = [], None
    for _ in range(ITERATIONS):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
            y = wrapped(x.chunk(world_size)[rank])
            if outputs is None:
                outputs = y.detach()
            ((y - 1).square().mean() + loss(model.moe.routing)).backward()
        norms.append(expert_parallel.clip_grad_norm_(model.parameters(), 0.3))
        optimizer.step()
    with expert_parallel.all_experts(model):
        state = model.state_dict()
    here = sum(p.numel() for p in model.moe.experts.parameters())
    return {
        'outputs': outputs, 'norms': torch.stack(norms), 'state': state, 'here': here,
        'count': moe.count_parameters(model),
    }  # fmt: skip


def play(rank, world_size):
    results = {}
    for parts in (2, 4):
        for kind in KINDS:
            results[kind, parts] = train(kind, parts, rank, world_size)
        constraint = moe.RelativeImportanceConstraint(8, 0.1)
        results['constraint', parts] = train('modules', parts, rank, world_size, constraint)
    return results


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return run_on_ranks(play, RANKS, tmp_path_factory.mktemp('ranks'))


@pytest.fixture(scope='module')
def alone():
    return play(0, 1)


@pytest.mark.parametrize('parts', [2, 4])
@pytest.mark.parametrize('kind', [*KINDS, 'constraint'])
def test_trains_as_one_process(kind, parts, alone, ranks):
    expected = alone[kind, parts]
    assert (expected['norms'] > 0.3).any()
    outputs = torch.cat([rank[kind, parts]['outputs'] for rank in ranks])
    torch.testing.assert_close(outputs, expected['outputs'], rtol=0, atol=1e-12)
    for rank in ranks:
        assert list(rank[kind, parts]['state']) == list(expected['state'])
        # The state of a constraint is in single precision.
        tolerance = 1e-5 if kind == 'constraint' else 1e-9
        for name in ('norms', 'state'):
            torch.testing.assert_close(
                rank[kind, parts][name], expected[name], rtol=0, atol=tolerance
            )
        assert rank[kind, parts]['here'] * parts == expected['here']
        assert rank[kind, parts]['count'] == expected['count']
