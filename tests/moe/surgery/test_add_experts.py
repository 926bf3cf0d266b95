"""Modules of plain PyTorch models that become experts, against the models as they were."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from copies import gradients_of
from torch import nn

from mmdet_moe.errors import ConfigError, ReplacedAttributeError
from mmdet_moe.moe import (
    ConvExperts,
    LinearExperts,
    ModuleExperts,
    MoELayer,
    add_experts,
    find_moe_layers,
)


def conv(inputs, outputs, **kwargs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


class Head(nn.Module):
    """Two branches of siblings that run on every level, as those of a dense detection head."""

    def __init__(self, between=None, twice=False):
        super().__init__()
        self.cls_convs = nn.ModuleList([nn.Sequential(conv(4, 4), nn.ReLU()) for _ in range(2)])
        self.cls = conv(4, 5)
        self.reg = conv(4, 2)
        self.between, self.twice = between, twice

    def forward(self, levels):
        outputs = []
        for x in levels:
            y = x
            for layer in self.cls_convs:
                y = layer(y)
                if self.between is not None:
                    y = self.between(y)
            outputs.append((self.cls(y), self.reg(y if self.twice else x)))
        return outputs


class FFN(nn.Module):
    """As mmcv's: the input is added to, or something else of the same shape."""

    def __init__(self, channels=6):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, 12), nn.GELU(), nn.Linear(12, channels))

    def forward(self, x, identity=None):
        return self.layers(x) + (x if identity is None else identity)


class Encoder(nn.Module):
    def __init__(self, sequence_first=False):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.ffn = FFN()
        self.mix = nn.Linear(6, 6)
        self.sequence_first = sequence_first

    def forward(self, x):
        x = x.transpose(0, 1) if self.sequence_first else x
        x = self.mix(self.ffn(self.norm(x), identity=x))
        return x.transpose(0, 1) if self.sequence_first else x


def changed(model, experts, **kwargs):
    """A copy with experts, whose routers decide by their inputs."""
    moe = copy.deepcopy(model)
    report = add_experts(moe, experts, **kwargs)
    for layer in find_moe_layers(moe).values():
        nn.init.normal_(layer.router.fc.weight, std=3.0)
    return moe, report


def outputs_of(model, x):
    out = model(x)
    return [t for pair in out for t in pair] if isinstance(out, list) else [out]


def levels():
    return [torch.randn(3, 4, s, s + 1) for s in (8, 5, 2)]


CASES = {
    'stage': (lambda: torchvision.models.resnet18(num_classes=7), {'layer4': {}}, ModuleExperts),
    'blocks': (lambda: torchvision.models.resnet18(num_classes=7), {'layer3.*': {}}, None),
    'conv': (
        lambda: torchvision.models.resnet18(num_classes=7),
        {'layer4.1.conv2': {'granularity': 'patch', 'grid_size': 2}},
        ConvExperts,
    ),
    'mobilenet block': (
        lambda: torchvision.models.mobilenet_v2(num_classes=7),
        {'features.5': {'granularity': 'patch', 'grid_size': 2}},
        ModuleExperts,
    ),
    'siblings': (Head, {'{cls_convs,cls}': {}}, ModuleExperts),
    'list': (Head, {'cls_convs': {}, 'reg': {}}, None),
    'token linear': (Encoder, {'mix': {'granularity': 'token'}}, LinearExperts),
    'image linear': (Encoder, {'mix': {}}, ModuleExperts),
    'ffn with identity': (Encoder, {'ffn': {'granularity': 'token'}}, ModuleExperts),
    'ffn of an image': (Encoder, {'ffn': {}}, ModuleExperts),
    'sequence first': (
        lambda: Encoder(sequence_first=True),
        {'ffn': {'granularity': 'token', 'batch_dim': 1}, 'mix': {'batch_dim': 1}},
        None,
    ),
    'shared expert': (
        lambda: torchvision.models.resnet18(num_classes=7),
        {'layer4': {'shared': 2}, 'layer3.1.conv1': {'shared': 1}},
        None,
    ),
}


def inputs_of(model):
    if isinstance(model, Head):
        return levels()
    return torch.randn(3, 7, 6) if isinstance(model, Encoder) else torch.randn(3, 3, 64, 64)


@pytest.mark.parametrize('name', CASES)
def test_untrained_experts_are_the_dense_model(name):
    """Outputs, gradients (those of the copies sum to the dense one), checkpoints, copies."""
    make, experts, kind = CASES[name]
    dense = make().eval()
    moe, _ = changed(dense, experts)
    x = inputs_of(dense)
    expected = outputs_of(dense, x)
    for y, reference in zip(outputs_of(moe, x), expected, strict=True):
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5)
    for layer in find_moe_layers(moe).values():
        assert kind is None or isinstance(layer.experts, kind)
        assert len(set(layer.routing.expert_ids.flatten().tolist())) > 1  # there is a choice
    sum(y.square().sum() for y in outputs_of(moe, x)).backward()
    sum(y.square().sum() for y in expected).backward()
    for parameter_name, parameter in dense.named_parameters():
        total = sum(gradients_of(moe, parameter_name))
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(total, parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7)

    # A dense checkpoint, and one of the model itself.
    other = changed(make().eval(), experts)[0]
    missing, unexpected = other.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert all('.router.' in key for key in missing)
    for y, reference in zip(outputs_of(other, x), expected, strict=True):
        torch.testing.assert_close(y, reference, rtol=1e-5, atol=1e-5)
    other.load_state_dict(moe.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(other)))
    for a, b, c in zip(*(outputs_of(m, x) for m in (moe, other, copied)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def test_one_routing_for_all_calls_of_a_forward_pass():
    """A decision per image and level; a constraint counts them all once."""
    head = Head()
    router = {'constraint': {'type': 'mmdet_moe.RelativeImportanceConstraint'}}
    add_experts(head, {'{cls_convs,cls}': {'router': router}})
    layer = head.cls_convs_moe
    updates = []
    update = layer.router.constraint.update
    layer.router.constraint.update = lambda routing: (updates.append(routing), update(routing))
    for _ in range(2):
        head(levels())
        assert layer.routing.items_per_level == (3, 3, 3)
        assert layer.routing.level_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert layer.routing.image_ids.tolist() == [0, 1, 2] * 3
        assert [items.size for items in layer.items] == [(8, 9), (5, 6), (2, 3)]
    assert [routing.num_items for routing in updates] == [9, 9]
    head.eval()(levels())
    assert len(updates) == 2
    # By itself, outside of a forward pass of its model, every call is one.
    layer.train()(levels()[0])
    assert [routing.num_items for routing in updates] == [9, 9, 3]


def test_calls_with_other_numbers_of_images():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(3, 3)

        def forward(self, x):
            return self.conv(self.conv(x)[:1])

    model = Twice()
    add_experts(model, {'conv': {}})
    model(torch.randn(3, 3, 4, 4))
    assert model.conv.routing.num_items == 4
    with pytest.raises(RuntimeError, match='different numbers of images'):
        _ = model.conv.routing.image_ids


class TestNothingInBetween:
    """What a model does between siblings is never left out in silence."""

    @pytest.mark.parametrize(
        'between',
        [F.relu, nn.ReLU(inplace=True), lambda y: y + 1, lambda y: y.relu_(), lambda y: y.size()],
        ids=['function', 'module in place', 'operator', 'method', 'shape'],
    )
    @pytest.mark.parametrize('context', [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_activation(self, between, context):
        head = Head(between)
        add_experts(head, {'{cls_convs,cls}': {}})
        with context(), pytest.raises(ConfigError, match='cls_convs and cls cannot be one expert'):
            head(levels())

    def test_second_use(self):
        head = Head(twice=True)
        add_experts(head, {'{cls_convs,cls}': {}})
        with pytest.raises(ConfigError, match=r'conv2d.*cannot be one expert'):
            head(levels())

    def test_another_order(self):
        head = Head()
        add_experts(head, {'{cls_convs,reg}': {}})
        with pytest.raises(ConfigError, match='cannot be one expert'):
            head(levels())
        head = Head()
        add_experts(head, {'{reg,cls}': {}})
        with pytest.raises(ConfigError, match='do not run one after the other'):
            head(levels())


class Structured(nn.Module):
    """Returns its size, too, as the stages of a Swin Transformer do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, size, mask=None):
        assert mask is None
        return {'x': self.fc(x), 'size': (size[0], 2)}


def test_what_belongs_to_no_item_is_passed_on():
    dense = Structured()
    model = nn.ModuleDict({'stage': dense})
    moe, _ = changed(model, {'stage': {}})
    x = torch.randn(3, 7, 6)
    expected, got = dense(x, (4, 5), mask=None), moe['stage'](x, (4, 5), mask=None)
    torch.testing.assert_close(got['x'], expected['x'])
    assert got['size'] == (4, 2)
    with pytest.raises(ConfigError, match=r'another tensor of shape \(7, 7\)'):
        moe['stage'](x, torch.zeros(7, 7))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x), x


class Wrapper(nn.Module):
    def __init__(self, inner, call=None):
        super().__init__()
        self.inner = inner
        self.call = call or (lambda inner, x: inner(x))

    def forward(self, x):
        return self.call(self.inner, x)


@pytest.mark.parametrize(
    ('inner', 'call', 'message'),
    [
        (Two, None, 'returned 2 tensors'),
        (lambda: nn.Linear(6, 6), lambda inner, x: inner([x]), 'called with a list'),
        (
            lambda: nn.Linear(6, 6),
            lambda inner, x: F.linear(x, inner.weight),
            '"weight" of "inner"',
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 6)),
            lambda inner, x: [f(x) for f in inner],
            'iterates',
        ),
    ],
)
def test_uses_that_experts_cannot_serve(inner, call, message):
    model = Wrapper(inner(), call)
    add_experts(model, {'inner': {}})
    with pytest.raises(ConfigError, match=message):
        model(torch.randn(3, 6))


class Says(nn.Sequential):
    """As MMDetection's MobileNetV2, whose ``in_channels`` end as those of its last convolution."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.in_channels = 1280


def test_channels_are_those_of_the_first_layer_with_weights():
    model = nn.Sequential(Says(nn.ReLU(), conv(3, 8), conv(8, 4)))
    add_experts(model, {'0': {}})
    assert model[0].router.in_channels == 3
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize('granularity', ['image', 'token'])
def test_an_input_of_other_channels_than_the_router_expects(granularity):
    """Nothing tells the channels of what the shuffle makes a layer's input of."""
    is_map = granularity == 'image'
    layer = nn.Sequential(nn.PixelShuffle(2), conv(2, 4)) if is_map else FFN()
    options = {'granularity': granularity, 'in_channels': None if is_map else 5}
    model = nn.Sequential(OrderedDict(a=layer))
    add_experts(model, {'a': options})
    x = torch.randn(3, 8, 4, 4) if is_map else torch.randn(3, 7, 6)
    found, expected = (8, 2) if is_map else (6, 5)
    message = f'"a" .* of {found} channels, .* expects {expected}; set in_channels={found}'
    with pytest.raises(ConfigError, match=message):
        model(x)
    model = nn.Sequential(OrderedDict(a=layer))
    add_experts(model, {'a': {**options, 'in_channels': found}})
    assert model(x).isfinite().all()


class Blend(nn.Module):
    """Computes vectors of vectors, each of all."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x) * x.softmax(0)


def test_experts_on_tokens_look_at_one_at_a_time():
    with pytest.raises(ConfigError, match=r'"a": granularity=.token. needs .* Blend mixes them'):
        add_experts(nn.Sequential(OrderedDict(a=Blend())), {'a': {'granularity': 'token'}})


def test_settings_of_the_dense_layer_can_be_read():
    model = Wrapper(nn.Linear(6, 5))
    add_experts(model, {'inner': {}})
    assert (model.inner.in_features, model.inner.out_features) == (6, 5)
    with pytest.raises(ReplacedAttributeError):
        _ = model.inner.weight
    assert not hasattr(model.inner, 'weight')


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.c = self.d = nn.Sequential(nn.Linear(3, 3))
        self.e = nn.Linear(3, 3)
        self.weight = self.e.weight


@pytest.mark.parametrize(
    ('model', 'experts', 'message'),
    [
        (Shares, {'a': {}}, '"a" shares its weights with "b"'),
        (Shares, {'c': {}}, '"c" shares its weights with "d"'),
        (Shares, {'{c,d}': {}}, '"c" and "d" are one module with two names'),
        (Shares, {'e': {}}, '"e" shares its weights with "Shares"'),
        (
            lambda: nn.ModuleDict({'a': nn.ModuleList([nn.ModuleList([conv(2, 2)])])}),
            {'a': {}},
            '"a" is a list of lists',
        ),
        (Head, {'cls_convs.*': {}, 'cls_convs': {}}, 'experts inside of experts'),
        (Head, {'{cls_convs,cls}': {}, 'cls': {}}, 'named twice'),
        (Head, [{'at': 'cls'}, {'at': 'c*s'}], 'named twice'),
        (Head, [], 'experts is empty'),
        (Head, [{'num_experts': 4}], "must be a dict with 'at'"),
        (Head, {'cls': {'experts': 4}}, 'unknown options experts; there are at, every'),
        (Head, {'cls': {'name': 'x'}}, "name='x' is for siblings"),
        (Head, {'{cls_convs,cls}': {'name': 'reg'}}, "name='reg' is taken"),
        (Head, {'cls': {'top_k': 5}}, '"cls": top_k=5 must lie between'),
        *(
            (Head, {'cls': {field: value}}, f"experts: at='cls'.*: {field}={value!r} must be")
            for field, value in (
                ('shared', -1),
                ('width', 'wide'),
                ('width', float('nan')),
                ('num_experts', '4'),
                ('num_experts', 4.0),
                ('top_k', True),
                ('grid_size', '4'),
                ('in_channels', '16'),
                ('in_channels', -4),
                ('upcycle_noise', float('nan')),
                ('capacity_factor', True),
                ('residual', 'no'),
                ('name', 'x.y'),
            )
        ),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 3)), {'0': {'residual': True}}, '62 pixels of 64'),
        (Head, None, 'experts=None must be a list'),
        (Head, 4, 'experts=4 must be a list'),
        (Head, 'cls', "experts='cls' must be a list"),
        (Head, {'cls': None}, "'cls' is given None; give a dict of options"),
        (Head, [{'at': ['cls']}], 'must be a path of the model'),
        (Head, {'cls': {'width': 0.5}}, '"cls": .*nothing inside'),
        (Head, {'cls_convs': {'impl': 'views'}}, 'is unknown for Chain, which is no plain'),
        (lambda: nn.Sequential(nn.ReLU()), {'0': {}}, 'has no weights'),
        (
            lambda: nn.Sequential(nn.Sequential(nn.ReLU(True), nn.Linear(2, 2))),
            {'0': {}},
            'in place',
        ),
        (lambda: nn.ModuleDict({'a': nn.ModuleDict({'b': conv(2, 2)})}), {'a': {}}, 'ModuleDict'),
        (lambda: nn.Sequential(OrderedDict(a=nn.Embedding(3, 2))), {'a': {}}, 'give in_channels'),
    ],
)
def test_refused_and_left_as_it_was(model, experts, message):
    model = model()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=message):
        add_experts(model, experts)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_experts_in_what_has_become_experts():
    model = Head()
    add_experts(model, {'{cls_convs,cls}': {}})
    with pytest.raises(ConfigError, match='lies inside of the experts "cls_convs_moe"'):
        add_experts(model, {'cls_convs_moe.experts.0.cls': {}})
    add_experts(model, {'reg': {}})  # further ones elsewhere
    model(levels())
    assert len(find_moe_layers(model)) == 2


def test_equal_width_costs_what_the_dense_layer_does():
    """k active experts against the dense stage; a dense checkpoint loads in parts."""
    dense = torchvision.models.resnet18(num_classes=7).eval()
    moe, report = changed(dense, {'layer4': {'width': 'equal'}, 'layer3': {'width': 0.5}})
    (half, equal) = report.rows
    assert equal.active == pytest.approx(equal.dense, rel=0.1)
    assert half.width == 0.5
    expert = moe.layer3.experts[0]
    assert expert[0].conv1.out_channels == 128
    assert expert[0].conv2.out_channels == 256
    # At once, as when the dense checkpoint is loaded.
    start = copy.deepcopy(moe.layer3.state_dict())
    missing, unexpected = moe.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert all('.router.' in key for key in missing)
    for name, value in moe.layer3.state_dict().items():
        assert torch.equal(value, start[name]), name
    first, last = (moe.layer3.experts[e][0].conv1.weight for e in (0, 2))
    assert torch.equal(first, dense.layer3[0].conv1.weight[:128])
    assert torch.equal(last, dense.layer3[0].conv1.weight[128:])
    torch.testing.assert_close(
        moe.layer3.experts[2][0].conv2.weight, 2 * dense.layer3[0].conv2.weight[:, 128:]
    )


def test_scaled_outputs_are_warned_of(capfd):
    add_experts(Head(), {'cls': {'num_experts': 3, 'top_k': 1}, 'reg': {}})
    assert ''.join(capfd.readouterr()).count("softmax='over_all'") == 1


def test_residual():
    dense = torchvision.models.resnet18(num_classes=7).eval()
    moe, _ = changed(dense, {'layer4': {'residual': True}, 'layer3.1': {'residual': True}})
    x = torch.randn(2, 128, 8, 8)
    assert isinstance(moe.layer3[1].shortcut, nn.Identity)
    moe.layer3(x)
    x = torch.randn(2, 256, 8, 8)
    expected = dense.layer4(x) + moe.layer4.shortcut(x)
    torch.testing.assert_close(moe.layer4(x), expected, rtol=1e-4, atol=1e-4)


def test_shortcut_and_narrow_experts_in_the_dtype_of_the_model():
    model = torchvision.models.resnet18(num_classes=7).bfloat16().eval()
    add_experts(model, {'layer4': {'residual': True, 'width': 'equal'}})
    for part in (model.layer4.shortcut, model.layer4.experts):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_checkpoint_of_torchvision(tmp_path):
    """Weights in a file, as torchvision's are; only the backbone has experts."""
    dense = torchvision.models.resnet50(num_classes=10).eval()
    torch.save(dense.state_dict(), tmp_path / 'resnet50.pth')
    moe = torchvision.models.resnet50(num_classes=10).eval()
    add_experts(moe, {'layer4': {'num_experts': 3}})
    moe.load_state_dict(torch.load(tmp_path / 'resnet50.pth'), strict=False)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(moe(x), dense(x), rtol=1e-5, atol=1e-5)


def test_frozen_layers_stay_frozen():
    model = Head().requires_grad_(False)
    add_experts(model, {'cls': {}, '{cls_convs,reg}': {}})
    assert not any(p.requires_grad for p in model.parameters())


def test_one_expert_is_the_dense_layer():
    """Nothing is moved, and the router has a gradient of zeros."""
    dense = nn.Sequential(conv(3, 4), nn.ReLU(inplace=True))
    moe, _ = changed(nn.Sequential(dense), {'0': {'num_experts': 1, 'top_k': 1}})
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(moe(x), dense(x))
    nn.ReLU(inplace=True)(moe(x)).sum().backward()
    dense(x).sum().backward()
    assert torch.equal(moe[0].experts[0][0].weight.grad, dense[0].weight.grad)
    assert not moe[0].router.fc.weight.grad.any()


def test_layers_know_their_names():
    model = Head()
    add_experts(model, {'cls_convs': {}, 'reg': {}})
    layers = find_moe_layers(model)
    assert sorted(layers) == ['cls_convs_moe', 'reg']
    assert all(isinstance(layer, MoELayer) and layer.name == n for n, layer in layers.items())


class Checkpointed(nn.Module):
    """Computes its convolution again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.before, self.conv = conv(3, 4), conv(4, 4)
        self.is_on, self.reentrant = False, False

    def forward(self, x):
        x = self.before(x)
        if self.is_on:
            return torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=self.reentrant)
        return self.conv(x)


class CheckpointedLevels(nn.Module):
    """A head that computes all levels, one after the other, again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.before = conv(3, 4)
        self.conv = nn.Sequential(conv(4, 4), nn.GELU(), conv(4, 4))
        self.is_on, self.reentrant = False, False

    def levels(self, *maps):
        return tuple(self.conv(x).tanh() for x in maps)

    def forward(self, maps):
        maps = [self.before(x) for x in maps]
        if self.is_on:
            maps = torch.utils.checkpoint.checkpoint(
                self.levels, *maps, use_reentrant=self.reentrant
            )
            return sum(y.square().sum() for y in maps)
        return sum(y.square().sum() for y in self.levels(*maps))


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('router', [{'init': 'kmeans'}, {'normalise_levels': 1, 'init_std': 3.0}])
def test_activation_checkpoint_of_normalised_levels(router, reentrant):
    """The statistics move with every pass, and all calls of it go by the same ones."""
    plain = CheckpointedLevels()
    add_experts(
        plain,
        {
            'conv': dict(
                num_experts=3,
                top_k=1,
                router=dict(router, noise=False, softmax='straight_through'),
                expert_init='independent',
            )
        },
    )
    checkpointed = copy.deepcopy(plain)
    checkpointed.is_on, checkpointed.reentrant = True, reentrant
    for step in range(13):  # of which the last ones are normalised in the other way
        torch.manual_seed(step)
        maps = [torch.randn(8, 3, n, n) + 3 * n * torch.randn(8, 3, 1, 1) for n in (4, 2, 1)]
        for model in (plain, checkpointed):
            model.zero_grad()
            model(maps).backward()
        for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)
        for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True):
            assert torch.equal(a, b)
    norm = plain.conv.router.norm
    assert norm.batches.tolist() == [13]
    # What training decides is what inference decides with the weights of that moment.
    expected = copy.deepcopy(plain).eval()
    expected(maps)
    plain(maps)
    assert torch.equal(plain.conv.routing.expert_ids, expected.conv.routing.expert_ids)
    assert len(plain.conv.routing.expert_ids.unique()) == 3


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpoints_of_passes_that_are_normalised_differently(reentrant):
    """Two passes of one backward pass are refused, unless they are told to be one."""
    plain = CheckpointedLevels()
    router = dict(normalise_levels=1, init_std=3.0, noise=False)
    add_experts(plain, {'conv.0': dict(router=router, expert_init='independent')})
    again = copy.deepcopy(plain)
    again.is_on, again.reentrant = True, reentrant

    def loss_of(model):
        return sum(model([scale * torch.randn(8, 3, 4, 4)]) for scale in (1, 9))

    with pytest.raises(ConfigError, match='normalise_levels, level 0: an activation checkpoint'):
        loss_of(copy.deepcopy(again)).backward()
    for model in (plain, again):
        torch.manual_seed(0)
        model.zero_grad()
        model.conv[0].begin()
        loss = loss_of(model)
        model.conv[0].end()
        loss.backward()
    check_same_gradients(plain, again)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('kind', ['RelativeImportanceConstraint', 'BiasBalancing', None])
def test_activation_checkpoint(kind, reentrant):
    """The same gradients and the same state as without, over several steps; noise included."""
    router = {'init_std': 3.0}
    if kind is not None:
        # So little that another choice after every step is the rule.
        least = {'threshold': 0.0} if kind.startswith('Relative') else {'update_rate': 0.3}
        router['constraint'] = {'type': f'mmdet_moe.{kind}', **least}
    plain = Checkpointed()
    add_experts(plain, {'conv': {'router': router, 'expert_init': 'independent'}})
    checkpointed = copy.deepcopy(plain)
    checkpointed.is_on, checkpointed.reentrant = True, reentrant
    for step in range(4):
        for model in (plain, checkpointed):
            torch.manual_seed(step)
            x = torch.randn(6, 3, 5, 5)
            model.zero_grad()
            model(x).square().sum().backward()
        assert torch.equal(plain.conv.routing.expert_ids, checkpointed.conv.routing.expert_ids)
        for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)
        for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True):
            assert torch.equal(a, b)


LEAST = {
    'RelativeImportanceConstraint': {'threshold': 0.0},
    'BiasBalancing': {'update_rate': 0.3},
}


def checkpointed(kind, reentrant=False, **options):
    """The same model without and with a checkpoint, and a constraint that changes every choice."""
    constraint = {'type': f'mmdet_moe.{kind}', **LEAST[kind], **options}
    router = {'init_std': 3.0, 'constraint': constraint}
    plain = Checkpointed()
    add_experts(plain, {'conv': {'router': router, 'expert_init': 'independent'}})
    again = copy.deepcopy(plain)
    again.is_on, again.reentrant = True, reentrant
    return plain, again


def check_same_gradients(plain, again):
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('kind', LEAST)
def test_checkpoints_of_passes_that_went_by_different_states(kind, reentrant):
    _, model = checkpointed(kind, reentrant)
    losses = [model(torch.randn(6, 3, 5, 5)).square().sum() for _ in range(2)]
    with pytest.raises(ConfigError, match=f'{kind}: an activation checkpoint .* has changed; call'):
        sum(losses).backward()


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('kind', LEAST)
def test_checkpoints_of_what_is_one_pass(kind, reentrant):
    """Two views, told to the layer to be one pass: the gradients of the model without them."""
    plain, again = checkpointed(kind, reentrant)
    for step in range(3):
        for model in (plain, again):
            torch.manual_seed(step)
            model.zero_grad()
            model.conv.begin()
            loss = sum(model(torch.randn(6, 3, 5, 5)).square().sum() for _ in range(2))
            model.conv.end()
            loss.backward()
        assert plain.conv.routing.num_items == again.conv.routing.num_items == 12
        check_same_gradients(plain, again)


def test_checkpoints_of_passes_that_went_by_the_same():
    """Nobody is masked, whatever the importance: nothing to be mistaken."""
    plain, again = checkpointed('RelativeImportanceConstraint', threshold=1e6)
    for model in (plain, again):
        torch.manual_seed(0)
        sum(model(torch.randn(6, 3, 5, 5)).square().sum() for _ in range(2)).backward()
    check_same_gradients(plain, again)


@pytest.mark.parametrize('kind', LEAST)
def test_passes_that_nobody_asks_for_a_gradient(kind):
    """One that was given up, and one whose loss is kept after its backward pass."""
    plain, again = checkpointed(kind)
    kept = []
    for model in (plain, again):
        for step in range(3):
            torch.manual_seed(step)
            model.zero_grad()
            model(torch.randn(6, 3, 5, 5))
            kept.append(model(torch.randn(6, 3, 5, 5)).square().sum())
            kept[-1].backward()
    check_same_gradients(plain, again)
    pickle.loads(pickle.dumps(copy.deepcopy(again)))


def test_a_graph_that_is_kept_may_be_asked_again():
    plain, again = checkpointed('BiasBalancing')
    for model in (plain, again):
        torch.manual_seed(0)
        loss = model(torch.randn(6, 3, 5, 5)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
    check_same_gradients(plain, again)
    other = again(torch.randn(6, 3, 5, 5)).square().sum()
    with pytest.raises(ConfigError, match='an activation checkpoint'):
        (loss + other).backward()


def test_a_model_computed_again_as_a_whole():
    """Its pass has ended, and what it decided is still told."""
    model = Checkpointed()
    add_experts(model, {'conv': {}})
    x = torch.randn(6, 3, 5, 5)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    decided = model.conv.routing.expert_ids
    y.square().sum().backward()
    assert model.conv.routing.expert_ids is decided


class Detector(nn.Module):
    """Runs its layer level by level, and can be entered as the toolboxes' models can."""

    def __init__(self):
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, levels, mode='loss'):
        return self.loss(levels) if mode == 'loss' else self._forward(levels)

    def _forward(self, levels):
        return [self.conv(x) for x in levels]

    def loss(self, levels, fails=False):
        outputs = self._forward(levels)
        if fails:
            raise RuntimeError('out of memory')
        return sum(y.square().mean() for y in outputs)

    def predict(self, levels):
        return self._forward(levels)


def detector():
    constraint = {'type': 'mmdet_moe.MeanImportanceConstraint', 'threshold': 1.0}
    router = {'init_std': 1.0, 'constraint': constraint}
    model = Detector()
    add_experts(model, {'conv': {'router': router}})
    return model


LEVELS = [(8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize('name', ['forward', 'loss', 'predict', '_forward'])
def test_all_levels_are_one_pass_however_the_model_is_run(name):
    """MMDetection's wrappers, semi-supervised ones for example, call ``student.loss(...)``."""
    model = copy.deepcopy(detector())
    model = pickle.loads(pickle.dumps(model))
    levels = [torch.randn(6, 4, *size) for size in LEVELS]
    (model if name == 'forward' else getattr(model, name))(levels)
    layer = model.conv
    assert layer.routing.items_per_level == (6, 6, 6)
    assert layer.router.constraint.num_batches == 1
    fc = layer.router.fc
    logits = torch.cat([x.mean((2, 3)) for x in levels]) @ fc.weight.T + fc.bias
    kept = logits >= logits.topk(2).values[:, 1:]
    share = logits.masked_fill(~kept, float('-inf')).softmax(1).sum(0) / 18
    torch.testing.assert_close(layer.router.constraint.mean_importance, share.detach())


def test_a_pass_that_failed_is_none():
    model = detector()
    levels = [torch.randn(6, 4, *size) for size in LEVELS]
    with pytest.raises(RuntimeError, match='out of memory'):
        model.loss(levels, fails=True)
    assert model.conv.router.constraint.num_batches == 0
    model(levels[:2])
    assert model.conv.routing.items_per_level == (6, 6)
    assert model.conv.router.constraint.num_batches == 1


def test_attributes_that_are_no_entrances_are_left_alone():
    class Odd(nn.Module):
        predict = staticmethod(len)

        def __init__(self):
            super().__init__()
            self.conv, self.loss = conv(4, 4), nn.MSELoss()

        @staticmethod
        def _forward(x):
            return x

    model = Odd()
    add_experts(model, {'conv': {}})
    assert isinstance(model.loss, nn.MSELoss)
    assert (model.predict([1, 2]), model._forward(3)) == (2, 3)


@pytest.mark.parametrize('register', ['forward_hook', 'forward_pre_hook', 'full_backward_hook'])
def test_hooks_of_a_convolution_are_not_lost(register):
    model = nn.Sequential(conv(3, 4))
    handle = getattr(model[0], f'register_{register}')(lambda *_: None)
    with pytest.raises(ConfigError, match=r'"0": Conv2d has \S+ hooks, which its experts would'):
        add_experts(model, {'0': dict(num_experts=2)})
    handle.remove()
    add_experts(model, {'0': dict(num_experts=2)})


def test_levels_that_come_one_by_one_are_not_told_apart():
    model = nn.Sequential(conv(3, 4))
    router = dict(type='mmdet_moe.GAPRouter', normalise_levels=5)
    with pytest.raises(ConfigError, match=r'"0": normalise_levels=5 is for .* set it to 1'):
        add_experts(model, {'0': dict(num_experts=2, router=router)})
