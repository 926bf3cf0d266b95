"""Routers that have learned nothing: what is recorded of them, and what is computed of it."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score
from synthetic import information_of
from test_study import Data
from tiny_models import build_single, make_batch
from torch import nn

from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.analysis.controls import DRAWS, Controls, RandomRouters, information_within
from mmdet_moe.analysis.recorder import Recorder
from mmdet_moe.analysis.records.contents import (
    ControlRecords,
    DecisionRecords,
    LayerRecords,
    LinkRecords,
)
from mmdet_moe.moe import ConvExperts, LinearExperts, MoELayer, add_experts
from mmdet_moe.moe.mumoe import CPMuMoE
from mmdet_moe.moe.routers import Router

LATERAL = 'neck.lateral_convs.0.conv'
MUMOE = dict(at=LATERAL, type='mmdet_moe.CPMuMoE', num_experts=(2, 3), rank=4)
PATCHES = dict(
    at=LATERAL, num_experts=3, top_k=2, granularity='patch', grid_size=2,
    router=dict(type='mmdet_moe.ConvGAPRouter', conv_channels=4),
)  # fmt: skip


def layer_of(top_k=2, experts=3, **options):
    return MoELayer(LinearExperts(4, 4, experts), experts, top_k, in_channels=4, **options)


def recorded(model):
    """The tracer, the records of three images, and the inputs of the routers by layer."""
    tracer = Tracer(model)
    tracer.controls = {name: RandomRouters.of(m, name) for name, m in tracer.layers.items()}
    inputs = {name: [] for name in tracer.layers}
    for name, layer in tracer.layers.items():

        def keep(_, given, name=name):
            inputs[name].append(given[0])

        (getattr(layer, 'router', None) or layer).register_forward_pre_hook(keep)
    with tracer:
        tracer.predict(make_batch())  # in which the tracer runs the layers more than once
        for kept in inputs.values():
            kept.clear()
        recorder = Recorder(tracer, Data())
        recorder.add([4, 5, 6], tracer.predict(make_batch()))
    return tracer, recorder.take(), inputs


def by_unit(records, values):
    """Rows that are in the order of the decisions, in the order of the controls."""
    assert records.controls.unit.tolist() == sorted(records.decisions.unit.tolist())
    return values[np.argsort(records.decisions.unit)]


def test_a_head_on_all_levels(randomise):
    """Logits are those of the fresh linear layers on the mean of each image's map."""
    tracer, records, inputs = recorded(randomise(build_single('moe retina')).eval())
    for number, (name, layer) in enumerate(tracer.layers.items()):
        routers = tracer.controls[name].routers
        assert len({tuple(r.fc.weight.flatten().tolist()) for r in (*routers, layer.router)}) == 6
        pooled = torch.cat([m.mean((2, 3)) for maps in inputs[name] for m in maps])
        expected = torch.stack([pooled @ r.fc.weight.T + r.fc.bias for r in routers], 1)
        found = records.layers[number]
        assert found.controls.logits.shape == (9, DRAWS, 4)
        np.testing.assert_allclose(
            found.controls.logits, by_unit(found, expected.numpy()), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(found.controls.level, by_unit(found, found.decisions.level))
        known = found.detections.unit >= 0
        assert np.isin(found.detections.unit[known], found.controls.unit).all()
        assert np.isin(found.links.unit, found.controls.unit).all()


def test_patches_of_a_convolutional_router(randomise):
    """The convolution is drawn anew as well, once for all draws."""
    model = build_single('retina')
    add_experts(model, [PATCHES])
    tracer, records, inputs = recorded(randomise(model).eval())
    (found,) = records.layers
    ((maps,),) = inputs.values()
    rows, columns = maps[0].shape[2] // 2, maps[0].shape[3] // 2
    routers = tracer.controls[LATERAL].routers
    own = tracer.layers[LATERAL].router.conv.weight
    assert not torch.allclose(routers[0].conv.weight, own)
    features = routers[0].conv(maps[0]).relu()
    parts = features.unfold(2, rows, rows).unfold(3, columns, columns).mean((4, 5))
    for draw, router in enumerate(routers):
        expected = router.fc(parts.permute(0, 2, 3, 1).flatten(0, 2)).detach().numpy()
        np.testing.assert_allclose(
            found.controls.logits[:, draw], by_unit(found, expected), rtol=1e-4, atol=1e-5
        )


def test_a_convolution_before_a_mean_over_the_map_is_computed_at_every_second_place(randomise):
    model = build_single('retina')
    add_experts(model, [{**PATCHES, 'granularity': 'image', 'grid_size': 1}])
    tracer, records, inputs = recorded(randomise(model).eval())
    (found,) = records.layers
    ((maps,),) = inputs.values()
    router = tracer.controls[LATERAL].routers[0]
    conv = router.conv
    full = nn.functional.conv2d(maps[0], conv.weight, conv.bias, padding=1).relu()
    expected = router.fc(full[:, :, ::2, ::2].mean((2, 3))).detach().numpy()
    np.testing.assert_allclose(
        found.controls.logits[:, 0], by_unit(found, expected), rtol=1e-4, atol=1e-5
    )
    assert tracer.layers[LATERAL].router.conv.stride == (1, 1)


def test_gates_of_a_factorised_layer(randomise):
    """Of those pixels alone that are recorded; each level has columns of its own."""
    model = build_single('retina')
    add_experts(model, [MUMOE])
    tracer, records, inputs = recorded(randomise(model).eval())
    (found,) = records.layers
    ((x,),) = inputs.values()
    gates = tracer.controls[LATERAL]
    expected = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) @ gates._weight
    np.testing.assert_allclose(
        found.controls.logits.reshape(len(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])), -1),
        by_unit(found, expected.numpy()),
        rtol=1e-4,
        atol=1e-5,
    )
    assert (gates.draws, gates.num_logits) == (DRAWS, 5)


def test_weights_are_those_of_the_layers_own_choice():
    """Top 2 by hand; with the joint coefficients of a μMoE's levels; a learned bias has no say."""
    logits = torch.tensor([[[1.0, 3.0, 2.0], [0.0, -1.0, 5.0]]])
    found = RandomRouters.of(layer_of(), 'a').weights(logits)
    e = np.exp(1)
    expected = [[0, e / (1 + e), 1 / (1 + e)], [1 / (1 + e**5), 0, e**5 / (1 + e**5)]]
    np.testing.assert_allclose(found, [expected], atol=1e-6)
    single = RandomRouters.of(layer_of(top_k=1), 'a').weights(logits)
    assert single.tolist() == [[[0, 1, 0], [0, 0, 1]]]
    biased = layer_of(
        router=dict(type='mmdet_moe.GAPRouter', constraint=dict(type='mmdet_moe.BiasBalancing'))
    )
    biased.router.constraint.bias[0] = 100
    torch.testing.assert_close(RandomRouters.of(biased, 'a').weights(logits), found)
    joint = RandomRouters.of(CPMuMoE(4, 3, (2, 2), 2, activation='softmax'), 'a')
    one, two = np.exp([1, 0]) / (1 + e), np.exp([0, 2]) / (1 + e**2)
    given = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    np.testing.assert_allclose(joint.weights(given), [np.outer(one, two).ravel()], atol=1e-6)


def test_draws_are_the_same_every_time():
    """Whatever was drawn before, and nothing drawn later depends on them."""
    layer = layer_of()
    first = RandomRouters.of(layer, 'neck.a').routers[0].fc.weight
    state = torch.get_rng_state()
    again = RandomRouters.of(layer, 'neck.a').routers[0].fc.weight
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, RandomRouters.of(layer, 'neck.b').routers[0].fc.weight)
    assert RandomRouters.of(layer_of(1, experts=1), 'one') is None
    assert RandomRouters.of(CPMuMoE(4, 3, 300, 2), 'many').draws == 2


# Of made up records -------------------------------------------------------------------------------


def made_up(rng, layer, units=400, offset=0.0):
    """Decisions on three levels, and two random routers' logits of them."""
    routers = RandomRouters.of(layer, 'a')
    level = rng.integers(0, 3, units)
    raw = rng.normal(0, 1, (units, routers.draws, 3)) * [0.1, 2, 5] + offset
    # One draw looks at the level.
    raw[:, 0, 0] += level
    own = rng.normal(0, 1.5, (units, 3)) + 2 * np.eye(3)[level]
    weights = np.exp(own) * (own > own.min(1, keepdims=True))
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    unit = np.arange(units) * 3
    decisions = DecisionRecords(
        unit.astype(np.int32),
        unit,
        level.astype(np.int32),
        np.zeros((units, 2), np.float32),
        weights,
    )
    nothing = LinkRecords(*[unit[:0]] * 4, weights[:0])
    controls = ControlRecords(unit, level.astype(np.int32), raw.astype(np.float32))
    return routers, LayerRecords(decisions, nothing, controls)


def filled(routers, records, bins, num_bins, level):
    controls = Controls(routers)
    controls.learn(records, 1.0)
    controls.use(records.controls)
    unit = records.decisions.unit
    added = ({'size': bins}, unit, np.ones(len(unit)), level, {'size': num_bins})
    controls.add('objects', *added)
    found = {'objects': {'size': {'mi': 1.0}, 'other': {}}, 'decisions': {}}
    controls.fill(found)
    assert found['objects']['other'] == {}
    return controls, found['objects']['size']['controls']


def test_a_router_that_knows_the_level_alone():
    """Its information with a size is I(size; mean weights of the level), and 0 within levels."""
    rng = np.random.default_rng(0)
    routers, records = made_up(rng, layer_of())
    level, weights = records.decisions.level, records.decisions.weights.astype(float)
    size = (level + rng.integers(0, 2, len(level))) % 4
    _, found = filled(routers, records, size, 4, level)
    means = np.stack([weights[level == each].mean(0) for each in range(3)])
    table = np.stack([means[level[size == b]].sum(0) for b in range(4)])
    assert found['level']['mi'] == pytest.approx(information_of(table), rel=1e-5)
    assert found['level']['mi'] > 0.05
    assert found['level']['given'] == {'level': pytest.approx(0, abs=1e-9)}


def test_random_routers_by_hand():
    """Standardised logits, as soft as the layer's own decisions; beyond the level by scikit-learn,
    for decisions for one expert are labels."""
    rng = np.random.default_rng(1)
    routers, records = made_up(rng, layer_of(top_k=1), offset=50.0)
    level = records.decisions.level
    size = (level + rng.integers(0, 2, len(level))) % 4
    _, found = filled(routers, records, size, 4, level)
    raw = records.controls.logits.astype(float)
    choice = ((raw - raw.mean(0)) / raw.std(0)).argmax(2)
    expected = [mutual_info_score(size, choice[:, draw]) for draw in range(DRAWS)]
    np.testing.assert_allclose(found['random']['draws'], expected, rtol=1e-6)
    assert found['random']['mi'] == pytest.approx(np.mean(expected))
    assert expected[0] > 2 * max(expected[1:])  # the one that looks at the level
    within = [
        sum(
            (level == each).mean()
            * mutual_info_score(size[level == each], choice[level == each, draw])
            for each in range(3)
        )
        for draw in range(DRAWS)
    ]
    np.testing.assert_allclose(found['random']['draws_given']['level'], within, rtol=1e-6)
    assert found['random']['given'] == {'level': pytest.approx(np.mean(within))}


def test_random_routers_are_as_selective_as_the_layers_own():
    routers, records = made_up(np.random.default_rng(2), layer_of(), offset=10.0)
    level = records.decisions.level
    controls, _ = filled(routers, records, level, 3, level)
    of_random = entropy(controls._weights[:, :DRAWS], axis=2)
    assert of_random.mean() == pytest.approx(
        entropy(records.decisions.weights, axis=1).mean(), rel=0.01
    )
    # Every expert is chosen by each of them, whatever the offsets of the logits.
    assert ((controls._weights[:, :DRAWS] > 0).mean(0) > 0.4).all()


def test_selectivity_is_that_of_all_decisions_not_of_the_first(monkeypatch):
    """Data sets may go class by class; the scale is found with 40 of 2,000 decisions."""
    rng = np.random.default_rng(3)
    routers, records = made_up(rng, layer_of(), units=2000)
    weights = records.decisions.weights
    weights[:200] = one_hot = np.eye(3)[weights[:200].argmax(1)]
    assert entropy(one_hot, axis=1).max() == 0
    monkeypatch.setattr('mmdet_moe.analysis.controls._ENTROPY_LOGITS', 200 * 3 * DRAWS)
    level = records.decisions.level
    controls, _ = filled(routers, records, level, 3, level)
    of_random = entropy(controls._weights[:, :DRAWS], axis=2).mean()
    assert of_random == pytest.approx(entropy(weights, axis=1).mean(), rel=0.15)


def test_things_without_a_bin_a_level_or_a_decision():
    """Are left out as associations leave them out; one level is no level."""
    rng = np.random.default_rng(3)
    routers, records = made_up(rng, layer_of())
    unit = records.decisions.unit
    records.decisions.level[:] = records.controls.level[:] = 0
    size = rng.integers(-1, 2, len(unit))
    controls, found = filled(routers, records, size, 2, np.zeros(len(unit), int))
    assert list(found) == ['random']
    assert found['random']['given'] == {}
    assert 'draws_given' not in found['random']
    before = found['random']['mi']
    extra = np.array([1, 2, -1])  # decisions that are not recorded
    controls.add(
        'objects', {'size': np.zeros(3, int)}, extra, np.ones(3), np.zeros(3, int), {'size': 2}
    )
    after = {'objects': {'size': {}}}
    controls.fill(after)
    assert after['objects']['size']['controls']['random']['mi'] == before


def test_information_within_strata():
    """Mean over the strata; one that is empty does not count."""
    rng = np.random.default_rng(4)
    tables = rng.random((3, 4, 5)) * np.array([1, 0, 3])[:, None, None]
    totals = tables.sum((1, 2))
    expected = sum(totals[s] * information_of(tables[s]) for s in (0, 2)) / totals.sum()
    assert information_within(tables) == pytest.approx(expected)
    assert information_within(tables * 0) == 0


def test_routers_of_other_kinds():
    """Everything of them is drawn anew, parameters of their own included."""

    class Own(Router):
        def __init__(self):
            super().__init__(4, 3, 2)
            self.matrix = nn.Parameter(torch.zeros(4, 3))

        def compute_logits(self, x, items):
            return items.pooled(x) @ self.matrix

    layer = MoELayer(LinearExperts(4, 4, 3), 3, 2, router=Own(), granularity='token').eval()
    controls = RandomRouters.of(layer, 'a')
    handle = controls.attach()
    x = torch.randn(2, 5, 4)
    layer(x)
    layer(-x)
    handle.remove()
    layer(x)
    found = controls.logits(torch.arange(20))
    assert found.shape == (20, DRAWS, 3)
    rows = torch.cat([x, -x]).flatten(0, 1)
    for draw, router in enumerate(controls.routers):
        assert router.matrix.std() > 0.1
        expected = (rows @ router.matrix).detach()
        np.testing.assert_allclose(found[:, draw], expected, atol=1e-6)
    assert not layer.router.matrix.any()
    controls.forget()
    assert controls._calls == []


@pytest.mark.parametrize('options', [{'normalise_levels': 2}, {'init': 'kmeans', 'noise': False}])
def test_levels_that_are_normalised(randomise, options):
    """By what the layer's own router has learned of each level, or of all, which is no choice."""
    layer = MoELayer(
        ConvExperts(4, 4, 1, 3),
        3,
        2,
        in_channels=4,
        router=dict(type='mmdet_moe.GAPRouter', **options),
    )
    maps = [5 + torch.randn(2, 4, 6, 6), 3 * torch.randn(2, 4, 3, 3)]
    layer(maps)  # in training
    layer.eval()
    controls = RandomRouters.of(layer, 'a')
    handle = controls.attach()
    layer(maps)
    handle.remove()
    pooled = [m.mean((2, 3)) for m in maps]
    groups = pooled if 'normalise_levels' in options else [torch.cat(pooled)]
    expected = torch.cat([(p - p.mean(0)) / (p.var(0, correction=0) + 1e-5).sqrt() for p in groups])
    for draw, router in enumerate(controls.routers):
        found = controls.logits(torch.arange(4))[:, draw]
        wanted = (expected @ router.fc.weight.T + router.fc.bias).detach()
        np.testing.assert_allclose(found, wanted, atol=1e-3)
