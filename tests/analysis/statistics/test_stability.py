"""Decisions of two checkpoints, counted by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mmdet_moe.analysis.records.files import PLAN_FILE
from mmdet_moe.analysis.report.names import run_names
from mmdet_moe.analysis.statistics import stability as module
from mmdet_moe.analysis.statistics.stability import Stability, _pairs, stability_to

BEFORE = np.array([[0.6, 0.4, 0], [0.6, 0.4, 0], [0, 0.3, 0.7], [0, 0.9, 0.1]])
AFTER = np.array([[0.5, 0, 0.5], [0.4, 0.6, 0], [0, 0.2, 0.8], [0, 0.8, 0.2]])


def test_four_decisions():
    stability = Stability(3)
    stability.add(BEFORE[:1], 2 * AFTER[:1])  # of which rows the sum does not matter
    stability.add(BEFORE[1:], AFTER[1:])
    nothing = np.array([[np.nan] * 3, [0.0] * 3])
    stability.add(nothing, np.ones((2, 3)))
    found = stability.as_dict()
    assert found['num_decisions'] == 4
    assert found['changed'] == 0.25  # the second; of two equal weights the first one counts
    # Experts of before (0, 0, 2, 1), of after (0, 1, 2, 1).
    assert found['changed_by_chance'] == pytest.approx(1 - (2 * 1 + 1 * 2 + 1 * 1) / 16)
    assert found['overlap'] == pytest.approx((1 / 3 + 1 + 1 + 1) / 4)
    assert found['weight_in_common'] == pytest.approx((0.5 + 0.8 + 0.9 + 0.9) / 4)


def test_renumbered_experts():
    """All decisions change, and none if the experts are given other numbers."""
    rng = np.random.default_rng(0)
    before = rng.random((50, 4))
    stability = Stability(4)
    stability.add(before, before[:, [1, 2, 3, 0]])
    found = stability.as_dict()
    assert (found['changed'], found['changed_relabelled']) == (1, pytest.approx(0))
    assert found['overlap'] == 1


def test_runs_of_the_same_name_can_be_told_apart(tmp_path):
    folders = [tmp_path / run / 'experts_iter_1000_val' for run in ('one', 'two')]
    found = [
        stability_to(None, folder, name)
        for folder, name in zip(folders, run_names(folders), strict=True)
    ]
    assert [entry['run'] for entry in found] == [f'{run.parent.name}/{run.name}' for run in folders]
    assert stability_to(None, folders[0])['run'] == 'experts_iter_1000_val'
    assert run_names([folders[0], tmp_path / 'two']) == ['experts_iter_1000_val', 'two']
    assert run_names(['/a/b', '/b', '/b']) == ['a/b', '//b', '//b']  # twice the same
    assert run_names([]) == []


@pytest.mark.parametrize(('experts', 'decisions'), [(4, 2000), (16, 60)])
def test_renumbered_by_chance(experts, decisions):
    """Independent decisions, uneven or few: renumbering makes them look alike, by so much."""
    load = np.array([0.7] + [0.3 / (experts - 1)] * (experts - 1))
    rng = np.random.default_rng(1)
    found = []
    for _ in range(30):
        stability = Stability(experts)
        stability.add(*(np.eye(experts)[rng.choice(experts, decisions, p=load)] for _ in range(2)))
        found.append(stability.as_dict())
    mean = {
        key: np.mean([shares[key] for shares in found])
        for key in ('changed', 'changed_by_chance', 'changed_relabelled')
    }
    by_chance = np.mean([shares['changed_relabelled_by_chance'] for shares in found])
    assert mean['changed_relabelled'] < mean['changed_by_chance'] - 0.001
    assert by_chance == pytest.approx(mean['changed_relabelled'], abs=0.015)


def test_the_same_and_nothing():
    stability = Stability(3)
    assert stability.as_dict() is None
    stability.add(BEFORE, BEFORE)
    found = stability.as_dict()
    assert (found['changed'], found['changed_relabelled']) == (0, 0)
    assert (found['overlap'], found['weight_in_common']) == (1, pytest.approx(1))


def records(first, end, rng, per_image=3, kept=1.0, width=2):
    """Images first to end - 1, whose decisions' weights are their numbers; layers a and b.

    Their places are those of maps of this width.
    """

    def layer():
        units = [(i << 28) | k for i in range(first, end) for k in range(per_image)]
        units = np.array([u for u in units if rng.random() < kept], np.int64)
        units = rng.permutation(units)
        made = SimpleNamespace(unit=units, weights=units[:, None].astype(float))
        made.centre = np.stack(np.divmod(units % (1 << 28), width), 1) + 0.5
        return SimpleNamespace(decisions=made)

    return SimpleNamespace(
        images=SimpleNamespace(index=np.arange(first, end)), layers=[layer(), layer()]
    )


@pytest.mark.parametrize('bounds', [[(0, 4), (4, 7)], [(0, 7)], [(0, 1), (1, 2), (2, 6), (6, 9)]])
def test_files_of_other_lengths(bounds):
    """Every decision that both have, once, with its own counterpart."""
    rng = np.random.default_rng(1)
    before = [records(*b, rng, kept=0.8) for b in bounds]
    after = [records(*b, rng, kept=0.8) for b in [(0, 3), (3, 6), (6, 7)]]
    found = {'a': [], 'b': []}
    for name, one, two in _pairs(before, after, {'a': (0, 1), 'b': (1, 0)}, range(9), range(9)):
        np.testing.assert_array_equal(one, two)
        found[name] += one[:, 0].tolist()

    def units(parts, number):
        return {u for part in parts for u in part.layers[number].decisions.unit.tolist()}

    for name, mine, other in (('a', 0, 1), ('b', 1, 0)):
        assert len(found[name]) == len(set(found[name])) > 5
        assert set(found[name]) == units(after, mine) & units(before, other)


def test_some_images_against_all():
    """Of a part of the images, the counterparts are those of the same images in the whole."""
    chosen, rng = [1, 2, 5, 8], np.random.default_rng(1)
    whole = [records(*b, rng) for b in [(0, 4), (4, 9)]]
    part = [records(*b, rng) for b in [(0, 3), (3, 4)]]
    for before, after, places in (
        (whole, part, (range(9), chosen)),
        (part, whole, (chosen, range(9))),
    ):
        seen = []
        for _, one, two in _pairs(before, after, {'a': (0, 0)}, *places):
            numbers = [divmod(int(w), 1 << 28) for w in (one if after is part else two)[:, 0]]
            others = [divmod(int(w), 1 << 28) for w in (two if after is part else one)[:, 0]]
            for (image, item), (index, other) in zip(numbers, others, strict=True):
                assert (image, item) == (chosen[index], other)
            seen += numbers
        assert sorted(seen) == [(image, item) for image in chosen for item in range(3)]


def test_maps_that_were_padded_otherwise():
    """The same number is another place there; where all places agree, it is not."""
    rng = np.random.default_rng(1)
    before = [records(0, 4, rng)]
    found = list(_pairs(before, [records(0, 4, rng, width=3)], {'a': (0, 0)}, range(4), range(4)))
    assert found == [('a', None, None)]
    ((_, one, two),) = _pairs(before, [records(0, 4, rng)], {'a': (0, 0)}, range(4), range(4))
    np.testing.assert_array_equal(one, two)


def test_layers_in_other_places_are_left_out(tmp_path, monkeypatch):
    """If there is no other layer, the reason says what to do."""
    plan = dict(model='m', data='d', split='val', format=1, layers=['a', 'b'], images=4)
    folder = tmp_path / 'records' / 'statistics'
    folder.mkdir(parents=True)
    (folder / PLAN_FILE).write_text(json.dumps(plan))
    study = SimpleNamespace(
        plan=plan, layers=dict.fromkeys('ab', SimpleNamespace(num_experts=3)),
        tracer=SimpleNamespace(has_fixed_items=lambda name: True), data=SimpleNamespace(chosen=()),
        records=SimpleNamespace(kind=None),
    )  # fmt: skip
    pairs = [('a', BEFORE, BEFORE), ('a', None, None), ('b', BEFORE, BEFORE)]
    monkeypatch.setattr(module, 'RecordFiles', lambda *_: ())
    monkeypatch.setattr(module, '_pairs', lambda *_: pairs)
    found = stability_to(study, tmp_path)
    assert (list(found['layers']), found['reason']) == (['b'], None)
    del pairs[2]
    found = stability_to(study, tmp_path)
    assert not found['layers']
    assert 'padded differently; take the same --max-images and batch size' in found['reason']
