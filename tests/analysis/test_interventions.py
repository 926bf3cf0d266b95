"""Interventions against all experts computed on everything and mixed by hand."""

import copy

import pytest
import torch
from torch import nn

from mmdet_moe.analysis import interventions as module
from mmdet_moe.analysis.interventions import (
    ALL,
    MANY_EXPERTS,
    Intervention,
    applied,
    decisions_held,
    decisions_noted,
    experts_remembered,
    interventions_on,
)
from mmdet_moe.moe import (
    CPMuMoE,
    GAPRouter,
    LinearExperts,
    MLPExperts,
    MoELayer,
    MuMoEConv1x1,
    MuMoEMLP,
    TRMuMoE,
)

C, OUT, E, K = 4, 5, 4, 2
GRANULARITIES = {
    'image': lambda: nn.Conv2d(C, OUT, 3, padding=1),
    'patch': lambda: nn.Conv2d(C, OUT, 3, padding=1),
    'pixel': lambda: nn.Conv2d(C, OUT, 1),
}


class Gated(GAPRouter):
    def gates(self, logits, expert_ids, weights):
        return logits.gather(1, expert_ids)


def build(granularity, softmax, randomise, top_k=K, constraint=None, kind=GAPRouter):
    router = kind(C, E, top_k, softmax=softmax, constraint=constraint)
    grid = {'grid_size': 2} if granularity == 'patch' else {}
    layer = MoELayer(
        GRANULARITIES[granularity](), E, top_k, router, granularity=granularity, **grid
    )
    return randomise(layer).double().eval()


def per_pixel(layer, x, weights):
    """(N, E, H, W) of weights (items, E)."""
    images, _, height, width = x.shape
    if layer.granularity == 'image':
        return weights.view(images, E, 1, 1).expand(-1, -1, height, width)
    if layer.granularity == 'pixel':
        return weights.view(images, height, width, E).permute(0, 3, 1, 2)
    spread = torch.zeros(images, E, height, width).double()
    weights = weights.view(images, 2, 2, E)
    for i, rows in enumerate((slice(0, height // 2), slice(height // 2, None))):
        for j, columns in enumerate((slice(0, width // 2), slice(width // 2, None))):
            spread[:, :, rows, columns] = weights[:, i, j, :, None, None]
    return spread


def dense(layer, maps, weights):
    """Every expert on everything; weights (T, E) ordered by map, image, place."""
    outputs, start = [], 0
    for x, count in zip(maps, layer.routing.items_per_level, strict=True):
        mixed = per_pixel(layer, x, weights[start : start + count])
        every = torch.stack([expert(x) for expert in layer.experts], 1)
        outputs.append((mixed[:, :, None] * every).sum(1))
        start += count
    return outputs


def weights_by_hand(logits, softmax, kind, expert, top_k=K):
    """(T, E), or None for what is drawn."""
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(top_k).indices, 1)
    if softmax == 'over_chosen':
        usual = (logits.exp() * chosen) / (logits.exp() * chosen).sum(1, keepdim=True)
    else:
        usual = logits.softmax(1) * chosen
    total = usual.sum(1, keepdim=True)
    if kind == 'only':
        weights = torch.zeros_like(logits)
        weights[:, expert] = total[:, 0]
        return weights
    if kind == 'zeroed':
        usual[:, expert] = 0
        return usual
    if kind == 'equal':
        return total.repeat(1, E) / E
    others = logits.clone()
    others[:, expert] = -torch.inf
    chosen = torch.zeros_like(logits).scatter(1, others.topk(top_k).indices, 1)
    chosen[:, expert] = 0
    weights = logits.exp() * chosen
    return weights / weights.sum(1, keepdim=True) * total


def random_maps():
    return [torch.randn(3, C, size, size + 2).double() for size in (6, 3)]


@pytest.mark.parametrize('softmax', ['over_chosen', 'over_all'])
@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize(
    ('kind', 'expert'),
    [*[(k, e) for k in ('only', 'without', 'zeroed') for e in range(E)], ('equal', None)],
)
@torch.no_grad()
def test_outputs(granularity, softmax, kind, expert, randomise):
    layer, maps = build(granularity, softmax, randomise), random_maps()
    before = layer(maps)
    logits = layer.routing.logits
    with applied(Intervention('a.b', kind, expert), {'a.b': layer}):
        changed = layer(maps)
        expected = dense(layer, maps, weights_by_hand(logits, softmax, kind, expert))
    for y, reference in zip(changed, expected, strict=True):
        torch.testing.assert_close(y, reference, rtol=0, atol=1e-10)
    assert kind in ('without', 'zeroed') or not torch.equal(changed[0], before[0])
    for y, reference in zip(layer(maps), before, strict=True):
        assert torch.equal(y, reference)


@pytest.mark.parametrize('top_k', [1, K, E])
@torch.no_grad()
def test_without_is_a_router_with_one_expert_less(top_k, randomise):
    softmax = 'over_all' if top_k == 1 else 'over_chosen'
    layer, maps = build('image', softmax, randomise, top_k), random_maps()
    usual = layer(maps) and layer.routing
    for expert in range(E):
        with applied(Intervention('a', 'without', expert), {'a': layer}):
            found = layer(maps)
            routing = layer.routing
        weights = weights_by_hand(usual.logits, softmax, 'without', expert, top_k)
        torch.testing.assert_close(routing.dense_weights(), weights)
        assert (routing.dense_weights()[:, expert] == 0).all()
        torch.testing.assert_close(routing.weights.sum(1), usual.weights.sum(1))
        if softmax == 'over_chosen':
            other = copy.deepcopy(layer)
            other.router.fc.bias[expert] = -torch.inf
            chosen, weights = other.router.choose(
                usual.logits.index_fill(1, torch.tensor([expert]), -torch.inf), training=False
            )
            assert torch.equal(routing.expert_ids, chosen)
            torch.testing.assert_close(routing.weights, weights)
        for y, reference in zip(found, dense(layer, maps, routing.dense_weights()), strict=True):
            torch.testing.assert_close(y, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ('kind', 'expert'), [('only', 1), ('equal', None), ('without', 2), ('random', None)]
)
@torch.no_grad()
def test_gates_keep_their_sum(kind, expert, randomise):
    layer, maps = build('image', 'over_all', randomise, kind=Gated), random_maps()
    layer.router.fc.bias -= 1
    layer(maps)
    usual = layer.routing
    with applied(Intervention('a', kind, expert), {'a': layer}):
        found = layer(maps)
        routing = layer.routing
    assert (usual.gates < 0).any()
    torch.testing.assert_close(routing.gates.sum(1), usual.gates.sum(1))
    factors = torch.zeros_like(usual.logits).scatter(1, routing.expert_ids, routing.gates)
    for y, reference in zip(found, dense(layer, maps, factors), strict=True):
        torch.testing.assert_close(y, reference, rtol=0, atol=1e-10)
    if kind == 'without':
        shares = usual.logits.index_fill(1, torch.tensor([expert]), -torch.inf).softmax(1)
        shares = shares.gather(1, routing.expert_ids)
        expected = shares / shares.sum(1, keepdim=True) * usual.gates.sum(1, keepdim=True)
        torch.testing.assert_close(routing.gates, expected)


@torch.no_grad()
def test_zeroed_gates_and_weights_keep_the_others(randomise):
    layer, maps = build('image', 'over_all', randomise, kind=Gated), random_maps()
    layer(maps)
    usual = layer.routing
    expert = int(usual.expert_ids[0, 0])
    with applied(Intervention('a', 'zeroed', expert), {'a': layer}):
        found = layer(maps)
    chosen = usual.expert_ids == expert
    for values, before in (
        (layer.routing.gates, usual.gates),
        (layer.routing.weights, usual.weights),
    ):
        assert not values[chosen].any()
        assert torch.equal(values[~chosen], before[~chosen])
    factors = torch.zeros_like(usual.logits).scatter(1, usual.expert_ids, usual.gates)
    factors[:, expert] = 0
    for y, reference in zip(found, dense(layer, maps, factors), strict=True):
        torch.testing.assert_close(y, reference, rtol=0, atol=1e-10)


@torch.no_grad()
def test_without_under_a_biased_choice(randomise):
    """The bias of a loss-free constraint takes part in the choice, but not in the weights."""
    layer = build('image', 'over_chosen', randomise, constraint={'type': 'mmdet_moe.BiasBalancing'})
    bias = torch.tensor([5.0, -5, 0.1, 0])
    layer.router.constraint.bias.copy_(bias)
    maps = random_maps()
    for expert in range(E):
        with applied(Intervention('a', 'without', expert), {'a': layer}):
            layer(maps)
        routing = layer.routing
        others = routing.logits.index_fill(1, torch.tensor([expert]), -torch.inf)
        selection = others.softmax(1) + bias
        selection[:, expert] = -torch.inf
        assert torch.equal(routing.expert_ids, selection.topk(K).indices)
        expected = routing.logits.gather(1, routing.expert_ids).softmax(1)
        torch.testing.assert_close(routing.weights, expected)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@torch.no_grad()
def test_random_decisions(granularity, randomise):
    layer, maps = build(granularity, 'over_chosen', randomise), random_maps()
    layer(maps)
    usual = layer.routing
    found = []
    for seed in ((1, 2), (1, 2), (1, 3)):
        with applied(Intervention(ALL, 'random'), {'a': layer}, seed):
            outputs = layer(maps)
        assert torch.equal(layer.routing.weights, usual.weights)
        chosen = layer.routing.expert_ids
        assert (chosen[:, 0] != chosen[:, 1]).all()
        expected = dense(layer, maps, layer.routing.dense_weights())
        for y, reference in zip(outputs, expected, strict=True):
            torch.testing.assert_close(y, reference, rtol=0, atol=1e-10)
        found.append(chosen)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@torch.no_grad()
def test_random_decisions_are_uniform(randomise):
    """Each ordered pair of different experts equally often; new draws in each forward pass."""
    layer = build('pixel', 'over_chosen', randomise)
    counts = torch.zeros(E, E)
    x = torch.randn(2, C, 40, 40).double()
    with applied(Intervention('a', 'random'), {'a': layer}, (3,)):
        previous = None
        for _ in range(3):
            layer(x)
            chosen = layer.routing.expert_ids
            counts.index_put_(tuple(chosen.T), torch.ones(len(chosen)), accumulate=True)
            assert previous is None or not torch.equal(chosen, previous)
            previous = chosen
    assert not counts.diagonal().any()
    expected = 9600 / 12
    pairs = counts[~torch.eye(E, dtype=torch.bool)]
    # 11 degrees of freedom: chi² above 31.3 in one of a thousand draws.
    assert ((pairs - expected) ** 2 / expected).sum() < 31.3


class Two(nn.Module):
    """Two layers, one after the other."""

    def __init__(self):
        super().__init__()
        self.first = MoELayer(LinearExperts(C, C, E), E, K, in_channels=C, granularity='pixel')
        self.second = MoELayer(MLPExperts(C, 6, OUT, E), E, K, in_channels=C, granularity='pixel')

    def forward(self, x):
        return self.second(self.first(x))


@torch.no_grad()
def test_one_layer_or_all(randomise):
    model = randomise(Two()).eval()
    layers = {'first': model.first, 'second': model.second}
    x = torch.randn(2, C, 5, 5)
    model(x)
    usual = {name: layer.routing.expert_ids for name, layer in layers.items()}
    for target in ('first', 'second', ALL):
        with applied(Intervention(target, 'equal'), layers):
            model(x)
            for name, layer in layers.items():
                changed = layer.routing.top_k == E
                assert changed == (target in (name, ALL))
                if not changed and target != 'first':
                    assert torch.equal(layer.routing.expert_ids, usual[name])


@pytest.mark.parametrize('fails', [False, True])
@torch.no_grad()
def test_nothing_is_left_behind(fails, randomise):
    model = randomise(Two()).eval()
    layers = {'first': model.first, 'second': model.second}
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(2, C, 5, 5)
    before = model(x)
    for intervention in interventions_on(layers):
        try:
            with applied(intervention, layers):
                assert torch.isfinite(model(x)).all()
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_list_of_interventions():
    model = Two()
    two = {'first': model.first, 'second': model.second}
    found = interventions_on(two)
    for name in two:
        mine = [i for i in found if i.layer == name]
        assert [i.expert for i in mine if i.kind == 'only'] == list(range(E))
        assert [i.expert for i in mine if i.kind == 'without'] == list(range(E))
        assert [i.expert for i in mine if i.kind == 'zeroed'] == list(range(E))
        assert sorted(i.kind for i in mine if i.expert is None) == ['equal', 'random']
    assert sorted(i.kind for i in found if i.layer == ALL) == ['equal', 'random']
    assert len(found) == len(set(found)) == 2 * (3 * E + 2) + 2
    assert ALL not in {i.layer for i in interventions_on({'first': model.first})}
    alone = MoELayer(LinearExperts(C, C, 1), 1, 1, in_channels=C, granularity='pixel')
    assert interventions_on({'alone': alone}) == []
    assert len(interventions_on({'alone': alone, **two})) == len(found)


class Levels(nn.Module):
    """A head that is called once for each level, and a layer behind it that is called once."""

    def __init__(self, granularity):
        super().__init__()
        grid = {'grid_size': 2} if granularity == 'patch' else {}
        options = dict(in_channels=C, granularity=granularity, **grid)
        self.head = MoELayer([Rows(C) for _ in range(E)], E, K, **options)
        self.last = MoELayer([Rows(C) for _ in range(E)], E, K, **options)

    def forward(self, maps):
        return [*map(self.head, maps), self.last(self.head(maps[0]) + maps[0])]


class Rows(nn.Conv2d):
    """An expert that counts its items."""

    def __init__(self, channels):
        super().__init__(channels, channels, 1)
        self.rows = 0

    def forward(self, x):
        self.rows += len(x)
        return super().forward(x)


def rows_of(layer):
    counted = sum(expert.rows for expert in layer.experts)
    for expert in layer.experts:
        expert.rows = 0
    return counted


@pytest.mark.parametrize('budget', [module.MEMORY_BYTES, 3000, 0])
@pytest.mark.parametrize('granularity', GRANULARITIES)
@torch.no_grad()
def test_experts_compute_an_input_once(granularity, budget, randomise, monkeypatch):
    """Outputs are those without a memory, whatever fits into it."""
    monkeypatch.setattr(module, 'MEMORY_BYTES', budget)
    model, maps = randomise(Levels(granularity)).double().eval(), random_maps()
    layers = {'head': model.head, 'last': model.last}
    found = interventions_on(layers)

    def run():
        outputs = []
        for number, intervention in enumerate(found):
            with applied(intervention, layers, (number,)):
                outputs.append(model([x.clone() for x in maps]))
        return outputs

    expected = run()
    rows = {name: rows_of(layer) for name, layer in layers.items()}
    with experts_remembered(model, layers):
        outputs = run()
    for one, other in zip(outputs, expected, strict=True):
        for y, reference in zip(one, other, strict=True):
            torch.testing.assert_close(y, reference, rtol=0, atol=1e-10)
    if budget > 3000:
        items = {'image': 3 + 3, 'patch': 4 * 6, 'pixel': 3 * (6 * 8 + 3 * 5)}[granularity]
        assert rows_of(model.head) == E * items  # each expert, each of the two inputs
        # Inputs that others changed are as expensive as before, or as the first one.
        assert rows_of(model.last) <= rows['last'] + E * items
    if budget == 0:
        assert {name: rows_of(layer) for name, layer in layers.items()} == rows
    assert not any(m._forward_hooks for m in model.modules())
    assert 'run_experts' not in vars(model.head)


@torch.no_grad()
def test_inputs_may_change_in_place(randomise):
    layer = build('image', 'kept', randomise)
    x = torch.randn(3, C, 6, 8).double()

    def run(x):
        with applied(Intervention('a', 'equal'), {'a': layer}):
            return layer(x), layer(x.relu_()), layer(x)

    expected = run(x.clone())
    with experts_remembered(nn.Identity(), {'a': layer}):
        for y, reference in zip(run(x), expected, strict=True):
            torch.testing.assert_close(y, reference)


class WithIdentity(nn.Linear):
    """As in FFNs of transformers: a second tensor with its own row for each item."""

    def forward(self, x, identity, scale=1):
        return {'y': super().forward(x) * scale + identity, 'scale': scale}


@torch.no_grad()
def test_inputs_are_all_that_the_experts_are_given(randomise):
    layer = MoELayer(
        [WithIdentity(C, C) for _ in range(E)], E, K, in_channels=C, granularity='token'
    )
    randomise(layer).eval()
    x, a, b = torch.randn(3, 2, 5, C)
    calls = [(a, 1), (b, 1), (a, 2), (a, 1)]

    def run():
        with applied(Intervention('a', 'equal'), {'a': layer}):
            return [layer(x, identity=i, scale=s) for i, s in calls]

    expected = run()
    with experts_remembered(nn.Identity(), {'a': layer}):
        outputs = run()
    for (_, scale), output, reference in zip(calls, outputs, expected, strict=True):
        assert output['scale'] == scale
        torch.testing.assert_close(output['y'], reference['y'])
    assert not torch.allclose(outputs[0]['y'], outputs[1]['y'])
    assert torch.equal(outputs[0]['y'], outputs[3]['y'])


# μMoE layers -------------------------------------------------------------------------------------

FACTORISED = {
    'cp': lambda levels: CPMuMoE(C, OUT, levels, 7),
    'tr': lambda levels: TRMuMoE(C, OUT, levels, 3, bias=False, norm='ln'),
    'conv': lambda levels: MuMoEConv1x1(C, OUT, levels, 7, activation='softmax'),
}


def with_gate(layer):
    """A layer whose coefficients differ between items."""
    for weight in layer.gate.weights:
        torch.nn.init.normal_(weight)
    return layer.double().eval()


def materialised(layer, rows, joint):
    """``sum_n a_n (W_n x + b_n)`` of rows (T, I) and coefficients (T, N1, ...)."""
    if layer.experts.bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    weights = layer.experts.materialise().flatten(end_dim=-3)
    return torch.einsum('tn,ti,nio->to', joint.flatten(1), rows, weights)


@pytest.mark.parametrize('levels', [(4,), (2, 3)])
@pytest.mark.parametrize('kind', FACTORISED)
@torch.no_grad()
def test_coefficients_are_changed(kind, levels):
    """Against the whole tensor of weights and joint coefficients made by hand."""
    layer = with_gate(FACTORISED[kind](levels))
    x = torch.randn(3, C, 4, 5) if kind == 'conv' else torch.randn(3, 6, C)
    x = x.double()
    rows = (x.movedim(1, -1) if kind == 'conv' else x).reshape(-1, C)
    before = layer(x)
    parts = layer.coefficients(rows)
    joint = parts[0] if len(parts) == 1 else parts[0][:, :, None] * parts[1][:, None]

    def changed(intervention, seed=(0,)):
        with applied(intervention, {'a': layer}, seed):
            y = layer(x)
        assert torch.equal(layer(x), before)
        assert 'mix' not in vars(layer)
        return (y.movedim(1, -1) if kind == 'conv' else y).reshape(-1, OUT)

    def expect(intervention, weights):
        reference = materialised(layer, rows, weights)
        torch.testing.assert_close(changed(intervention), reference, rtol=0, atol=1e-10)

    size = joint[0].numel()
    for expert in range(size):
        one = torch.zeros_like(joint).flatten(1)
        one[:, expert] = 1
        expect(Intervention('a', 'only', expert), one)
        others = joint.flatten(1).clone()
        others[:, expert] = 0
        expect(Intervention('a', 'zeroed', expert), others)
    expect(Intervention(ALL, 'equal'), torch.full_like(joint, 1 / size))
    drawn = [changed(Intervention('a', 'random'), seed) for seed in ((1,), (1,), (2,))]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])


@torch.no_grad()
def test_random_coefficients_are_those_of_the_item(monkeypatch):
    layer, x = with_gate(CPMuMoE(C, OUT, (3, 4), 7)), torch.randn(50, C).double()
    usual, given = layer.coefficients(x), []
    monkeypatch.setattr(layer, 'mix', lambda rows, coefficients: given.append(coefficients) or rows)
    with applied(Intervention('a', 'random'), {'a': layer}):
        layer(x)
    for before, after in zip(usual, given[0], strict=True):
        assert not torch.equal(before, after)
        assert torch.equal(before.sort(dim=1).values, after.sort(dim=1).values)


@torch.no_grad()
def test_zeroed_in_both_layers_of_an_mlp():
    layer, x = with_gate(MuMoEMLP(C, 6, OUT, 4, 7)), torch.randn(5, C).double()
    (joint,) = layer.coefficients(x)
    joint = joint.clone()
    joint[:, 2] = 0
    with applied(Intervention('a', 'zeroed', 2), {'a': layer}):
        found = layer(x)
    rows = torch.cat([x, x.new_ones(5, 1)], 1)
    hidden = torch.einsum('tn,ti,nio->to', joint, rows, layer.hidden.materialise())
    expected = materialised(layer, nn.functional.gelu(hidden), joint)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_list_for_many_experts():
    """Nothing but zeroing is made for each of them, and of those that are asked for alone."""
    layers = {'a': CPMuMoE(C, OUT, MANY_EXPERTS + 1, 2), 'b': CPMuMoE(C, OUT, 3, 2)}
    found = interventions_on(layers, {'a': [5, 7]})
    of_a = [(i.kind, i.expert) for i in found if i.layer == 'a']
    assert of_a == [('equal', None), ('random', None), ('zeroed', 5), ('zeroed', 7)]
    kinds = [i.kind for i in found if i.layer == 'b']
    assert kinds == ['only'] * 3 + ['equal', 'random'] + ['zeroed'] * 3
    assert len(interventions_on({'a': layers['a']})) == MANY_EXPERTS + 1 + 2


@torch.no_grad()
def test_sparse_and_factorised_layers_together(randomise):
    """Experts that are remembered, and coefficients that are changed, in one model."""
    sparse = MoELayer(LinearExperts(C, C, E), E, K, in_channels=C, granularity='token')
    model = randomise(nn.Sequential(sparse, CPMuMoE(C, OUT, 3, 5))).double().eval()
    layers, x = {'0': model[0], '1': model[1]}, torch.randn(6, C).double()
    found = interventions_on(layers)
    assert {i.layer for i in found} == {'0', '1', ALL}

    def run():
        outputs = []
        for number, intervention in enumerate(found):
            with applied(intervention, layers, (number,)):
                outputs.append(model(x))
        return outputs

    expected = run()
    with experts_remembered(model, layers):
        for y, reference in zip(run(), expected, strict=True):
            torch.testing.assert_close(y, reference)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('kind', [GAPRouter, Gated])
def test_decisions_of_another_pass(granularity, kind, randomise):
    """Two calls with several maps each, held in two passes one after the other."""
    layer = build(granularity, 'over_chosen', randomise, kind=kind)
    layers = {'it': layer}
    given = [[torch.randn(2, C, 4, 4).double(), torch.randn(2, C, 4, 4).double()] for _ in range(4)]
    with decisions_noted(layers) as noted:
        for maps in given[:2]:
            layer(maps)
    own = layer(given[2])
    with decisions_held(layers, noted):
        for _ in range(2):
            for maps, routing in zip(given[2:], noted['it'], strict=True):
                factors = torch.zeros_like(routing.logits)
                factors.scatter_(1, routing.expert_ids, routing.factors)
                found = layer(maps)
                for y, wanted in zip(found, dense(layer, maps, factors), strict=True):
                    torch.testing.assert_close(y, wanted)
        other = [x[:1] for x in given[2]]  # fewer images: it decides for itself
        held = layer(other)
    for y, wanted in zip(held, own, strict=True):
        torch.testing.assert_close(y, wanted[:1])
    with decisions_held(layers, noted):
        x = torch.randn(2, C, 4, 4).double().requires_grad_()
        layer([x, x])[0].sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in layer.router.parameters())
