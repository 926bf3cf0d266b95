"""Heads on frozen features: table and picture, and all of it in miniature."""

import json

import numpy as np
import pytest
import torch
from miniature import expect_cifar, write_cifar100
from mmengine.config import Config
from tables_by_hand import cells

from mmdet_moe.analysis.models import load_model
from mmdet_moe.errors import ConfigError
from mmdet_moe.models import EfficientNetLite0
from research.experiments import experiment as experiment_module
from research.experiments import mumoe, on_features
from research.experiments.mumoe import (
    HEADS,
    LINEAR,
    Head,
    MuMoEExperiment,
    markdown_table,
    plot_polysemanticity,
    summary,
)
from research.experiments.on_features import chosen
from research.heads import Recipe, accuracy


def result(accuracy, values, by_chance):
    return {
        'accuracy': accuracy,
        'parameters': 12345,
        'loss': 1.5,
        'experts': {
            'values': values,
            'by_chance': by_chance,
            'lost': [0, 2, 4],
            'won': [0, 0, 1],
            'items': [10, 2, 3],
            'num_images': 10,
        },
    }


CP = next(head for head in HEADS if head.experts)


def test_table_and_picture(tmp_path):
    runs = [
        result(0.5, [None, 1.0, 2.0], [0.1, 2.0, 4.0]),
        result(0.6, [None, 2.0, 3.0], [0.1, None, 5.0]),
    ]
    results = {LINEAR: [{**result(0.7, [], []), 'experts': None}], CP: runs}
    linear, cp = cells(markdown_table({**results, HEADS[-1]: []}))
    assert linear == ['linear', '1', '12,345', '1.500', '70.00', *['–'] * 6]
    assert cp == [
        'CP, matched, E = 2', '2', '12,345', '1.500 ± 0.000', '55.00 ± 7.07', '2.00 ± 0.71',
        '4.00 ± 1.41', '0.50 ± 0.00', '2 of 2', '3.0', '50.0',
    ]  # fmt: skip
    assert summary(result(0, [None] * 3, [None] * 3)['experts'])['value'] is None
    plot_polysemanticity(results, tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').stat().st_size > 1000


def test_every_head_has_a_folder_of_its_own(tmp_path):
    experiment = MuMoEExperiment(tmp_path, tmp_path, [0], 1)
    assert len({experiment.path(head, 0) for head in HEADS}) == len(HEADS)


TINY = (
    LINEAR,
    Head('narrow', entry=dict(rank=5)),
    Head('CP', (2, 2), dict(type='mmdet_moe.CPMuMoE', rank=4)),
    Head('sparse', (3,), dict(granularity='token', top_k=2)),
    Head('random gate', (4,), dict(type='mmdet_moe.TRMuMoE', rank=2), random_gate=True),
)


@pytest.fixture
def data(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), tmp_path / 'lite0.pth')
    monkeypatch.setenv('EFFICIENTNET_LITE0', str(tmp_path / 'lite0.pth'))
    folder = write_cifar100(tmp_path / 'data', num_train=100, num_test=30)
    expect_cifar(monkeypatch, folder)
    mumoe._data.cache_clear()
    yield folder.parent
    mumoe._data.cache_clear()


def test_experiment(data, tmp_path, monkeypatch, capsys):
    """Trains and writes; a second run finds everything done; the tools can read what it leaves."""
    page = tmp_path / 'results.md'
    page.write_text('before\n<!-- mumoe:begin -->\n<!-- mumoe:end -->\nafter\n')
    monkeypatch.setattr(experiment_module, 'RESULTS', page)
    monkeypatch.setattr(experiment_module, 'PICTURES', tmp_path / 'pictures')
    monkeypatch.setattr(on_features, 'SEEDS', (3,))
    monkeypatch.setattr(mumoe, 'HEADS', TINY)
    monkeypatch.setattr(mumoe, 'TUNED', {head.kind: head for head in reversed(TINY)})
    recipes = (Recipe(1e-3, 1.0, 1, 50), Recipe(2e-2, 0.0, 1, 50))
    monkeypatch.setattr(mumoe, 'RECIPES', recipes)
    experiment = MuMoEExperiment(data, tmp_path / 'runs', [3], 1, TINY, recipes)
    experiment.run()
    first = page.read_text()
    assert [row[0] for row in cells(first)] == [head.name for head in TINY]
    assert (tmp_path / 'pictures' / 'mumoe-polysemanticity.png').exists()

    test = mumoe._data(data.resolve(), (tmp_path / 'runs').resolve(), 'test')
    for head in (TINY[0], *TINY[2:]):
        folder = experiment.path(head, 3).parent
        cfg = Config.fromfile(folder / 'config.py')
        model, _ = load_model(cfg, str(folder / 'head.pth'), 'cpu')
        with torch.no_grad():
            found = accuracy(model.head.fc(test.features), test.labels)
        assert found == experiment.result(head, 3)['accuracy']
    assert experiment.result(TINY[1], 3)['parameters'] == 1280 * 5 + 5 * 100 + 100
    gate = model.head.fc.gate.weights[0]
    assert float(gate.detach().std()) == pytest.approx(
        1, abs=0.1
    )  # drawn, and as it was: the loss has no say

    for head in TINY:
        tried = json.loads((tmp_path / 'runs' / f'recipe_{head.kind}.json').read_text())
        assert experiment.result(head, 3)['settings']['recipe'] == tried['best']

    capsys.readouterr()
    monkeypatch.setattr(mumoe, 'train_head', None)
    experiment.run()
    assert '5 of 5 models are trained.' in capsys.readouterr().out
    assert page.read_text() == first
    fewer = MuMoEExperiment(data, tmp_path / 'runs', [3], 1, TINY[:2], recipes)
    fewer.write()  # is nothing to replace more with
    assert page.read_text() == first
    assert 'narrow' in (fewer.written / 'mumoe.md').read_text()
    other = Head('CP', (2, 2), dict(type='mmdet_moe.CPMuMoE', rank=5))
    with pytest.raises(ConfigError, match='was made with other settings; move it away'):
        MuMoEExperiment(data, tmp_path / 'runs', [3], 1, (other,), recipes).write()


def test_recipe_is_chosen_on_held_out_training_images(data, tmp_path, monkeypatch):
    recipes = (Recipe(1e-9, 0.0, 1, 30), Recipe(1e-2, 0.0, 1, 30))
    trained, judged = [], []
    monkeypatch.setattr(mumoe, 'train_head', lambda _, part, *__, **___: trained.append(part))
    monkeypatch.setattr(
        mumoe, 'accuracy', lambda _, labels: judged.append(labels) or [0.1, 0.2][len(judged) - 1]
    )
    MuMoEExperiment(data, tmp_path, [0], 1, (LINEAR,), recipes).tune(LINEAR)
    assert chosen(tmp_path / 'recipe_linear.json') == recipes[1]
    assert [len(part) for part in trained] == [90, 90]
    assert np.array_equal(judged[0], np.arange(90, 100))


def test_bad_options(tmp_path):
    with pytest.raises(ConfigError, match='--seeds 1 1: give different numbers'):
        MuMoEExperiment(tmp_path, tmp_path, [1, 1], 1)
    with pytest.raises(ConfigError, match='--jobs 0: give at least 1'):
        MuMoEExperiment(tmp_path, tmp_path, [1], 0)
