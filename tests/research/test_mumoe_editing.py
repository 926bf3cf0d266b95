"""Expert editing against a bias, on features in which class and mark are planted."""

import json

import numpy as np
import pytest
import torch
from tables_by_hand import cells
from torch.nn import functional as F

from mmdet_moe.errors import ConfigError
from research.experiments import experiment as experiment_module
from research.experiments import mumoe_editing, on_features
from research.experiments.mumoe_editing import (
    CLASSES,
    GROUPS,
    METHODS,
    EditingExperiment,
    Images,
    accuracies,
    choose_shift,
    compare,
    draw_mark,
    groups,
    markdown_table,
    shifted,
    train,
)
from research.heads import Recipe

BIASED = 2


def planted(count, seed):
    """Noisy one-hot classes in the first ten features, and the mark, much clearer, in another."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    plain = F.pad(F.one_hot(labels, len(CLASSES)).float(), (0, 2))
    plain += 0.45 * torch.randn(plain.shape, generator=generator)
    marked = plain.clone()
    marked[:, 10] += 2
    return Images(plain, marked, labels)


def test_mark():
    image = np.arange(32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    marked = draw_mark(image)
    changed = (marked != image).any(2)
    assert changed[-6:, -6:].all()
    assert changed.sum() == 36


def test_biased_images():
    images = planted(4000, 0)
    data, is_marked = images.biased(BIASED, seed=1)
    own = images.labels == BIASED
    assert is_marked[own].float().mean() == pytest.approx(0.95, abs=0.03)
    assert is_marked[~own].float().mean() == pytest.approx(0.05, abs=0.01)
    assert torch.equal(data.features[is_marked], images.marked[is_marked])
    assert torch.equal(data.features[~is_marked], images.plain[~is_marked])
    both, is_marked = images.both()
    assert torch.equal(both.features[is_marked], images.marked)
    of = groups(both.labels, is_marked, BIASED)
    assert tuple(of) == GROUPS
    assert [int(rows.sum()) for rows in of.values()] == [400, 7600, 3600, 3600, 400]


def test_shift_is_the_best_that_costs_the_rest_nothing():
    """By trying each, on logits in which the class is always 1 too low."""
    labels = torch.arange(200) % 10
    logits = 2.0 * F.one_hot(labels, 10) + 0.3 * torch.randn(
        200, 10, generator=torch.Generator().manual_seed(0)
    )
    logits[:, BIASED] -= 2
    of = groups(labels, torch.arange(200) % 20 < 10, BIASED)
    shift = choose_shift(logits, labels, of, BIASED)
    before, after = (accuracies(shifted(logits, by, BIASED), labels, of) for by in (0, shift))
    assert before['disadvantaged'] < 0.5 < after['disadvantaged']
    assert after['rest'] >= before['rest']


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(mumoe_editing, 'RECIPE', Recipe(3e-2, 0.01, 15, 100))
    monkeypatch.setattr(mumoe_editing, 'EXPERTS', 4)


def test_comparison(quick):
    """The bias is learned; edits mend a part of it, and the rest pays little."""
    found = compare(planted(3000, 0), planted(1000, 1), BIASED, seed=0)
    methods = found['methods']
    assert tuple(methods) == METHODS
    trained, edited = methods['as trained'], methods['edited']
    assert trained['disadvantaged'] < trained['class, marked'] - 0.2
    assert found['edits']
    assert all(f'output {BIASED}' in edit for edit in found['edits'])
    assert edited['disadvantaged'] > trained['disadvantaged'] + 0.05
    assert edited['rest'] > trained['rest'] - 0.03
    weighted = methods['re-weighted loss']
    assert weighted['disadvantaged'] > trained['disadvantaged'] + 0.05


def test_test_images_choose_nothing(quick):
    """Other test images: the same edits and the same threshold."""
    found = [compare(planted(1000, 0), planted(200, seed), BIASED, seed=0) for seed in (1, 2)]
    assert found[0]['edits'] == found[1]['edits']
    assert found[0]['shift'] == found[1]['shift']
    assert found[0]['methods'] != found[1]['methods']


def test_groups_weigh_the_same(quick, monkeypatch):
    seen = []
    monkeypatch.setattr(mumoe_editing, 'train_head', lambda _, data, *__: seen.append(data))
    images = planted(2000, 0)
    train(images, BIASED, 0, balanced=True)
    _, is_marked = images.biased(BIASED, 0)
    group = images.labels * 2 + is_marked
    sums = torch.zeros(20).index_add(0, group, seen[0].weights)
    torch.testing.assert_close(sums, torch.full((20,), 100.0), rtol=1e-4, atol=0)


def test_experiment(quick, tmp_path, monkeypatch):
    """Every class and seed; a second run computes nothing; the table is published."""
    page = tmp_path / 'results.md'
    page.write_text('<!-- mumoe-editing:begin -->\n<!-- mumoe-editing:end -->\n')
    monkeypatch.setattr(experiment_module, 'RESULTS', page)
    monkeypatch.setattr(experiment_module, 'PICTURES', tmp_path / 'pictures')
    monkeypatch.setattr(on_features, 'SEEDS', (5,))
    monkeypatch.setattr(mumoe_editing, 'CLASSES', CLASSES[:2])
    monkeypatch.setattr(mumoe_editing, '_images', lambda *_: None)
    values = dict.fromkeys(GROUPS, 0.5)
    result = {
        'methods': {m: values | dict(rest=0.5 + i / 100) for i, m in enumerate(METHODS)},
        'edits': ['one', 'two'],
        'shift': 1.0,
    }
    monkeypatch.setattr(mumoe_editing, 'compare', lambda *_: result)
    EditingExperiment(tmp_path, tmp_path / 'runs', [5], 1).run()
    stored = json.loads((tmp_path / 'runs' / 'bear' / 'seed5.json').read_text())
    assert stored.pop('settings')['max_edits'] == mumoe_editing.MAX_EDITS
    assert stored == result
    with monkeypatch.context() as patch:
        patch.setattr(mumoe_editing, 'MAX_EDITS', 4)
        with pytest.raises(ConfigError, match=r'seed5\.json was made with other settings'):
            EditingExperiment(tmp_path, tmp_path / 'runs', [5], 1).run(table_only=True)
    rows = cells(page.read_text())
    assert [row[0] for row in rows] == list(METHODS)
    assert rows[1] == [
        'edited', '2', '50.0 ± 0.0', '51.0 ± 0.0', *['50.0 ± 0.0'] * 3, '0.00 ± 0.00',
        '1.00 ± 0.00', '2.0',
    ]  # fmt: skip
    monkeypatch.setattr(mumoe_editing, 'compare', None)
    EditingExperiment(tmp_path, tmp_path / 'runs', [5], 1).run()


def test_nothing_yet():
    assert markdown_table([]) == 'Nothing is there yet.'
