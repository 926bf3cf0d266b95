"""The sparse layer against all experts run on everything, masked by the weights."""

import copy
import gc
import pickle

import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn
from torch.autograd import gradcheck

from mmdet_moe.errors import ConfigError, NonFiniteRouterError
from mmdet_moe.moe import (
    BiasBalancing,
    GAPRouter,
    ImportanceLoss,
    LinearExperts,
    MoELayer,
    count_parameters,
    find_moe_layers,
)

C, OUT = 3, 2


class Scale(nn.Module):
    """An expert with one number."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x):
        return self.value * x


def conv_layer(num_experts=4, top_k=2, softmax=None, **kwargs):
    router = GAPRouter(C, num_experts, top_k, softmax=softmax, noise=False)
    nn.init.normal_(router.fc.weight)
    nn.init.normal_(router.fc.bias)
    experts = [nn.Conv2d(C, OUT, 3, padding=1) for _ in range(num_experts)]
    return MoELayer(experts, num_experts, top_k, router, **kwargs).double()


def dense_reference(layer, maps):
    """Every expert on every image; what was not chosen has weight 0."""
    outputs = []
    for x in maps:
        logits = x.mean((2, 3)) @ layer.router.fc.weight.T + layer.router.fc.bias
        chosen = logits >= logits.topk(layer.top_k).values[:, -1:]
        if layer.router.softmax == 'over_chosen':
            weights = logits.masked_fill(~chosen, float('-inf')).softmax(1)
        else:
            weights = logits.softmax(1) * chosen
        stacked = torch.stack([expert(x) for expert in layer.experts], dim=1)
        outputs.append((weights[:, :, None, None, None] * stacked).sum(1))
    return outputs


@pytest.mark.parametrize(
    ('num_experts', 'top_k', 'softmax'),
    [
        (4, 1, 'over_all'),
        (4, 2, 'over_chosen'),
        (4, 2, 'over_all'),
        (4, 3, 'over_chosen'),
        (4, 4, 'over_chosen'),
        (4, 4, 'over_all'),
        (1, 1, 'over_chosen'),
        (12, 2, 'over_chosen'),  # most experts get nothing
    ],
)
@pytest.mark.parametrize('sizes', [[(5, 4)], [(8, 6), (4, 3), (1, 1)]], ids=['map', 'levels'])
def test_sparse_is_dense_masked(num_experts, top_k, softmax, sizes):
    layer = conv_layer(num_experts, top_k, softmax)
    maps = [torch.randn(4, C, *size, dtype=torch.float64, requires_grad=True) for size in sizes]
    sparse, dense = layer(maps), dense_reference(layer, maps)
    assert isinstance(sparse, list)
    cotangents = [torch.randn_like(y) for y in sparse]
    inputs = [*maps, *layer.parameters()]
    sparse_gradients = torch.autograd.grad(sparse, inputs, cotangents)
    dense_gradients = torch.autograd.grad(dense, inputs, cotangents)
    for a, b in zip([*sparse, *sparse_gradients], [*dense, *dense_gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for x, y in zip(maps, sparse, strict=True):
        torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-12)  # one map: one tensor


@pytest.mark.parametrize(('num_experts', 'top_k'), [(1, 1), (2, 1), (3, 2), (2, 2)])
def test_gradients_by_finite_differences(num_experts, top_k):
    layer = conv_layer(num_experts, top_k)
    x = torch.randn(2, C, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    assert gradcheck(call, (x, *layer.parameters()))


def test_equal_experts_are_one_dense_layer():
    """Any routing; the gradients of the copies sum to the dense gradient."""
    dense = nn.Conv2d(C, OUT, 3, padding=1).double()
    layer = conv_layer(4, 3)
    for expert in layer.experts:
        expert.load_state_dict(dense.state_dict())
    x = torch.randn(5, C, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-12)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    summed = sum(expert.weight.grad for expert in layer.experts)
    torch.testing.assert_close(summed, dense.weight.grad, rtol=0, atol=1e-10)


def test_shortcut():
    layer = conv_layer(shortcut=nn.Conv2d(C, OUT, 1))
    x = torch.randn(3, C, 4, 4, dtype=torch.float64)
    expected = dense_reference(layer, [x])[0] + layer.shortcut(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def with_unused_experts():
    """Logits force experts 2 and 0, in this order."""
    layer = conv_layer(4, 2)
    nn.init.zeros_(layer.router.fc.weight)
    layer.router.fc.bias.data = torch.tensor([2.0, 0.0, 3.0, 1.0]).double()
    return layer


def test_unused_experts_are_not_called_and_get_zero_gradients():
    layer = with_unused_experts()
    calls = []
    for e, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda *_, e=e: calls.append(e))
    x = torch.randn(5, C, 4, 4, dtype=torch.float64)
    layer(x).sum().backward()
    assert calls == [0, 2]
    for e, expert in enumerate(layer.experts):
        for parameter in expert.parameters():
            assert parameter.grad.shape == parameter.shape
            assert parameter.grad.any() == (e in (0, 2))


def test_unused_expert_of_frozen_parameters_gets_none():
    layer = with_unused_experts()
    layer.experts[1].requires_grad_(False)
    layer(torch.randn(2, C, 4, 4, dtype=torch.float64)).sum().backward()
    assert layer.experts[1].weight.grad is None
    assert not layer.experts[3].weight.grad.any()


@pytest.mark.parametrize('change', [torch.relu_, lambda y: y.add_(1), lambda y: y.mul_(2)])
def test_output_can_be_changed_in_place(change):
    layer = with_unused_experts()
    x = torch.randn(2, C, 4, 4, dtype=torch.float64)
    (expected,) = dense_reference(layer, [x])
    before = x.clone()
    y = change(layer(x))
    torch.testing.assert_close(y, change(expected.clone()), rtol=0, atol=1e-12)
    y.sum().backward()
    assert torch.equal(x, before)


def test_experts_may_change_their_rows_in_place():
    layer = MoELayer([nn.ReLU(inplace=True) for _ in range(3)], 3, 2, in_channels=C)
    x = torch.randn(4, C, 4, 4)
    before = x.clone()
    torch.testing.assert_close(layer(x), before.clamp(min=0))
    assert torch.equal(x, before)


@pytest.mark.parametrize('options', [{}, {'granularity': 'patch', 'grid_size': 2}])
@pytest.mark.parametrize('decision_weight', ['uniform', 'area'])
def test_empty_batch(options, decision_weight):
    layer = conv_layer(decision_weight=decision_weight, **options)
    y = layer([torch.zeros(0, C, 6, 4, dtype=torch.float64) for _ in range(2)])
    assert [tuple(level.shape) for level in y] == [(0, OUT, 6, 4)] * 2
    assert layer.routing.num_items == 0
    (sum(level.sum() for level in y) + ImportanceLoss(1.0)(layer.routing)).backward()
    assert not any(p.grad.any() for p in layer.parameters())


def test_nothing_keeps_the_pixels_that_the_router_saw():
    """The latest pass stays known, but not its pooled features, which are the whole map."""
    layer = MoELayer(nn.Conv2d(C, OUT, 1), 4, 2, in_channels=C, granularity='pixel')
    x = torch.randn(2, C, 5, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        layer(x)
    tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
    assert [t is x for t in tensors if t.data_ptr() == x.data_ptr()] == [True]
    assert layer.has_run


@pytest.mark.parametrize('options', [{}, {'granularity': 'patch', 'grid_size': 2}])
def test_maps_without_pixels_are_refused(options):
    with pytest.raises(ConfigError, match=r'without pixels, \(2, 3, 0, 4\)'):
        conv_layer(**options)(torch.zeros(2, C, 0, 4, dtype=torch.float64))


def test_float_output_under_autocast():
    layer = conv_layer().float()
    x = torch.randn(4, C, 5, 5)
    plain = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
        assert layer.routing.weights.dtype == torch.float32
        dtype = layer.experts[0](x).dtype
    assert y.dtype == dtype == torch.bfloat16
    # A bfloat16 convolution is right to 2^-8 of its largest summands.
    torch.testing.assert_close(y.float(), plain, rtol=0.02, atol=0.02)


def test_copies_and_state_do_not_see_the_routing():
    layer = conv_layer()
    keys = set(layer.state_dict())
    x = torch.randn(2, C, 4, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert layer.routing.weights.grad_fn is not None
    assert set(layer.state_dict()) == keys
    assert all(isinstance(v, torch.Tensor) for v in layer.state_dict().values())
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        with pytest.raises(RuntimeError, match='has not been run yet'):
            _ = clone.routing
        torch.testing.assert_close(clone(x), y, rtol=0, atol=0)
    assert layer.routing.weights.grad_fn is not None  # the original keeps its own


def test_routing_before_the_first_forward():
    with pytest.raises(RuntimeError, match='MoE layer "MoELayer" has not been run yet'):
        _ = conv_layer().routing


class TestNonFiniteRouter:
    def broken_model(self):
        model = nn.ModuleDict({'neck': nn.ModuleList([conv_layer(), conv_layer()])})
        find_moe_layers(model)
        nn.init.constant_(model['neck'][1].router.fc.bias, float('nan'))
        return model

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_names_the_layer(self, value):
        layer = self.broken_model()['neck'][1].eval()
        nn.init.constant_(layer.router.fc.bias, value)
        with pytest.raises(NonFiniteRouterError, match=r'MoE layer "neck\.1" produced values'):
            layer(torch.randn(2, C, 4, 4).double())

    def test_names_the_iteration(self):
        hub = MessageHub.get_instance('test_names_the_iteration')
        hub.update_info('iter', 41)  # counted from 0, told from 1 as in the log
        with pytest.raises(NonFiniteRouterError, match=r'"neck\.1" .* at training iteration 42;'):
            self.broken_model()['neck'][1](torch.randn(2, C, 4, 4).double())

    def test_outside_of_a_runner(self):
        with pytest.raises(NonFiniteRouterError, match='not finite; the input'):
            self.broken_model()['neck'][1](torch.randn(2, C, 4, 4).double())

    def test_constraint_is_left_alone(self):
        router = {'constraint': {'type': 'mmdet_moe.RelativeImportanceConstraint'}}
        layer = MoELayer(nn.Conv2d(C, OUT, 1), 4, 2, router, in_channels=C)
        with pytest.raises(NonFiniteRouterError):
            layer(torch.full((2, C, 4, 4), float('nan')))
        assert not layer.router.constraint.relative_importance.any()


class TestDecisionWeights:
    def test_uniform(self):
        layer = conv_layer()
        layer(torch.randn(3, C, 4, 4).double())
        assert layer.routing.decision_weights.tolist() == [1, 1, 1]

    def test_area(self):
        layer = conv_layer(decision_weight='area')
        layer([torch.randn(2, C, *size).double() for size in ((8, 6), (4, 3), (2, 2))])
        assert layer.routing.decision_weights.tolist() == [48, 48, 12, 12, 4, 4]

    def test_area_of_patches(self):
        layer = conv_layer(decision_weight='area', granularity='patch', grid_size=2)
        layer([torch.randn(1, C, *size).double() for size in ((8, 6), (1, 4))])
        # Four patches of 12 pixels and two of 2.
        assert layer.routing.decision_weights.tolist() == [12, 12, 12, 12, 2, 2]

    def test_area_of_unequal_patches(self):
        layer = conv_layer(decision_weight='area', granularity='patch', grid_size=2)
        layer([torch.randn(2, C, 5, 5).double(), torch.randn(2, C, 3, 1).double()])
        # Rows and columns of 2 and 3 pixels; rows of 1 and 2 pixels.
        assert layer.routing.decision_weights.tolist() == [4, 6, 6, 9] * 2 + [1, 2] * 2

    @pytest.mark.parametrize('shape', [(2, C), (2, 10, C)])
    def test_area_without_a_map_is_refused(self, shape):
        layer = MoELayer(nn.Linear(C, OUT), 4, 2, in_channels=C, decision_weight='area')
        with pytest.raises(ConfigError, match="decision_weight='area' is about feature maps, but"):
            layer(torch.randn(*shape))

    def test_those_of_the_latest_calls(self):
        """Of a pass in which a head runs, and assigns its anchors, more than once."""
        layer = conv_layer(decision_weight='positives')
        layer.begin()
        for counts in ([[3.0, 0], [1, 5]], [[7.0], [2.0]]):
            for _ in counts:
                layer(torch.randn(len(counts[0]), C, 4, 4).double())
            layer.weigh_decisions(torch.tensor(counts).flatten())
        layer.end()
        assert layer.routing.decision_weights.tolist() == [3, 0, 1, 5, 7, 2]
        for wrong in (3, 5, 7):  # neither one call nor several
            with pytest.raises(ValueError, match=f'are of {wrong} decisions, but the latest calls'):
                layer.weigh_decisions(torch.ones(wrong))

    def test_positives_are_awaited(self):
        layer = conv_layer(decision_weight='positives')
        layer(torch.randn(3, C, 4, 4).double())
        with pytest.raises(RuntimeError, match='weigh_decisions'):
            layer.routing.importance(balancing=True)
        layer.weigh_decisions(torch.tensor([2, 0, 5]))
        weights = layer.routing.dense_weights()
        expected = 2 * weights[0] + 5 * weights[2]
        torch.testing.assert_close(layer.routing.importance(balancing=True), expected)

    @pytest.mark.parametrize('decision_weight', ['area', 'positives'])
    def test_constraint_is_updated_once_with_them(self, decision_weight):
        router = {'constraint': {'type': 'mmdet_moe.RelativeImportanceConstraint'}}
        layer = MoELayer(
            nn.Conv2d(C, OUT, 1), 4, 2, router, in_channels=C, decision_weight=decision_weight
        )
        layer([torch.randn(2, C, 4, 4), torch.randn(2, C, 2, 2)])
        counts = torch.tensor([16.0, 16, 4, 4])
        if decision_weight == 'positives':
            assert not layer.router.constraint.relative_importance.any()
            counts = torch.tensor([3.0, 0, 1, 7])
            layer.weigh_decisions(counts)
        importance = counts @ layer.routing.dense_weights()
        expected = (importance - importance.mean()) / importance.mean()
        torch.testing.assert_close(layer.router.constraint.relative_importance, expected.detach())


class TestExperts:
    def test_from_config(self):
        config = {'type': nn.Conv2d, 'in_channels': C, 'out_channels': OUT, 'kernel_size': 1}
        layer = MoELayer(config, 3, 2, in_channels=C)
        assert layer(torch.randn(2, C, 4, 4)).shape == (2, OUT, 4, 4)
        self.check_different(layer)

    def test_from_a_module(self):
        module = nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, OUT, 1))
        layer = MoELayer(module, 3, 2, in_channels=C)
        assert layer.experts[0] is module
        self.check_different(layer)

    def test_from_a_list(self):
        modules = [Scale(value) for value in (1, 2, 3)]
        layer = MoELayer(modules, 3, 2, in_channels=C)
        assert all(a is b for a, b in zip(layer.experts, modules, strict=True))
        x = torch.randn(4, C, 2, 2)
        y = layer.eval()(x)
        factors = layer.routing.dense_weights() @ torch.tensor([1.0, 2, 3])
        torch.testing.assert_close(y, factors[:, None, None, None] * x)

    def test_shared_initial_weights(self):
        """The untrained layer is the dense one, and initialising twice undoes no training."""
        module = nn.Sequential(nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, OUT, 1))
        layer = MoELayer(module, 3, 2, in_channels=C, expert_init='shared').eval()
        layer.init_weights()
        x = torch.randn(4, C, 2, 2)
        torch.testing.assert_close(layer(x), module(x))
        for expert in layer.experts[1:]:
            assert expert[0].weight.data_ptr() != module[0].weight.data_ptr()
            nn.init.ones_(expert[0].weight)
        layer.init_weights()
        assert all(torch.all(expert[0].weight == 1) for expert in layer.experts[1:])

    def check_different(self, layer):
        weights = [[p for p in expert.parameters() if p.dim() > 1] for expert in layer.experts]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            for p, q in zip(weights[a], weights[b], strict=True):
                assert p.data_ptr() != q.data_ptr()
                assert not torch.allclose(p, q)

    @pytest.mark.parametrize('number', [2, 4])
    def test_wrong_number(self, number):
        with pytest.raises(ConfigError, match=f'num_experts=3, but {number} experts were given'):
            MoELayer([Scale(1)] * number, 3, 2, in_channels=C)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'granularity': 'voxel'}, "granularity='voxel' is unknown; use one of"),
        ({'granularity': 'patch'}, "granularity='patch' needs grid_size of at least 2, got 1"),
        ({'grid_size': 3}, "grid_size=3 has no effect with granularity='image'"),
        ({'decision_weight': 'size'}, "decision_weight='size' is unknown; use one of"),
        ({'expert_init': 'random'}, "expert_init='random' is unknown; use one of"),
        ({'upcycle_noise': -0.5}, 'upcycle_noise=-0.5 must be a finite number'),
        ({'upcycle_noise': float('nan')}, 'upcycle_noise=nan must be a finite number'),
        ({'capacity_factor': 0}, 'capacity_factor=0 must be a finite number greater than 0'),
        ({'top_k': 5}, 'top_k=5 must lie between 1 and num_experts=4'),
        ({'num_experts': 0}, 'num_experts=0'),
        ({'router': {'num_experts': 8}}, r"router.num_experts=8 contradicts the layer's .*=4"),
        ({'router': {'top_k': 1}}, r"router.top_k=1 contradicts the layer's top_k=2"),
        ({'router': {'in_channels': 7}}, r"router.in_channels=7 contradicts the layer's .*=3"),
        ({'router': GAPRouter(C, 6, 3)}, 'routes to 3 of 6 experts, the MoE layer wants 2 of 4'),
        ({'router': {'type': nn.Identity}}, 'router: Identity is not a Router of mmdet_moe'),
    ],
)
def test_refused(options, message):
    arguments = {'num_experts': 4, 'top_k': 2, 'in_channels': C, **options}
    with pytest.raises(ConfigError, match=message):
        MoELayer(nn.Conv2d(C, OUT, 1), **arguments)


def test_unknown_router_option_is_refused():
    with pytest.raises(TypeError, match='tok_p'):
        MoELayer(nn.Conv2d(C, OUT, 1), 4, 2, {'tok_p': 2}, in_channels=C)


def test_find_and_count():
    model = nn.Sequential(conv_layer(4, 2), nn.ModuleDict({'inner': conv_layer(3, 1)}), nn.ReLU())
    layers = find_moe_layers(model)
    assert list(layers) == ['0', '1.inner']
    assert [layer.name for layer in layers.values()] == ['0', '1.inner']
    # A 3×3 convolution from 3 to 2 channels has 56 parameters, a router E · (3 + 1).
    active, total = count_parameters(model)
    assert total == 4 * 56 + 4 * 4 + 3 * 56 + 3 * 4
    assert active == 2 * 56 + 4 * 4 + 1 * 56 + 3 * 4


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'num_experts': '4'}, "num_experts='4' must be an integer"),
        ({'top_k': 2.0}, r'top_k=2\.0 must be an integer'),
        ({'router': 'mmdet_moe.GAPRouter'}, 'must be a config, such as dict'),
        ({'router': {'constraint': 'mmdet_moe.BiasBalancing'}}, 'constraint=.* must be a config'),
        ({'router': {'constraint': BiasBalancing(3)}}, 'constraint is for 3 experts'),
        ({'upcycle_noise': '0.1'}, "upcycle_noise='0.1' must be a finite number"),
    ],
)
def test_wrong_types_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MoELayer(nn.Conv2d(C, C, 1), **{'num_experts': 4, 'top_k': 2, 'in_channels': C, **options})


def blocks():
    return nn.Sequential(nn.Conv2d(C, OUT, 3, padding=1), nn.BatchNorm2d(OUT))


@pytest.mark.parametrize('num_experts', [1, 4])
@pytest.mark.parametrize('expert', [lambda: nn.Conv2d(C, OUT, 1), blocks])
@pytest.mark.parametrize(('to_meta', 'weight'), [('', 'router'), ('experts', 'experts'), ('x', '')])
def test_another_device_is_refused(num_experts, expert, to_meta, weight):
    """PyTorch's own convolution computes nonsense of weights on the meta device."""
    layer = MoELayer(expert(), num_experts, min(2, num_experts), in_channels=C)
    x = torch.randn(2, C, 4, 4)
    if to_meta == 'x':
        x = x.to('meta')
    else:
        layer.get_submodule(to_meta).to('meta')
    here, there = ('meta', 'cpu') if to_meta == 'x' else ('cpu', 'meta')
    message = f'is given an input on {here}, but its weight "{weight}.*" is on {there}; move both'
    with pytest.raises(ConfigError, match=message):
        layer(x)


def test_another_device_is_told_of_where_pytorch_complains():
    layer, x = MoELayer(nn.Conv2d(C, OUT, 1), 4, 2, in_channels=C), torch.randn(2, C, 4, 4)
    layer.router.to('meta')
    with pytest.raises(ConfigError, match=r'input on cpu, but its weight "router\..*" is on meta'):
        layer(x)
    layer = MoELayer(blocks(), 1, 1, in_channels=C)
    layer.experts.to('meta').register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r'input on cpu, but its weight "experts\.0\.0\.w'):
        layer(x)


@pytest.mark.parametrize('num_experts', [1, 4])
def test_hooks_may_bring_the_weights(num_experts):
    layer = conv_layer(num_experts, min(2, num_experts))
    x = torch.randn(3, C, 4, 4, dtype=torch.float64)
    expected, states = layer(x), [copy.deepcopy(e.state_dict()) for e in layer.experts]
    for expert, state in zip(layer.experts.to('meta'), states, strict=True):

        def bring(expert, _, state=state):
            expert.load_state_dict(state, assign=True)

        expert.register_forward_pre_hook(bring)
    assert torch.equal(layer(x), expected)


def test_on_the_meta_device():
    layer = MoELayer(nn.Conv2d(C, OUT, 1), 1, 1, in_channels=C).to('meta')
    y = layer(torch.randn(2, C, 4, 4, device='meta'))
    assert (y.device.type, y.shape) == ('meta', (2, OUT, 4, 4))


def test_nan_of_the_noise_is_found():
    layer = MoELayer(nn.Conv2d(C, C, 1), 4, 2, in_channels=C)
    nn.init.constant_(layer.router.noise_fc.weight, float('inf'))
    with pytest.raises(NonFiniteRouterError, match='not finite'):
        layer(torch.randn(2, C, 4, 4))


def test_decisions_are_counted_once():
    """Weighing what a constraint has counted already would count it twice."""
    constraint = {'type': 'mmdet_moe.RelativeImportanceConstraint'}
    layer = MoELayer(nn.Conv2d(C, C, 1), 4, 2, {'constraint': constraint}, in_channels=C)
    layer(torch.randn(2, C, 4, 4))
    with pytest.raises(RuntimeError, match="decision_weight='positives'"):
        layer.weigh_decisions(torch.ones(2))


def test_sync_bn_in_experts_is_refused_across_ranks(monkeypatch):
    """It would wait for a rank whose images went to other experts."""
    layer = MoELayer(nn.Sequential(nn.SyncBatchNorm(C)), 4, 2, in_channels=C, granularity='image')
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    with pytest.raises(ConfigError, match='SyncBN, which would wait for ranks'):
        layer(torch.randn(2, C, 4, 4))


def test_inputs_of_a_wrong_rank():
    with pytest.raises(ValueError, match=r'takes inputs .* C = in_channels = 3, got \(3, 5\)'):
        conv_layer()(torch.randn(3, 5).double())
    layer = MoELayer(LinearExperts(8, 8, 4), 4, 2, in_channels=6, granularity='token')
    with pytest.raises(ValueError, match=r'in_features=8 numbers, but an item .* has 6'):
        layer(torch.randn(3, 6))


def test_training_after_inference_mode():
    """What is kept of the same shapes belongs to no mode."""
    layer = MoELayer(nn.Conv2d(3, 3, 1), 4, 2, in_channels=3, decision_weight='area')
    maps = [torch.randn(2, 3, *size) for size in ((7, 5), (3, 2))]
    with torch.inference_mode():
        layer(maps)
    layer(maps)
    layer.routing.importance(balancing=True).var().backward()
    assert layer.router.fc.weight.grad.any()
