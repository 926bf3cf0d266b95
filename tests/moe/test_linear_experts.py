"""Linear layers and MLPs as experts, against every expert computed densely on every item."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import LinearExperts, MLPExperts, MoELayer
from mmdet_moe.moe.dispatcher import Dispatcher
from mmdet_moe.registry import MODELS

E = 4
ALIGNED, ODD = (16, 24, 8), (7, 5, 3)  # inputs, hidden, outputs: grouped_mm takes only the first


def linear(sizes, **kwargs):
    return LinearExperts(sizes[0], sizes[2], E, **kwargs)


def mlp(sizes, **kwargs):
    return MLPExperts(sizes[0], sizes[1], sizes[2], E, **kwargs)


def mlp_of_one_layer(sizes, **kwargs):
    return MLPExperts(sizes[0], (), sizes[2], E, activate_last=True, **kwargs)


def deep_mlp(sizes, **kwargs):
    options = {'activation': {'type': 'GELU'}, 'activate_last': True, **kwargs}
    return MLPExperts(sizes[0], (sizes[1], sizes[2]), sizes[1], E, **options)


KINDS = [linear, mlp, mlp_of_one_layer, deep_mlp]


def every_kind(function):
    return pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)(function)


def dense_outputs(experts, x_T):
    """(T, E, out), by plain products with each expert's weights."""
    x_T = x_T.flatten(1)
    outputs = []
    for e in range(experts.num_experts):
        y = x_T
        if isinstance(experts, LinearExperts):
            y = y @ experts.weight[e].T + (0 if experts.bias is None else experts.bias[e])
        else:
            layers = [layer for name, layer in experts.named_children() if name.isdigit()]
            for i, layer in enumerate(layers):
                y = y @ layer.weight[e].T + (0 if layer.bias is None else layer.bias[e])
                if i < len(layers) - 1 or experts.activate_last:
                    y = F.gelu(y) if isinstance(experts.activation, nn.GELU) else y.clamp(min=0)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


def decisions(num_items, dtype=torch.float32):
    """Two different experts of 0, 1 and 3 per item; expert 2 gets none, some weights are 0."""
    usable = torch.tensor([0, 1, 3])
    expert_ids = torch.stack([usable[torch.randperm(3)[:2]] for _ in range(num_items)])
    weights = torch.rand(num_items, 2, dtype=dtype) + 0.1
    weights[::5, 1] = 0
    weights[3] = 0  # an item that goes nowhere
    return expert_ids, weights


@pytest.fixture
def grouped_calls(monkeypatch):
    """The shapes of the weights that ``grouped_mm`` was called with."""
    if not hasattr(F, 'grouped_mm'):
        pytest.skip('this PyTorch has no grouped_mm')
    calls = []

    def spy(a, b, **kwargs):
        calls.append(tuple(b.shape))
        return original(a, b, **kwargs)

    original = F.grouped_mm
    monkeypatch.setattr(F, 'grouped_mm', spy)
    return calls


def check_against_dense(experts, x_T, tolerance):
    expert_ids, weights = decisions(len(x_T), x_T.dtype)
    x_T.requires_grad_(), weights.requires_grad_()
    y_T = experts(x_T, Dispatcher(expert_ids, weights, E))
    dense_weights = torch.zeros(len(x_T), E, dtype=x_T.dtype).scatter(1, expert_ids, weights)
    expected = (dense_weights[:, :, None] * dense_outputs(experts, x_T)).sum(1)
    assert y_T.dtype == x_T.dtype
    torch.testing.assert_close(y_T, expected, rtol=tolerance, atol=tolerance)
    inputs = [x_T, *experts.parameters()]
    cotangent = torch.randn_like(y_T)
    actual = torch.autograd.grad(y_T, [*inputs, weights], cotangent)
    reference = list(torch.autograd.grad(expected, [*inputs, weights], cotangent))
    # A weight of exactly 0 is no choice: such a route is not computed, and gets no gradient.
    reference[-1] = reference[-1].masked_fill(weights == 0, 0)
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_kind
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(16,), (4, 2, 2)], ids=['vectors', 'maps'])
def test_grouped_product(kind, bias, shape, grouped_calls):
    experts = kind(ALIGNED, bias=bias)
    check_against_dense(experts, torch.randn(23, *shape), tolerance=1e-5)
    assert len(grouped_calls) == sum(p.dim() == 3 for p in experts.parameters())


@pytest.mark.parametrize(('dtype', 'rounding'), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_one_expert_takes_rows_that_lie_anyhow(dtype, rounding):
    """Its rows are the input itself, of whatever strides, and so is their gradient."""
    layer = MoELayer(LinearExperts(16, 32, 1), 1, 1, in_channels=16, granularity='token').to(dtype)
    weight, bias = layer.experts.weight[0], layer.experts.bias[0]
    for x in (torch.randn(1, 16, 49).transpose(1, 2), torch.randn(2, 5, 17)[..., :16]):
        x = x.to(dtype)
        y = layer(x)
        exact = F.linear(*(t.double() for t in (x, weight, bias))).to(dtype)
        torch.testing.assert_close(y, exact, rtol=rounding, atol=rounding)
        y.sum().backward()
        expected = x.float().sum((0, 1)).expand(32, 16)
        grad = layer.experts.weight.grad[0]
        torch.testing.assert_close(grad, expected.to(dtype), rtol=rounding, atol=rounding)
        layer.zero_grad()


@every_kind
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('sizes', [ALIGNED, ODD], ids=['aligned', 'odd'])
def test_loop_over_experts(kind, bias, dtype, sizes, monkeypatch):
    """As on a PyTorch without grouped_mm."""
    monkeypatch.delattr(F, 'grouped_mm', raising=False)
    experts = kind(sizes, bias=bias).to(dtype)
    x_T = torch.randn(23, sizes[0], dtype=dtype)
    check_against_dense(experts, x_T, tolerance=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(
    ('sizes', 'dtype'),
    [
        (ALIGNED, torch.float64),
        (ODD, torch.float32),
        ((16, 24, 3), torch.float32),  # the last layer's gradient is not aligned
        ((3, 24, 16), torch.float32),
        ((16, 24, 20), torch.bfloat16),  # 40 bytes
    ],
    ids=str,
)
def test_what_grouped_mm_does_not_take(sizes, dtype, grouped_calls):
    experts = mlp(sizes).to(dtype)
    x_T = torch.randn(23, sizes[0], dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    check_against_dense(experts, x_T, tolerance)
    aligned = 16 // dtype.itemsize
    for _, inputs, outputs in grouped_calls:
        assert dtype != torch.float64
        assert inputs % aligned == outputs % aligned == 0


def test_weights_in_a_flat_buffer():
    """A view that starts anywhere, as some distributed wrappers keep parameters."""
    experts = LinearExperts(16, 8, E, bias=False)
    flat = torch.cat([torch.zeros(1), experts.weight.detach().flatten()])
    experts.weight = nn.Parameter(flat[1:].view(E, 8, 16))
    check_against_dense(experts, torch.randn(23, 16), tolerance=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
@pytest.mark.parametrize('unused', [True, False], ids=['unused expert', 'all used'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_on_a_gpu(dtype, unused, grouped_calls):
    """Against the same in float64 on the CPU; without the jumps of ReLU's gradient."""
    experts = mlp((64, 128, 32), activation='Tanh').to('cuda', dtype)
    exact = copy.deepcopy(experts).to('cpu', torch.float64)
    x_T = torch.randn(200, 64, device='cuda', dtype=dtype, requires_grad=True)
    exact_x_T = x_T.detach().cpu().double().requires_grad_()
    expert_ids, weights = decisions(200)
    if not unused:
        expert_ids[::2, 0] = 2
    y_T = experts(x_T, Dispatcher(expert_ids.cuda(), weights.cuda(), E))
    expected = exact(exact_x_T, Dispatcher(expert_ids, weights.double(), E))
    cotangent = torch.randn_like(expected)
    actual = torch.autograd.grad(y_T, [x_T, *experts.parameters()], cotangent.to(y_T))
    reference = torch.autograd.grad(expected, [exact_x_T, *exact.parameters()], cotangent)
    for a, b in zip([y_T, *actual], [expected, *reference], strict=True):
        # Sums of many terms, each rounded; a wrong row would be an error of 1.
        error = (a.cpu().double() - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).mean()
        assert error.max() < 20 * torch.finfo(dtype).eps
    if dtype != torch.bfloat16 or unused:
        assert not grouped_calls


@every_kind
def test_gradients_by_finite_differences(kind):
    experts = kind(ODD, **({} if kind is linear else {'activation': 'Tanh'})).double()
    expert_ids, weights = decisions(6, torch.float64)
    weights.clamp_(min=0.1).requires_grad_()  # at exactly 0 there is a jump
    x_T = torch.randn(6, ODD[0], dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in experts.named_parameters()]

    def call(x, w, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, named, (x, Dispatcher(expert_ids, w, E)))

    assert gradcheck(call, (x_T, weights, *experts.parameters()))


@every_kind
@pytest.mark.parametrize('sizes', [ALIGNED, ODD], ids=['aligned', 'odd'])
@pytest.mark.parametrize('num_items', [0, 3], ids=['no items', 'all dropped'])
def test_no_rows(kind, sizes, num_items):
    """Outputs of the right shape, and a gradient of zeros for every parameter."""
    experts = kind(sizes)
    x_T = torch.randn(num_items, sizes[0], 1, 1, requires_grad=True)
    weights = torch.zeros(num_items, 2, requires_grad=True)
    expert_ids = torch.tensor([[0, 1]]).expand(num_items, 2)
    y_T = experts(x_T, Dispatcher(expert_ids, weights, E))
    expected = torch.zeros(num_items, sizes[1] if kind is deep_mlp else sizes[2])
    assert torch.equal(y_T, expected)
    y_T.sum().backward()
    assert not x_T.grad.any()
    for parameter in experts.parameters():
        assert parameter.grad.shape == parameter.shape
        assert not parameter.grad.any()


@every_kind
def test_unused_experts_have_zero_gradients(kind):
    """Distributed data parallel waits for the gradient of every parameter."""
    experts = kind(ALIGNED)
    expert_ids, weights = decisions(23)
    experts(torch.randn(23, ALIGNED[0]), Dispatcher(expert_ids, weights, E)).sum().backward()
    for parameter in experts.parameters():
        assert not parameter.grad[2].any()
        assert all(parameter.grad[e].any() for e in (0, 1, 3))


def test_frozen_parts():
    experts = mlp(ALIGNED)
    experts.get_parameter('0.weight').requires_grad_(False)
    experts.get_parameter('1.bias').requires_grad_(False)
    dispatcher = Dispatcher(*decisions(23), E)
    experts(torch.randn(23, ALIGNED[0]), dispatcher).sum().backward()
    with_gradient = [name for name, p in experts.named_parameters() if p.grad is not None]
    assert with_gradient == ['0.bias', '1.weight']


def test_items_travel_once(monkeypatch):
    calls = []
    for name in ('dispatch', 'combine'):
        original = getattr(Dispatcher, name)
        monkeypatch.setattr(
            Dispatcher, name, lambda self, x, n=name, f=original: calls.append(n) or f(self, x)
        )
    deep_mlp(ALIGNED)(torch.randn(23, 16), Dispatcher(*decisions(23), E))
    assert calls == ['dispatch', 'combine']


@pytest.mark.parametrize('sizes', [ALIGNED, ODD], ids=['grouped', 'loop'])
@pytest.mark.parametrize('kind', [linear, mlp], ids=['linear', 'mlp'])
def test_autocast(kind, sizes):
    experts = kind(sizes)
    x_T, (expert_ids, weights) = torch.randn(23, sizes[0]), decisions(23)
    dispatcher = Dispatcher(expert_ids, weights, E)
    plain = experts(x_T, dispatcher)
    with torch.autocast('cpu', torch.bfloat16):
        y_T = experts(x_T, dispatcher)
        assert y_T.dtype == nn.Linear(sizes[0], 2)(x_T).dtype == torch.bfloat16
        assert experts.double()(x_T.double(), dispatcher).dtype == torch.float64
        experts.float()
    # Sums of at most 24 products in bfloat16, each right to 2^-8.
    torch.testing.assert_close(y_T.float(), plain, rtol=0.05, atol=0.05)
    y_T.float().sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad[0].any()


class TestInitialisation:
    @pytest.mark.parametrize('bias', [True, False])
    def test_as_linear_layers(self, bias):
        """Uniform in ±1/sqrt(in), for the weights as for the biases; each expert its own."""
        experts = MLPExperts(100, 50, 400, 3, bias=bias)
        for layer, inputs in zip(experts.layers, (100, 50), strict=True):
            for parameter in layer.parameters():
                bound = inputs**-0.5
                assert parameter.abs().max() <= bound
                for values in parameter:
                    # Of at least 50 values the largest one misses the bound by 2/50 on average.
                    assert values.abs().max() > 0.8 * bound
                    # The standard deviation of n draws is known to about 0.45 / sqrt(n).
                    expected = bound / 3**0.5
                    assert abs(values.std() - expected) < 5 * 0.45 * expected / 50**0.5
                for a, b in ((0, 1), (0, 2), (1, 2)):
                    assert not torch.isclose(parameter[a], parameter[b], rtol=1e-3).all()

    @pytest.mark.parametrize('kind', [linear, mlp], ids=['linear', 'mlp'])
    def test_by_config(self, kind):
        init_cfg = {'type': 'Xavier', 'layer': 'Linear', 'distribution': 'uniform', 'bias': 0.5}
        sizes = (60, 80, 40)
        experts = kind(sizes, init_cfg=init_cfg)
        before = copy.deepcopy(experts.state_dict())
        layer = MoELayer(experts, E, 2, in_channels=60, granularity='token')
        layer.init_weights()
        for name, value in experts.state_dict().items():
            assert not torch.equal(value, before[name])
            if value.dim() == 2:
                assert torch.all(value == 0.5)
                continue
            bound = (6 / (value.shape[1] + value.shape[2])) ** 0.5
            for expert in value:
                assert 0.98 * bound < expert.abs().max() <= bound
            assert not torch.isclose(value[0], value[1], rtol=1e-3).all()
        trained = copy.deepcopy(experts.state_dict())
        experts.init_weights()  # a second call does nothing
        assert all(torch.equal(trained[name], v) for name, v in experts.state_dict().items())

    def test_shared(self):
        init_cfg = {'type': 'Xavier', 'layer': 'Linear'}
        config = {
            'type': 'mmdet_moe.MLPExperts',
            'in_features': 6,
            'hidden_features': [5],
            'out_features': 4,
            'init_cfg': init_cfg,
        }
        options = {'granularity': 'token', 'expert_init': 'shared'}
        layer = MoELayer(config, E, 2, in_channels=6, **options)
        layer.init_weights()
        for parameter in layer.experts.parameters():
            assert all(torch.equal(expert, parameter[0]) for expert in parameter)


class TestCheckpoints:
    def layer(self, num_experts=E, **kwargs):
        experts = MLPExperts(12, 5, 4, num_experts, activate_last=True)
        return MoELayer(experts, num_experts, 2, in_channels=3, **kwargs).eval()

    def dense(self, x, fcs):
        x = x.flatten(1)
        for fc in fcs:
            x = fc(x).relu()
        return x

    def test_dense_layers_become_experts(self, randomise):
        dense = nn.ModuleDict({'shared_fcs': nn.ModuleList([nn.Linear(12, 5), nn.Linear(5, 4)])})
        randomise(dense)
        model = nn.ModuleDict({'shared_fcs': self.layer()})
        result = model.load_state_dict(dense.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert all('router' in key for key in result.missing_keys)
        x = torch.randn(6, 3, 2, 2)
        expected = self.dense(x, dense['shared_fcs'])
        torch.testing.assert_close(model['shared_fcs'](x), expected, rtol=1e-5, atol=1e-5)
        state = model.state_dict()
        assert state['shared_fcs.experts.0.weight'].shape == (E, 5, 12)
        assert state['shared_fcs.experts.1.bias'].shape == (E, 4)

    def test_one_layer(self, randomise):
        dense = randomise(nn.ModuleDict({'fc': nn.Linear(12, 5)}))
        layer = MoELayer(LinearExperts(12, 5, E), E, 2, in_channels=3)
        model = nn.ModuleDict({'fc': layer}).eval()
        assert not model.load_state_dict(dense.state_dict(), strict=False).unexpected_keys
        x = torch.randn(6, 3, 2, 2)
        torch.testing.assert_close(layer(x), dense['fc'](x.flatten(1)), rtol=1e-5, atol=1e-5)

    def test_lists_of_modules_are_stacked(self, randomise):
        listed = MoELayer([nn.Linear(12, 5) for _ in range(E)], E, 2, in_channels=12)
        randomise(listed)
        layer = MoELayer(LinearExperts(12, 5, E), E, 2, in_channels=12)
        layer.load_state_dict(listed.state_dict())
        for e, expert in enumerate(listed.experts):
            assert torch.equal(layer.experts.weight[e], expert.weight)
            assert torch.equal(layer.experts.bias[e], expert.bias)

    def test_own_checkpoints_are_untouched(self, randomise):
        source, target = randomise(self.layer()), self.layer(upcycle_noise=0.5)
        target.load_state_dict(source.state_dict())
        for name, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], value)

    def test_another_number_of_experts(self):
        with pytest.raises(ConfigError, match=r'has 3 experts .* but the model has 4'):
            self.layer().load_state_dict(self.layer(3).state_dict())


def test_built_from_configs():
    config = {'in_features': 12, 'out_features': 5}
    for name, extra in (('LinearExperts', {}), ('MLPExperts', {'hidden_features': 7})):
        expert = {'type': f'mmdet_moe.{name}', **config, **extra}
        layer = MODELS.build(
            {
                'type': 'mmdet_moe.MoELayer',
                'expert': expert,
                'num_experts': E,
                'top_k': 2,
                'in_channels': 3,
            }
        )
        assert type(layer.experts).__name__ == name
        assert layer(torch.randn(6, 3, 2, 2)).shape == (6, 5)


def test_patches_are_refused():
    """One vector per patch would not know where the pixels of the halo are."""
    with pytest.raises(ConfigError, match='LinearExperts take an item as one vector'):
        MoELayer(linear(ODD), E, 2, in_channels=7, granularity='patch', grid_size=2)


def test_activation_with_parameters_is_refused():
    with pytest.raises(ConfigError, match="activation='PReLU' has parameters"):
        mlp(ODD, activation='PReLU')
