"""The Fashion-MNIST experiment: its tables, and all of it in miniature."""

import math
from dataclasses import replace

import pytest
from miniature import write_fashion_mnist
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdet_moe.analysis.models import build_model
from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import UtilizationReport
from research.experiments import experiment as experiment_module
from research.experiments import fashion_mnist
from research.experiments.budget import Budget
from research.experiments.fashion_mnist import (
    BUDGETS,
    FashionMNISTExperiment,
    accuracy_table,
    specialisation_table,
)
from research.runs import RunResult


def cells(line):
    return [cell.strip() for cell in line.split('|')[1:-1]]


def result(accuracy, load=None):
    layers = {}
    if load is not None:
        layers['layer4'] = UtilizationReport(
            num_items=10, load=load, importance=load, load_cv2=0.5, usage_entropy=0.6,
            decision_entropy=0.1, mi_input=0.3, mi_level=0.0, level_shares=[load],
        ).as_dict()  # fmt: skip
    return RunResult({'accuracy': accuracy}, 0.2, 1000, 2_345_678, 8, layers)


def test_table_of_accuracies():
    results = {
        'dense': [result(0.4), result(0.6)],
        'soft': [result(0.5, [0.999, 0.001])],
        'none yet': [],
    }
    dense, soft = accuracy_table(results, {'dense': 12_345_678, 'soft': 10**9}).splitlines()[2:]
    assert cells(dense) == ['dense', '2', '0.500 ± 0.141', '12.3', '2,346 k', '–', '–', '–']
    assert cells(soft) == ['soft', '1', '0.500', '1000.0', '2,346 k', '0.50', '1 of 2', '0.30']


def experts_of(accuracy, mi, p_value, alone, equal, random, without):
    changed = [('only', value) for value in alone] + [('without', value) for value in without]
    changed += [('equal', equal), ('random', random)]
    association = {'mi': mi, 'p_value': p_value}
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
    (line,) = specialisation_table({'some': runs, 'none yet': []}).splitlines()[2:]
    assert cells(line) == [
        'some', '2', '0.30 ± 0.14', '0.020', '0.500 ± 0.141', '0.400', '0.200', '0.450', '0.350',
        '0.250',
    ]  # fmt: skip


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
    ),
    ('model.backbone.expert_channels=equal_flops',),
)


@pytest.mark.usefixtures('in_process', 'quick_analysis')
def test_experiment(tmp_path, monkeypatch, capsys):
    """Trains, analyses, writes; a second run finds everything done."""
    data = write_fashion_mnist(tmp_path / 'data', num_train=40, num_test=20)
    page, pictures = tmp_path / 'results.md', tmp_path / 'pictures'
    page.write_text(
        'before\n<!-- fashion-mnist-tiny:begin -->\n<!-- fashion-mnist-tiny:end -->\nafter\n'
    )
    pictures.mkdir()
    methods = fashion_mnist.METHODS[:2]
    monkeypatch.setattr(experiment_module, 'RESULTS', page)
    monkeypatch.setattr(experiment_module, 'PICTURES', pictures)
    monkeypatch.setattr(experiment_module, 'SEEDS', (3,))
    monkeypatch.setattr(fashion_mnist, 'METHODS', methods)
    monkeypatch.setattr(fashion_mnist, 'MOE_METHODS', methods[1:])
    experiment = FashionMNISTExperiment(TINY, data, tmp_path / 'runs', seeds=[3], jobs=2)
    experiment.run()
    first = page.read_text()
    lines = first.splitlines()
    assert (lines[0], lines[-1]) == ('before', 'after')
    assert 'Budget `tiny`: very small.' in lines
    dense, soft = ([cells(x) for x in lines if x.startswith(f'| {m.name} ')] for m in methods)
    assert [len(dense), len(soft)] == [1, 2]
    (found,) = experiment.analyses(methods[1])
    # The 20 test images, with the accuracy that the training has measured.
    assert found['run']['num_images'] == 20
    (trained,) = experiment.results(methods[1])
    assert found['metrics']['accuracy'] == pytest.approx(trained.metrics['accuracy'])
    assert soft[0][2] == f'{trained.metrics["accuracy"]:.3f}'
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
        FashionMNISTExperiment(longer, data, tmp_path / 'runs', seeds=[3], jobs=2).run()
    with pytest.raises(ConfigError, match='max_epochs: 2 there, 3 now'):
        FashionMNISTExperiment(longer, data, tmp_path / 'runs', [3], 2).run(table_only=True)
    fewer = FashionMNISTExperiment(TINY, data, tmp_path / 'runs', seeds=[3, 4], jobs=2)
    fewer.run(table_only=True)
    assert page.read_text() == first
    assert (fewer.written / 'fashion-mnist-tiny.md').read_text().strip() in first


@pytest.mark.usefixtures('in_process')
def test_interrupted_in_the_last_validation(tmp_path, monkeypatch):
    """The checkpoint is there, the accuracy is not: resuming only has to validate."""
    data = write_fashion_mnist(tmp_path / 'data', num_train=40, num_test=20)
    monkeypatch.setattr(FashionMNISTExperiment, 'write', lambda self: None)

    def started_anew() -> FashionMNISTExperiment:
        return FashionMNISTExperiment(TINY, data, tmp_path / 'runs', seeds=[0], jobs=1)

    dense = fashion_mnist.METHODS[:1]
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


@pytest.mark.parametrize(('seeds', 'jobs', 'message'), [
    ([0, 0], 1, '--seeds 0 0: give different numbers'),
    ([], 1, '--seeds : give different'),
    ([0], 0, '--jobs 0: give at least 1'),
])  # fmt: skip
def test_seeds_and_jobs(seeds, jobs, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        FashionMNISTExperiment(TINY, tmp_path, tmp_path, seeds, jobs)


def test_without_the_data(tmp_path):
    experiment = FashionMNISTExperiment(TINY, tmp_path / 'no', tmp_path / 'runs', [0], jobs=1)
    with pytest.raises(ConfigError, match=r"--data: there is no folder '.*no'; .*prepare_data\.py"):
        experiment.run()
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize(('budget', 'width', 'images', 'batches'), [
    ('cpu', 16, 10_000, 157), ('gpu', 64, 60_000, 469),
])  # fmt: skip
def test_what_the_budgets_say(budget, width, images, batches, tmp_path):
    """The texts name widths, images and batches; these are what the trainings get."""
    experiment = FashionMNISTExperiment(BUDGETS[budget], tmp_path, tmp_path, [0], jobs=1)
    for method in fashion_mnist.METHODS:
        options = parse_options(experiment.options(method, 0))
        cfg = load_config(str(experiment_module.CONFIGS / f'{method.config}.py'), options)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = build_model(cfg)
        assert model.backbone.bn1.num_features == width
        assert model.head.fc.in_features == 8 * width
        loader = cfg.train_dataloader
        count = loader.dataset.get('indices', 60_000)
        assert count == images
        assert math.ceil(count / loader.batch_size) == batches
        assert f'{images:,} training images' in BUDGETS[budget].text
        assert f'{cfg.train_cfg.max_epochs} epochs' in BUDGETS[budget].text
