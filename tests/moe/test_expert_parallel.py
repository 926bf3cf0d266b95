"""Experts spread over ranks train as those of one process.

Four processes are started once for all tests of this file; both worlds run :func:`play`.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModule
from ranks import run_on_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mmdet_moe.moe as moe
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import expert_parallel
from research.benchmarks.scaling import exchanged_bytes, reduced_bytes

RANKS = 4
C = 4


def make_experts(kind):
    if kind == 'modules':
        return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.GroupNorm(2, C), nn.Tanh())
    if kind == 'batch norm':
        return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C))
    if kind == 'pixels':
        return moe.MLPExperts(C, 6, C, 8)
    return moe.ConvExperts(C, C, 3, 8, padding=1)


KINDS = {
    'modules': {},
    'convolutions': {},
    'patches': dict(granularity='patch', grid_size=2),
    'pixels': dict(granularity='pixel'),
    'batch norm': {},
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
    """Steps of two backward passes each, with clipping that clips."""
    model = Model(kind, parts, constraint).double()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    loss = moe.ImportanceLoss(0.1)
    generator = torch.Generator().manual_seed(1)
    norms, outputs = [], None
    for _ in range(20 if kind == 'modules' else 4):
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
    here = sum(p.numel() for p in model.moe.experts.parameters() if p.requires_grad)
    return {
        'outputs': outputs, 'norms': torch.stack(norms), 'state': state, 'here': here,
        'count': moe.count_parameters(model),
    }  # fmt: skip


def play(rank, world_size):
    results = {}
    for parts in (2, 4):
        for kind in KINDS:
            if kind == 'batch norm' and parts < RANKS:
                continue  # whose statistics are those of each group of ranks
            results[kind, parts] = train(kind, parts, rank, world_size)
        constraint = moe.RelativeImportanceConstraint(8, 0.1)
        results['constraint', parts] = train('modules', parts, rank, world_size, constraint)
        results['uneven', parts] = uneven_ranks(parts, rank, world_size)
        for init in ('shared', 'independent'):
            results[init, parts] = initialise(init, parts)
        results['tokens', parts] = tokens_with_another(parts, rank, world_size)
        results['sequences', parts] = sequences(parts, rank, world_size)
    if world_size > 1:
        results['own seeds'] = {i: begin(i, rank) for i in ('shared', 'independent')}
        results['refused'] = refusals()
        results['copied'] = norms_of_a_copy()
        results['bytes'] = {parts: count_bytes(parts) for parts in (2, 4)}
    return results


def begin(init, rank):
    torch.manual_seed(rank)
    experts = moe.ConvExperts(C, C, 1, 4)
    layer = moe.MoELayer(experts, 4, 2, in_channels=C, expert_init=init, expert_parallel=2)
    with expert_parallel.all_experts(layer):
        state = copy.deepcopy(layer.state_dict())
    return {name: value for name, value in state.items() if name.startswith('experts.')}


def wrap(model):
    expert_parallel.keep_from_ddp(model)
    return DistributedDataParallel(model) if dist.is_initialized() else model


def weights_after_a_step(model):
    torch.optim.SGD(model.parameters(), lr=1).step()
    with expert_parallel.all_experts(model):
        return copy.deepcopy(model.state_dict())


def uneven_ranks(parts, rank, world_size):
    """Maps of other sizes on other ranks, one of which has no images, and a frozen expert."""
    model = Model('modules', parts, None).double()
    experts = model.moe.experts
    if getattr(experts, 'first', 0) == 0:
        next(experts.parameters()).requires_grad_(False)
    wrapped = wrap(model)
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, 3, 4, 4), (2, 3, 6, 5), (1, 3, 4, 4), (0, 3, 4, 4)]
    xs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    if world_size > 1:
        wrapped(xs[rank]).square().sum().backward()
    else:
        (sum(model(x).square().sum() for x in xs) / RANKS).backward()
    return weights_after_a_step(model)


def initialise(init, parts):
    """By MMEngine, of what `add_experts` put into a model."""
    torch.manual_seed(3)
    model = Net()
    entry = dict(num_experts=4, top_k=2, expert_parallel=parts, expert_init=init)
    moe.add_experts(model, {'conv': entry, 'block': entry}, router=dict(noise=False))
    model.init_weights()
    with expert_parallel.all_experts(model):
        state = copy.deepcopy(model.state_dict())
    experts = moe.ConvExperts(C, C, 1, 4, init_cfg=dict(type='Normal', layer='Conv2d', std=1.0))
    layer = moe.MoELayer(experts, 4, 2, in_channels=C, expert_init=init, expert_parallel=parts)
    layer.init_weights()
    with expert_parallel.all_experts(layer):
        by_itself = copy.deepcopy(layer.state_dict())
    # Into fresh weights, and a dense checkpoint into experts.
    torch.manual_seed(4)
    other = Net()
    moe.add_experts(other, {'conv': entry, 'block': entry}, router=dict(noise=False))
    other.load_state_dict(state)
    with expert_parallel.all_experts(other):
        again = other.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    other.load_state_dict(Net().state_dict(), strict=False)
    with expert_parallel.all_experts(other):
        return {'state': state, 'by itself': by_itself, 'from dense': other.state_dict()}


class Net(BaseModule):
    def __init__(self):
        super().__init__(init_cfg=dict(type='Normal', layer='Conv2d', std=1.0))
        self.conv = nn.Conv2d(3, C, 1)
        self.block = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, x, other, scale=1):
        return {'y': self.fc(x) * other * scale}


def tokens_with_another(parts, rank, world_size):
    """Experts that take two tensors and a number, and return a structure."""
    torch.manual_seed(5)
    router = moe.GAPRouter(C, 4, 2, noise=False)
    nn.init.normal_(router.fc.weight)
    layer = moe.MoELayer(Gated(), 4, 2, router, granularity='token', expert_parallel=parts)
    wrapped = wrap(layer.double())
    x, other = torch.randn(2, 8, 5, C, generator=torch.Generator().manual_seed(6)).double()
    x, other = (t.chunk(world_size)[rank] for t in (x, other))
    wrapped(x, other, scale=2)['y'].square().mean().backward()
    return weights_after_a_step(layer)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(C, C)

    def forward(self, x):
        return self.gru(x)[0]


def sequences(parts, rank, world_size):
    """Experts that take (T, N, C)."""
    torch.manual_seed(7)
    router = moe.GAPRouter(C, 4, 2, noise=False)
    nn.init.normal_(router.fc.weight, std=3)
    layer = moe.MoELayer(Recurrent(), 4, 2, router, batch_dim=1, expert_parallel=parts).double()
    wrapped = wrap(layer)
    x = torch.randn(5, 8, C, generator=torch.Generator().manual_seed(8)).double()
    wrapped(x.chunk(world_size, 1)[rank]).square().mean().backward()
    return weights_after_a_step(layer)


def refusals():
    """The sentences, with which all ranks stop."""
    sentences = {}

    def refused(name, action):
        with pytest.raises(ConfigError) as caught:
            action()
        sentences[name] = str(caught.value)

    x = torch.randn(2, 3, 4, 4)
    refused(
        'world', lambda: moe.MoELayer(nn.Conv2d(C, C, 1), 3, 1, in_channels=C, expert_parallel=3)
    )
    refused('state', Model('modules', 2, None).state_dict)
    whole = Model('modules', 2, None).eval()
    refused('export', lambda: torch.jit.trace(whole, x, check_trace=False))
    refused('DDP', lambda: DistributedDataParallel(Model('modules', 2, None))(x))
    # As MMEngine does it; the experts of a part that a preset has put in are named in that part.
    preset = nn.Sequential(Model('modules', 2, None))
    expert_parallel.keep_from_ddp(preset[0])
    ddp = DistributedDataParallel(preset, broadcast_buffers=False)
    refused('preset', lambda: ddp(x))
    unequal = nn.ModuleList([nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)])
    refused('unequal', lambda: moe.MoELayer(unequal, 2, 1, in_channels=C, expert_parallel=2))
    frozen = Model('modules', 2, None)
    frozen.moe.experts.local.requires_grad_(dist.get_rank() % 2 == 1)
    refused('frozen', lambda: wrap(frozen)(x))
    start = nn.Sequential(nn.Conv2d(3, C, 1), nn.Conv2d(C, C, 1))
    moe.add_experts(start, {'1': dict(num_experts=2, top_k=2)}, router=dict(init='kmeans'))
    refused('k-means', lambda: fully_shard(start)(x))
    refused('FSDP', lambda: fully_shard(Model('modules', 2, None))(x))
    model = Model('modules', 2, None)
    own = set(expert_parallel.expert_parameters(model))
    fully_shard(model, ignored_params=own)(x).sum().backward()
    assert all(p.grad is not None for p in own if p.requires_grad)
    return sentences


def norms_of_a_copy():
    model = Model('modules', 2, None)
    model(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(9))).sum().backward()
    twin = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = parameter.grad
    twin(torch.randn(2, 3, 4, 4))  # nobody has replaced its parameters
    return [expert_parallel.clip_grad_norm_(m.parameters(), 1e9).item() for m in (model, twin)]


def count_bytes(parts):
    """Bytes that this rank sent to others in a step, and the rows that it had computed there."""
    model = Model('modules', parts, None)
    wrapped, sent = wrap(model), {'exchanged': 0, 'reduced': 0, 'replicas': 0}

    def count(state, bucket):
        sent['reduced'] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    def all_to_all_single(output, input, received=None, splits=None, group=None):
        if splits is not None:
            here = splits[dist.get_rank(group)]
            sent['exchanged'] += (input.numel() - here) * input.itemsize
        return kept_all_to_all(output, input, received, splits, group=group)

    def all_reduce(tensor, *args, **kwargs):
        is_of_replicas = dist.get_world_size(kwargs['group']) < RANKS
        sent['replicas'] += tensor.nbytes if is_of_replicas else 0
        return kept_all_reduce(tensor, *args, **kwargs)

    wrapped.register_comm_hook(None, count)
    x = torch.randn(8, 3, 4, 4)
    wrapped(x)  # checks that nothing has moved the weights
    kept_all_to_all, kept_all_reduce = dist.all_to_all_single, dist.all_reduce
    dist.all_to_all_single, dist.all_reduce = all_to_all_single, all_reduce
    try:
        wrapped(x).sum().backward()
    finally:
        dist.all_to_all_single, dist.all_reduce = kept_all_to_all, kept_all_reduce
    load, first = model.moe.routing.load(), model.moe.experts.first
    own = expert_parallel.expert_parameters(model)
    here = sum(p.numel() for p in own if p.requires_grad)
    flags = sum(not p.requires_grad for p in own)
    return {
        **sent,
        'rows elsewhere': int(load.sum() - load[first : first + 8 // parts].sum()),
        'dense': sum(p.numel() for p in model.parameters()) - here - flags,
        'experts': here * parts,
    }


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    return run_on_ranks(play, RANKS, tmp_path_factory.mktemp('ranks'))


@pytest.fixture(scope='module')
def alone():
    return play(0, 1)


@pytest.mark.parametrize('parts', [2, 4])
@pytest.mark.parametrize('kind', [*KINDS, 'constraint'])
def test_trains_as_one_process(kind, parts, alone, ranks):
    if (kind, parts) not in alone:
        return
    expected = alone[kind, parts]
    # Of batch normalisation without items, which does nothing else.
    for results in (expected, *(rank[kind, parts] for rank in ranks)):
        for name in [name for name in results['state'] if 'num_batches_tracked' in name]:
            results['state'].pop(name)
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


@pytest.mark.parametrize('parts', [2, 4])
@pytest.mark.parametrize('case', ['uneven', 'tokens', 'sequences'])
def test_ranks_with_other_inputs(case, parts, alone, ranks):
    for rank in ranks:
        torch.testing.assert_close(rank[case, parts], alone[case, parts], rtol=0, atol=1e-12)


@pytest.mark.parametrize('parts', [2, 4])
@pytest.mark.parametrize('init', ['shared', 'independent'])
def test_initial_and_loaded_weights(init, parts, alone, ranks):
    expected = alone[init, parts]['state']
    assert expected['block.experts.0.0.weight'].std() > 0.5  # as init_cfg says
    assert alone[init, parts]['by itself']['experts.weight'].std() > 0.5
    for rank in ranks:
        torch.testing.assert_close(rank[init, parts], alone[init, parts], rtol=0, atol=0)


def test_refused_in_one_sentence(ranks):
    for rank in ranks:
        sentences = rank['refused']
        assert 'does not divide the 4 ranks' in sentences['world']
        assert 'all_experts(model)' in sentences['state']
        assert 'load the checkpoint in one process' in sentences['export']
        assert 'keep_from_ddp(model)' in sentences['DDP']
        assert 'keep_from_ddp(model)' in sentences['preset']
        assert 'ignored_params' in sentences['FSDP']
        assert 'differ in the shapes' in sentences['unequal']
        assert 'freeze all of them or none' in sentences['frozen']
        assert 'the start would be lost' in sentences['k-means']


def test_a_copy_knows_its_part(ranks):
    for norm, of_copy in (result['copied'] for result in ranks):
        assert norm == of_copy > 0


@pytest.mark.parametrize('init', ['shared', 'independent'])
def test_the_first_rank_says_how_all_begin(init, ranks):
    """As data parallelism has it for other weights, whatever the seeds are."""
    first = ranks[0]['own seeds'][init]
    for rank in ranks:
        torch.testing.assert_close(rank['own seeds'][init], first, rtol=0, atol=0)
    weight = first['experts.weight']
    assert all(torch.equal(e, weight[0]) for e in weight[1:]) == (init == 'shared')


@pytest.mark.parametrize('parts', [2, 4])
def test_bytes_of_a_step(parts, ranks):
    """Those of the formulas of docs/scaling.md."""
    counted = [rank['bytes'][parts] for rank in ranks]
    rows = sum(rank['rows elsewhere'] for rank in counted)
    numbers = C * 4 * 4
    assert rows > 0
    assert sum(rank['exchanged'] for rank in counted) == exchanged_bytes(rows, numbers, numbers, 4)
    for rank in counted:
        assert rank['reduced'] == 4 * rank['dense']
        assert rank['replicas'] == (4 * rank['experts'] // parts if parts < RANKS else 0)
        ring = 2 * 3 / 4 * rank['reduced'] + 2 * 1 / 2 * rank['replicas']
        assert ring == reduced_bytes(rank['dense'], rank['experts'], RANKS, parts, 4)


def test_numbers_that_do_not_fit():
    layer = dict(expert=nn.Conv2d(C, C, 1), num_experts=4, top_k=1, in_channels=C)
    with pytest.raises(ConfigError, match='expert_parallel=3 does not divide num_experts=4'):
        moe.MoELayer(**layer, expert_parallel=3)
    with pytest.raises(ConfigError, match='must be an integer of at least 1'):
        moe.MoELayer(**layer, expert_parallel=0)
    with pytest.raises(ConfigError, match='leave one of the two out'):
        moe.MoELayer(**layer, expert_parallel=2, granularity='pixel', whole_maps=True)
    experts = moe.ConvExperts(C, C, 1, 4)
    experts.register_buffer('common', torch.zeros(3))
    with pytest.raises(ConfigError, match='ConvExperts can be cut into parts only if'):
        moe.MoELayer(**{**layer, 'expert': experts}, expert_parallel=2)
