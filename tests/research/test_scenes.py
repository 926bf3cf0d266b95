"""The tables of the experiments on generated scenes."""

import re
import shutil

import pytest
import torch
from tables_by_hand import cells, report

from mmdet_moe.cli import parse_options
from research.experiments import experiment
from research.experiments import scenes as module
from research.experiments.scenes import (
    DIGIT_SCENES,
    FASHION_SCENES,
    ScenesExperiment,
    markdown_table,
    specialisation_table,
)
from research.runs import COCO_METRICS, RunResult


def result(ap, load, mi):
    metrics = dict.fromkeys(COCO_METRICS.values(), ap)
    layers = dict.fromkeys(('cls', 'reg'), report(load, mi_input=mi, mi_level=mi / 2))
    return RunResult(metrics, 0.2, 1, 2, 10, layers)


def test_table_has_mean_and_deviation_over_the_seeds():
    runs = [result(0.4, [0.5, 0.5], 0.2), result(0.6, [0.996, 0.004], 0.4)]
    # Both layers' only level has all objects.
    table = markdown_table({'some': runs, 'none yet': []}, torch.ones(1))
    (row,) = cells(table)
    # Two of the eight experts (two layers, two experts, two seeds) get less than 1 % of 1 / 2.
    assert row == [
        'some', '2', *['0.500 ± 0.141'] * 5, '0.50 / 0.50', '2 of 8', '0.30 / 0.30', '0.15 / 0.15',
        '0.00 / 0.00',
    ]  # fmt: skip


def experts_of(ap, mi, p, alone, equal, random, both):
    """The parts of an ``experts.json`` that the table reads; ``alone`` has one AP per expert."""
    sizes = {'mi': mi, 'p_adjusted': p, 'p_value': 0.0}
    beyond = {'mi': mi / 100, 'interval': [0.0, mi / 10], 'p_adjusted': p * 10}
    associations = {
        'objects': {
            'size_coco': sizes,
            'size': {'given': {'level': beyond}},
            'class': {'mi': mi / 10, 'p_adjusted': 0.5},
        },
        'detections': {'size_coco': {'mi': 2 * mi, 'p_adjusted': p / 2}},
    }
    changed = [('cls', 'only', value) for value in alone]
    changed += [('cls', 'equal', equal), ('cls', 'random', random), ('all', 'random', both)]
    return {
        'metrics': {'AP': ap},
        'layers': {'cls': {'associations': associations}},
        'interventions': [
            {'layer': layer, 'kind': kind, 'metrics': {'AP': value}}
            for layer, kind, value in changed
        ],
    }


def test_table_of_specialisation():
    runs = [
        experts_of(0.6, 0.2, 0.001, [0.5, 0.3], 0.55, 0.45, 0.35),
        experts_of(0.4, 0.4, 0.020, [0.1, 0.3], 0.35, 0.25, 0.15),
    ]
    (row,) = cells(specialisation_table({'some': runs}))
    # The best and the worst expert of each seed, whichever they are.
    assert row == [
        'some', '2', '0.30', '0.60', '0.020', '0.0030', '0.0400', '0.010', '0.03',
        '0.500 ± 0.141', '0.400', '0.200', '0.450',
        '0.350', '0.250',
    ]  # fmt: skip


def fake_experiment(scenes, tmp_path, monkeypatch, seeds=(0, 1, 2)):
    """An experiment whose runs are all there."""
    page, pictures = tmp_path / 'results.md', tmp_path / 'pictures'
    shutil.copy(experiment.RESULTS, page)
    monkeypatch.setattr(experiment, 'RESULTS', page)
    monkeypatch.setattr(experiment, 'PICTURES', pictures)
    found = ScenesExperiment(scenes, tmp_path / 'data', tmp_path / 'runs', seeds, 1)
    moe = result(0.5, [0.5, 0.5], 0.2)
    dense = RunResult(moe.metrics, 0.2, 1, 2, 10)
    monkeypatch.setattr(
        found, 'results', lambda m: [dense if m == scenes.methods[0] else moe] * len(seeds)
    )
    analysis = experts_of(0.6, 0.2, 0.001, [0.5, 0.3], 0.55, 0.45, 0.35)
    monkeypatch.setattr(found, 'analyses', lambda _: [analysis] * len(seeds))
    monkeypatch.setattr(module, 'positives_per_level', lambda _: torch.ones(1))
    monkeypatch.setattr(
        module, 'plot_specialisation', lambda runs, path: path.write_text(str(len(runs)))
    )
    return found, page, pictures


@pytest.mark.parametrize('scenes', [DIGIT_SCENES, FASHION_SCENES], ids=lambda scenes: scenes.name)
def test_published_when_complete(scenes, tmp_path, monkeypatch):
    """docs/results.md has the markers of every table; what stands outside of them stays."""
    found, page, pictures = fake_experiment(scenes, tmp_path, monkeypatch)
    pictures.mkdir()
    before = page.read_text()
    found.write()
    assert found.written == page
    (picture,) = pictures.iterdir()
    assert picture.name == f'{scenes.name}-specialisation.png'
    assert picture.read_text() == str(len(scenes.pictured))
    after = page.read_text()
    assert after.count('0.500 ± 0.000') > before.count('0.500 ± 0.000')
    names = [scenes.name, f'{scenes.name}-specialisation']
    names += ['decision-weights'] * bool(scenes.decision_weights)
    for name in names:
        pattern = re.compile(f'(?s)(<!-- {name}:begin -->).*?(<!-- {name}:end -->)')
        assert len(pattern.findall(after)) == 1
        before, after = (pattern.sub(r'\1\2', text) for text in (before, after))
    assert before == after


def test_not_published_with_other_seeds(tmp_path, monkeypatch):
    found, page, pictures = fake_experiment(FASHION_SCENES, tmp_path, monkeypatch, seeds=(0, 1))
    before = page.read_text()
    found.write()
    assert page.read_text() == before
    assert not pictures.exists()
    assert {path.name for path in found.written.iterdir()} == {
        'fashion-scenes.md', 'fashion-scenes-specialisation.md',
        'fashion-scenes-specialisation.png',
    }  # fmt: skip


def test_runs_start_from_the_pretrained_model_of_their_seed(tmp_path):
    found = ScenesExperiment(DIGIT_SCENES, tmp_path / 'data', tmp_path / 'runs', [4, 5], 1)
    folder = found.run_dir(DIGIT_SCENES.pretraining, 5)
    folder.mkdir(parents=True)
    (folder / 'last_checkpoint').write_text('/elsewhere/iter_600.pth')
    options = parse_options(found.options(DIGIT_SCENES.methods[2], 5))
    assert options['load_from'] == str(folder / 'iter_600.pth')
    assert options['randomness.seed'] == 5
    assert 'load_from' not in parse_options(found.options(DIGIT_SCENES.pretraining, 5))
    # The default decision weight is the run of the main table.
    default = DIGIT_SCENES.decision_weights[-1]
    assert found.run_dir(default, 4) == found.run_dir(DIGIT_SCENES.methods[1], 4)
    others = {found.run_dir(method, 4) for method in DIGIT_SCENES.decision_weights}
    assert len(others) == 3
