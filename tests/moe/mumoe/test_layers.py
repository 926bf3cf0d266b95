"""μMoE layers against the fully materialised tensor, and what they refuse."""

import copy
import pickle

import mumoe_by_hand as by_hand
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import CPMuMoE, MuMoEConv1x1, MuMoEMLP, TRMuMoE
from mmdet_moe.moe.flops import count_flops

I, O, H = 3, 4, 5  # noqa: E741 (as the docstrings have them)
LEVELS = [(4,), (3, 2), (2, 3, 2)]


def make(kind='cp', num_experts=(3, 2), rank=2, **options):
    """A layer with random weights."""
    if kind in ('mlp cp', 'mlp tr'):
        layer = MuMoEMLP(I, H, O, num_experts, rank, factorisation=kind[4:], **options)
    elif kind in ('conv cp', 'conv tr'):
        layer = MuMoEConv1x1(I, O, num_experts, rank, factorisation=kind[5:], **options)
    else:
        layer = {'cp': CPMuMoE, 'tr': TRMuMoE}[kind](I, O, num_experts, rank, **options)
    return by_hand.randomise(layer)


LINEAR, ALL = ['cp', 'tr'], ['cp', 'tr', 'conv cp', 'conv tr', 'mlp cp', 'mlp tr']


def example(kind, rows=6):
    return torch.randn(rows, I, 2, 2) if 'conv' in kind else torch.randn(rows, 3, I)


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('norm', ['bn', 'ln'])
@pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no bias'])
@pytest.mark.parametrize('levels', LEVELS, ids=str)
@pytest.mark.parametrize('kind', ['cp', 'tr', 'mlp cp', 'mlp tr'])
def test_outputs_and_gradients(kind, levels, bias, norm, training):
    layer = make(kind, levels, bias=bias, norm=norm).double().train(training)
    x = torch.randn(9, I).double().requires_grad_()
    inputs = [x, *layer.parameters()]
    expected, actual = by_hand.computed(layer, x), layer(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        rtol=1e-7,
        atol=1e-8,
    )


@pytest.mark.parametrize('gate', ['random', 'zero'])
@pytest.mark.parametrize('norm', ['bn', 'ln'])
@pytest.mark.parametrize('kind', ['cp', 'tr', 'mlp cp'])
def test_finite_differences(kind, norm, gate):
    layer = make(kind, norm=norm).double()
    if gate == 'zero':
        for weight in layer.gate.weights:
            nn.init.zeros_(weight)
    x = torch.randn(5, I).double().requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def compute(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(compute, (x, *layer.parameters()))


@pytest.mark.parametrize('shape', [(7,), (2, 3), (2, 3, 4)], ids=str)
def test_dimensions_before_the_features(shape):
    layer = make().eval()
    x = torch.randn(*shape, I)
    y = layer(x)
    assert y.shape == (*shape, O)
    torch.testing.assert_close(y.flatten(0, -2), layer(x.flatten(0, -2)))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kind', ['cp', 'tr'])
def test_convolution(kind, stride, memory_format):
    layer = make(f'conv {kind}', stride=stride)
    x = torch.randn(2, I, 5, 4).to(memory_format=memory_format)
    y = layer(x)
    rows = x[:, :, ::stride, ::stride].permute(0, 2, 3, 1).flatten(0, 2)
    expected = by_hand.computed(layer, rows)
    height, width = -(-5 // stride), 4 // stride
    assert y.shape == (2, O, height, width)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.permute(0, 2, 3, 1).flatten(0, 2), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('kind', ALL)
def test_mixed_precision(kind):
    """Under autocast, and of a model in bfloat16: as float32, but for the rounding."""
    layer = make(kind).eval()
    x = example(kind)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    scale = expected.abs().max()
    assert (y - expected).abs().max() < 0.03 * scale
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - expected).abs().max() < 0.1 * scale


def test_training_under_autocast_learns():
    layer = CPMuMoE(I, O, 8, rank=16)
    x = torch.randn(64, I)
    target = x @ torch.randn(I, O)
    optimizer = torch.optim.Adam(layer.parameters(), 0.03)
    losses = []
    for _ in range(60):
        with torch.autocast('cpu', torch.bfloat16):
            loss = (layer(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize('kind', LINEAR)
def test_every_level_learns(kind):
    """Its gate starts at 0, and its experts nearly alike, but they do not stay so."""
    layer = {'cp': CPMuMoE, 'tr': TRMuMoE}[kind](I, O, (3, 2, 2), 4)
    optimizer = torch.optim.Adam(layer.parameters(), 0.03)
    x = torch.randn(64, I)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(x) - x.abs().sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    for coefficients in layer.coefficients(x):
        assert coefficients.std(0).min() > 0.05


@pytest.mark.parametrize('kind', ALL)
def test_copies_and_pickles(kind):
    layer = make(kind).eval()
    layer.observe(lambda *_: None)  # which could not be pickled
    x = example(kind)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        assert not other._observers


def test_moving_average_of_the_weights():
    from mmengine.model import ExponentialMovingAverage

    layer = make()
    average = ExponentialMovingAverage(layer, momentum=0.5, update_buffers=True)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    average.update_parameters(layer)  # a copy at first
    layer(torch.randn(9, I))
    for parameter in layer.parameters():
        parameter.data += 1
    average.update_parameters(layer)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[name] + layer.state_dict()[name]) / 2)


@pytest.mark.parametrize('levels', LEVELS, ids=str)
@pytest.mark.parametrize('kind', ['cp', 'mlp tr'])
def test_observers(kind, levels):
    layer = make(kind, levels).eval()
    x = torch.randn(2, 5, I)
    seen = []
    handle = layer.observe(lambda *call: seen.append(call))
    layer(x)
    handle.remove()
    layer(x)
    ((routing, items),) = seen
    joint = by_hand.gated(layer.gate, x.flatten(0, 1))
    expected = joint[0]
    for a in joint[1:]:
        expected = torch.einsum('tn,tm->tnm', expected, a).flatten(1)
    torch.testing.assert_close(routing.dense_weights(), expected, rtol=0, atol=1e-5)
    assert (routing.weights.diff(dim=1) <= 0).all()
    assert routing.num_images == 2
    assert [len(part) for part in items] == [5]


def test_observers_of_maps():
    layer = make('conv cp', stride=2).eval()
    seen = []
    layer.observe(lambda *call: seen.append(call))
    layer(torch.randn(2, I, 6, 4))
    ((routing, (items,)),) = seen
    assert len(routing.weights) == 2 * 3 * 2
    assert items.shape == (2, 3, 2)


@pytest.mark.parametrize('kind', ['cp', 'tr', 'mlp cp'])
def test_an_expert_left_out(kind):
    """As if its part of the tensors were 0, in both layers of an MLP."""
    layer = make(kind).double().eval()
    x = torch.randn(6, I).double()
    coefficients = by_hand.gated(layer.gate, x)
    for expert in (1, 4):
        y = x
        for factors in ([layer.hidden] if 'mlp' in kind else []) + [layer.experts]:
            tensor = by_hand.whole([*factors.factors]).detach().clone()
            tensor.flatten(0, 1)[expert] = 0
            y = by_hand.mixed(tensor, y, coefficients, True)
            if factors is not layer.experts:
                y = nn.functional.gelu(y)
        actual = layer.mix_without(x, layer.coefficients(x), expert)
        torch.testing.assert_close(actual, y, rtol=0, atol=1e-9)


def test_mix_may_be_replaced():
    layer = make()
    layer.mix = lambda x, coefficients: x.new_zeros(len(x), O)
    assert not layer(torch.randn(5, I)).any()


def official(kind, levels, norm, layers=1):
    """A state dict as the authors' module has it, behind a prefix, among other entries."""
    sizes = [(I, O)] if layers == 1 else [(I, H), (H, O)]
    state = {'head.weight': torch.randn(2)}
    for level, size in enumerate(levels):
        state[f'net.projs.{level}'] = torch.randn(I, size)
        if norm == 'bn':
            state[f'net.bn.{level}.running_mean'] = torch.randn(size)
            state[f'net.bn.{level}.running_var'] = torch.rand(size) + 0.5
            state[f'net.bn.{level}.num_batches_tracked'] = torch.tensor(7)
    for index, (size_in, size_out) in enumerate(sizes):
        name = 'MuMoE' if index == 0 else 'MuMoE2'
        dims = (*levels, size_in + 1, size_out)
        for place, size in enumerate(dims):
            shape = (size, 3) if kind == 'cp' else (3, size, 3)
            state[f'net.{name}.factors.{place}'] = torch.randn(shape)
    return state


@pytest.mark.parametrize('layers', [1, 2])
@pytest.mark.parametrize('norm', ['bn', 'ln'])
@pytest.mark.parametrize('levels', [(4,), (3, 2)], ids=str)
@pytest.mark.parametrize('kind', LINEAR)
def test_official_state_dict(kind, levels, norm, layers):
    """The outputs of a literal einsum over it, and the same state dict back."""
    state = official(kind, levels, norm, layers)
    layer = make(kind if layers == 1 else f'mlp {kind}', levels, norm=norm).eval()
    layer.load_official(state, 'net.')
    x = torch.randn(6, I)
    coefficients = []
    for level in range(len(levels)):
        z = x @ state[f'net.projs.{level}']
        if norm == 'bn':
            mean, variance = (state[f'net.bn.{level}.running_{s}'] for s in ('mean', 'var'))
        else:
            mean, variance = z.mean(1, keepdim=True), z.var(1, unbiased=False, keepdim=True)
        coefficients.append(by_hand.entmax15((z - mean) / (variance + 1e-5).sqrt()))
    y = x
    for name in ['MuMoE', 'MuMoE2'][:layers]:
        if name == 'MuMoE2':
            y = nn.functional.gelu(y)
        factors = [state[f'net.{name}.factors.{i}'] for i in range(len(levels) + 2)]
        y = by_hand.mixed(by_hand.whole(factors), y, coefficients, True)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    back = layer.official_state_dict('net.')
    del state['head.weight']
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ('change', 'prefix', 'message'),
    [
        ({}, 'other.', r"lacks 'other\.MuMoE\.factors\.0'; .* or prefix='other\.' is wrong"),
        ({'net.projs.1': None}, 'net.', r"lacks 'net\.projs\.1'"),
        ({'net.input_ln.weight': torch.ones(3)}, 'net.', r'apply_ln=True'),
        ({'net.MuMoE.factors.4': torch.ones(4, 3)}, 'net.', r'has 5 factors \(3 levels'),
        ({'net.bn.0.running_mean': None}, 'net.', r"lacks 'net\.bn\.0\.running_mean'"),
        (
            {'net.projs.0': torch.ones(9, 3)},
            'net.',
            r"projs\.0' of the shape \(9, 3\) has no place",
        ),
        ({'net.projs.2': torch.ones(3, 2)}, 'net.', r"projs\.2' .* has no place"),
        ({'net.MuMoE2.factors.0': torch.ones(3, 3)}, 'net.', r"MuMoE2\.factors\.0' .* no place"),
    ],
)
def test_official_state_dict_that_does_not_fit(change, prefix, message):
    state = {**official('cp', (3, 2), 'bn'), **change}
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        make('cp', (3, 2)).load_official(state, prefix)


def test_official_state_dict_of_another_norm():
    state = official('cp', (3, 2), 'bn')
    with pytest.raises(ConfigError, match=r"running_mean' .* has no place .*norm='ln'"):
        make('cp', (3, 2), norm='ln').load_official(state, 'net.')


def parameters(layer):
    return sum(p.numel() for p in layer.parameters())


MATCHED = {
    'cp': lambda rank, **kw: CPMuMoE(40, 30, 8, rank, **kw),
    'cp, levels': lambda rank, **kw: CPMuMoE(40, 30, (4, 3), rank, **kw),
    'tr': lambda rank, **kw: TRMuMoE(40, 30, 8, rank, **kw),
    'tr, large': lambda rank, **kw: TRMuMoE(128, 256, (8, 4), rank, **kw),
    'conv': lambda rank, **kw: MuMoEConv1x1(40, 30, 8, rank, **kw),
    'mlp cp': lambda rank, **kw: MuMoEMLP(40, 60, 30, 8, rank, **kw),
    'mlp tr': lambda rank, **kw: MuMoEMLP(40, 60, 30, 8, rank, 'tr', **kw),
}
SIZES = {'tr, large': [(128, 256)], 'mlp cp': [(40, 60), (60, 30)], 'mlp tr': [(40, 60), (60, 30)]}


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('case', MATCHED)
def test_matching_rank(case, bias):
    """The parameters are within the budget, and with a larger rank they are not."""
    budget = sum((i + bias) * o for i, o in SIZES.get(case, [(40, 30)]))
    make = MATCHED[case]
    layer = make('match', bias=bias)
    assert parameters(layer) <= budget
    factors = layer.experts.factors
    if factors[0].dim() == 2:
        larger = factors[0].shape[1] + 1
    else:
        ranks = [core.shape[0] for core in factors]
        # All alike; or 4 around the experts and the rest between input and output.
        larger = [rank + 1 for rank in ranks] if len(set(ranks)) == 1 else ranks
        if larger is ranks:
            assert set(ranks[:-1]) == {4}
            larger[-1] += 1
    assert parameters(make(larger, bias=bias)) > budget
    again = make('match', bias=bias, budget=budget)
    assert [f.shape for f in again.experts.factors] == [f.shape for f in factors]


@pytest.mark.parametrize('case', MATCHED)
def test_smallest_budget(case):
    make = MATCHED[case]
    with pytest.raises(ConfigError, match='smallest feasible budget for') as error:
        make('match', budget=1)
    smallest = int(str(error.value).split('experts is ')[1].split(':')[0])
    assert parameters(make('match', budget=smallest)) == smallest
    with pytest.raises(ConfigError, match='smallest feasible budget'):
        make('match', budget=smallest - 1)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'rank': 0}, 'rank=0 must be an integer of at least 1'),
        ({'rank': 2.5}, 'rank=2.5'),
        ({'rank': 'large'}, "rank='large'"),
        ({'num_experts': 1}, 'num_experts=1 must be an integer of at least 2'),
        ({'num_experts': (4, 1)}, 'num_experts=1 must be an integer of at least 2'),
        ({'num_experts': ()}, r'num_experts=\(\) must have at least one level'),
        ({'budget': 100}, "budget=100 needs rank='match'"),
        ({'norm': 'gn'}, "norm='gn' is unknown"),
        ({'activation': 'relu'}, "activation='relu' is unknown"),
        ({'bias': 1}, 'bias=1'),
    ],
    ids=str,
)
@pytest.mark.parametrize('kind', ALL)
def test_bad_options(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        make(kind, **options)


@pytest.mark.parametrize('kind', [CPMuMoE, TRMuMoE])
@pytest.mark.parametrize(('sizes', 'field'), [((0, 4), 'in_features'), ((4, 0), 'out_features')])
def test_bad_sizes(kind, sizes, field):
    with pytest.raises(ConfigError, match=f'{field}=0'):
        kind(*sizes, 4, 2)


def test_bad_ranks_of_a_ring():
    with pytest.raises(ConfigError, match=r'has 2 numbers for 4 factors .* give 4 numbers'):
        make('tr', rank=(2, 2))


def test_unknown_factorisation():
    with pytest.raises(ConfigError, match="factorisation='tucker' is unknown"):
        MuMoEConv1x1(3, 4, 2, 2, factorisation='tucker')


def test_bad_inputs():
    layer = make()
    with pytest.raises(ConfigError, match=r'takes inputs of 3 features, got .*in_features=5'):
        layer(torch.randn(2, 5))
    with pytest.raises(ConfigError, match=r"single row, .* set norm='ln', or a larger batch"):
        layer(torch.randn(1, I))
    layer.eval()(torch.randn(1, I))
    make(norm='ln')(torch.randn(1, I))
    conv = make('conv cp')
    with pytest.raises(ConfigError, match=r'takes inputs \(N, C, H, W\), got \(2, 3\)'):
        conv(torch.randn(2, I))
    with pytest.raises(ConfigError, match='takes inputs of 3 features'):
        conv(torch.randn(2, 5, 2, 2))


@pytest.mark.parametrize('kind', ALL)
def test_another_device(kind):
    x, message = example(kind), 'is given an input on {}, but its weight ".+" is on {}; move both'
    with pytest.raises(ConfigError, match=message.format('meta', 'cpu')):
        make(kind)(x.to('meta'))
    with pytest.raises(ConfigError, match=message.format('cpu', 'meta')):
        make(kind).to('meta')(x)
    assert make(kind).to('meta')(x.to('meta')).device.type == 'meta'


@pytest.mark.parametrize('kind', ALL)
def test_flops(kind):
    layer = make(kind, rank=4)
    pixels = 6 * 4 if 'conv' in kind else 6 * 3
    one = {'cp': cp_flops, 'tr': tr_flops}[kind[-2:]]
    sizes = [(I, H), (H, O)] if 'mlp' in kind else [(I, O)]
    gate = 2 * I * (3 + 2)
    expected = pixels * (gate + sum(one(*size, 4) for size in sizes))
    assert count_flops(layer, example(kind)) == expected


def cp_flops(size_in, size_out, rank):
    return 2 * rank * (3 + 2 + size_in + size_out)


def tr_flops(size_in, size_out, rank):
    cores = 2 * rank**2 * (3 + 2 + size_in)
    return cores + 2 * 2 * rank**3 + 2 * rank**2 * size_out


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return result


@pytest.mark.parametrize('kind', [CPMuMoE, TRMuMoE])
def test_no_large_tensor(kind):
    """In a training step with 256 experts nothing is larger than the input, let alone E·I·O."""
    with torch.device('meta'):
        layer = kind(512, 512, 256, 'match')
        x = torch.empty(64, 196, 512, requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert largest.size == x.numel() < 256 * 512 * 512 / 10


def test_observers_of_one_vector():
    layer, seen = make('cp').eval(), []
    layer.observe(lambda *call: seen.append(call))
    assert layer(torch.randn(I)).dim() == 1
    ((routing, (items,)),) = seen
    assert (len(routing.weights), routing.num_images, len(items)) == (1, 1, 1)
