"""Experiments with classifiers: their tables, and all of one in miniature."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from miniature import note_checksums, write_cifar100, write_fashion_mnist
from mmengine.config import Config
from mmengine.registry import DefaultScope
from tables_by_hand import cells, report

from mmdet_moe.analysis.models import build_model
from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.errors import ConfigError
from research import runs as runs_module
from research.experiments import experiment as experiment_module
from research.experiments.budget import MIXED_PRECISION, Budget
from research.experiments.classification import (
    TASKS,
    ClassificationExperiment,
    accuracy_table,
    specialisation_table,
)
from research.experiments.experiment import CONFIGS, EXPERTS
from research.runs import RunResult

FASHION, CIFAR = TASKS['fashion-mnist'], TASKS['cifar100']


def result(accuracy, load=None, seconds=0.2):
    layers = {} if load is None else {'layer4': report(load)}
    return RunResult({'accuracy': accuracy}, seconds, 1000, 2_345_678, 8, layers)


def test_table_of_accuracies():
    results = {
        'dense': [result(0.4), result(0.6)],
        'soft': [result(0.5, [0.999, 0.001], seconds=0.25)],
        'none yet': [],
    }
    dense, soft = cells(accuracy_table(results, {'dense': 12_345_678, 'soft': 10**9}))
    assert dense == [
        'dense', '2', '0.500 ± 0.141', '12.3', '0.200 (1.00)', '2,346 k', '–', '–', '–',
    ]  # fmt: skip
    assert soft == [
        'soft', '1', '0.500', '1000.0', '0.250 (–)', '2,346 k', '0.50', '1 of 2', '0.30',
    ]  # fmt: skip
    (alone,) = cells(accuracy_table({'dense': [], 'soft': results['soft']}, {'soft': 1}))
    assert alone[4] == '0.250 (–)'


def test_times_are_compared_within_a_seed():
    """Whose runs shared a machine: twice the dense model's on one, the same on a slower one."""
    times = {'dense': (0.1, 0.3), 'soft': (0.2, 0.3)}
    results = {name: [result(0.5, seconds=s) for s in of] for name, of in times.items()}
    _, soft = cells(accuracy_table(results, dict.fromkeys(times, 1)))
    assert soft[4] == '0.250 (1.50)'


def experts_of(accuracy, mi, p, alone, equal, random, without):
    changed = [('only', value) for value in alone] + [('without', value) for value in without]
    changed += [('equal', equal), ('random', random)]
    association = {'mi': mi, 'p_adjusted': p, 'p_value': 0.0}
    return {
        'metrics': {'accuracy': accuracy},
        'layers': {'layer4': {'associations': {'objects': {'class': association}}}},
        'interventions': [
            {'layer': layer, 'kind': kind, 'metrics': {'accuracy': value}}
            for layer in ('layer4', 'other')
            for kind, value in (changed if layer == 'layer4' else [('only', 0.99)])
        ],
    }


def test_table_of_specialisation():
    runs = [
        experts_of(0.6, 0.2, 0.001, [0.5, 0.3], 0.55, 0.45, [0.2, 0.4]),
        experts_of(0.4, 0.4, 0.020, [0.1, 0.3], 0.35, 0.25, [0.5, 0.3]),
    ]
    (row,) = cells(specialisation_table({'some': runs, 'none yet': []}))
    assert row == [
        'some', '2', '0.30 ± 0.14', '0.020', '0.500 ± 0.141', '0.400', '0.200', '0.450', '0.350',
        '0.250',
    ]  # fmt: skip
    for run, mi in zip(runs, (0.1, 0.2), strict=True):
        told = run['layers']['layer4']['associations']['objects']
        told['superclass'] = {'mi': mi, 'p_adjusted': 0.5, 'p_value': 0.0}
    (row,) = cells(specialisation_table({'some': runs}))
    assert row[2:6] == ['0.30 ± 0.14', '0.020', '0.15 ± 0.07', '0.500']


TINY = Budget(
    'tiny',
    'very small',
    (
        'model.backbone.stem_channels=4',
        'model.backbone.base_channels=4',
        'model.head.in_channels=32',
        'train_dataloader.batch_size=10',
        'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0',
        'train_cfg.max_epochs=2',
        'train_cfg.val_interval=2',
        'param_scheduler.milestones=[1]',
        MIXED_PRECISION,
    ),
    ('model.backbone.expert_channels=equal_flops',),
)


@pytest.mark.usefixtures('in_process', 'quick_analysis')
def test_experiment(tmp_path, monkeypatch, capsys):
    """Trains, analyses, writes; a second run finds everything done."""
    folder = write_cifar100(tmp_path / 'data', num_train=40, num_test=40)
    note_checksums(folder)
    data = folder.parent
    page, pictures = tmp_path / 'results.md', tmp_path / 'pictures'
    page.write_text('before\n<!-- cifar100-tiny:begin -->\n<!-- cifar100-tiny:end -->\nafter\n')
    pictures.mkdir()
    task = replace(CIFAR, methods=CIFAR.methods[:2])
    methods = task.methods
    monkeypatch.setattr(experiment_module, 'RESULTS', page)
    monkeypatch.setattr(experiment_module, 'PICTURES', pictures)
    monkeypatch.setattr(experiment_module, 'SEEDS', (3,))
    experiment = ClassificationExperiment(task, TINY, data, tmp_path / 'runs', seeds=[3], jobs=2)
    experiment.run()
    first = page.read_text()
    lines = first.splitlines()
    assert (lines[0], lines[-1]) == ('before', 'after')
    assert 'Budget `tiny`: very small.' in lines
    dense, soft = ([row for row in cells(first) if row[0] == m.name] for m in methods)
    assert [len(dense), len(soft)] == [1, 2]
    found = json.loads((experiment.run_dir(methods[1], 3) / EXPERTS).read_text())
    # The 40 test images, with the accuracy that the training has measured.
    assert found['run']['num_images'] == 40
    (trained,) = experiment.results(methods[1])
    assert found['metrics']['accuracy'] == pytest.approx(trained.metrics['accuracy'])
    assert soft[0][2] == f'{trained.metrics["accuracy"]:.3f}'
    assert 'information on super-class' in first
    (picture,) = pictures.iterdir()
    assert picture.stat().st_size > 10_000
    cfg = Config.fromfile(next(experiment.run_dir(methods[1], 3).glob('*.py')))
    assert cfg.randomness.seed == 3
    assert cfg.train_dataloader.batch_size == 10
    assert cfg.model.backbone.expert_channels == 'equal_flops'
    capsys.readouterr()
    monkeypatch.setattr(experiment_module, 'train', None)
    monkeypatch.setattr(experiment_module, 'analyse', None)
    experiment.run()
    assert '2 of 2 runs are finished.' in capsys.readouterr().out
    assert page.read_text() == first
    # Of other settings nothing is reused, and with other seeds nothing is published.
    longer = replace(TINY, options=(*TINY.options, 'train_cfg.max_epochs=3'))
    with pytest.raises(ConfigError, match=r'seed3 holds a run .*max_epochs: 2 there, 3 now'):
        ClassificationExperiment(task, longer, data, tmp_path / 'runs', seeds=[3], jobs=2).run()
    with pytest.raises(ConfigError, match='max_epochs: 2 there, 3 now'):
        ClassificationExperiment(task, longer, data, tmp_path / 'runs', [3], 2).run(table_only=True)
    fewer = ClassificationExperiment(task, TINY, data, tmp_path / 'runs', seeds=[3, 4], jobs=2)
    fewer.run(table_only=True)
    assert page.read_text() == first
    assert (fewer.written / 'cifar100-tiny.md').read_text().strip() in first


@pytest.mark.usefixtures('in_process')
def test_interrupted_in_the_last_validation(tmp_path, monkeypatch):
    """The checkpoint is there, the accuracy is not: resuming only has to validate."""
    data = write_fashion_mnist(tmp_path / 'data', num_train=40, num_test=20)
    monkeypatch.setattr(ClassificationExperiment, 'write', lambda self: None)

    def started_anew() -> ClassificationExperiment:
        return ClassificationExperiment(FASHION, TINY, data, tmp_path / 'runs', seeds=[0], jobs=1)

    dense = FASHION.methods[:1]
    first = started_anew()
    first.train(dense)
    (before,) = first.results(dense[0])
    folder = first.run_dir(dense[0], 0)
    (scalars,) = folder.glob('*/vis_data/scalars.json')
    lines = scalars.read_text().splitlines()
    scalars.write_text('\n'.join(line for line in lines if 'accuracy' not in line) + '\n')
    stamp = (folder / 'epoch_2.pth').stat().st_mtime_ns
    second = started_anew()
    assert second.results(dense[0]) == []
    second.train(dense)
    (after,) = second.results(dense[0])
    assert after.metrics == before.metrics
    assert (folder / 'epoch_2.pth').stat().st_mtime_ns == stamp


def test_killed_in_the_middle(tmp_path, monkeypatch):
    """The training goes on from the latest checkpoint, of which there is one an epoch."""
    budget = CIFAR.budgets['cpu']
    experiment = ClassificationExperiment(CIFAR, budget, tmp_path, tmp_path / 'runs', [0], jobs=1)
    (method,) = CIFAR.methods[:1]
    folder = experiment.run_dir(method, 0)
    folder.mkdir(parents=True)
    cfg = load_config(
        str(experiment_module.CONFIGS / f'{method.config}.py'),
        parse_options(experiment.options(method, 0)),
    )
    assert cfg.default_hooks.checkpoint.interval == 1
    started = []
    monkeypatch.setattr(
        runs_module, '_run_tool', lambda tool, arguments, *_: started.append(arguments)
    )
    for _ in range(2):
        with pytest.raises(ConfigError, match='did not finish'):
            experiment.train([method])
        torch.save({}, folder / 'epoch_7.pth')
    assert ['--resume' in arguments for arguments in started] == [False, True]


@pytest.mark.parametrize(('seeds', 'jobs', 'message'), [
    ([0, 0], 1, '--seeds 0 0: give different numbers'),
    ([], 1, '--seeds : give different'),
    ([0], 0, '--jobs 0: give at least 1'),
])  # fmt: skip
def test_seeds_and_jobs(seeds, jobs, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        ClassificationExperiment(FASHION, TINY, tmp_path, tmp_path, seeds, jobs)


def test_without_the_data(tmp_path):
    experiment = ClassificationExperiment(
        FASHION, TINY, tmp_path / 'no', tmp_path / 'runs', [0], jobs=1
    )
    with pytest.raises(ConfigError, match=r"--data: there is no folder '.*no'; .*prepare_data\.py"):
        experiment.run()
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(('task', 'budget', 'width', 'images', 'batches'), [
    (FASHION, 'cpu', 16, 10_000, 157), (FASHION, 'gpu', 64, 60_000, 469),
    (CIFAR, 'cpu', 16, 50_000, 391), (CIFAR, 'short', 8, 50_000, 391),
    (CIFAR, 'half', 32, 50_000, 196), (CIFAR, 'gpu', 64, 50_000, 391),
])  # fmt: skip
def test_what_the_budgets_say(task, budget, width, images, batches, tmp_path):
    """The texts name widths, images and batches; these are what the trainings get."""
    chosen = task.budgets[budget]
    experiment = ClassificationExperiment(task, chosen, tmp_path, tmp_path, [0], jobs=1)
    for method in task.methods:
        options = parse_options(experiment.options(method, 0))
        cfg = load_config(str(experiment_module.CONFIGS / f'{method.config}.py'), options)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = build_model(cfg)
        assert model.backbone.bn1.num_features == width
        assert model.head.fc.in_features == 8 * width
        loader = cfg.train_dataloader
        count = loader.dataset.get('indices', task.data_set.num_train)
        assert count == images
        assert math.ceil(count / loader.batch_size) == batches
        epochs = cfg.train_cfg.max_epochs
        assert f'{images:,} training images' in chosen.text
        assert f'{epochs} epochs in batches of {loader.batch_size}' in chosen.text
        iterations = re.search(r'([0-9,]+) iterations', chosen.text)
        assert (budget == 'gpu') == (iterations is None)
        if iterations is not None:
            assert int(iterations[1].replace(',', '')) == epochs * batches


def test_the_shipped_config_is_the_budget():
    """`mmdet-moe look cifar100` shows a model of `reproduce.py cifar100 --budget short`."""
    budget = CIFAR.budgets['short']
    options = parse_options([*budget.options, *budget.moe_options])
    trained = load_config(str(CONFIGS / 'resnet18_moe_soft_kl_cifar100.py'), options)
    shipped = load_config(str(CONFIGS / 'demo/resnet18_moe_soft_kl_cifar100.py'))
    for part in ('model', 'train_cfg', 'param_scheduler', 'optim_wrapper', 'custom_hooks'):
        assert shipped[part] == trained[part]
