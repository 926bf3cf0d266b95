"""The experiment with rotated images: its table, and all of it in miniature."""

import math

import pytest
from miniature import note_checksums, write_cifar10, write_fashion_mnist
from tables_by_hand import cells, report

from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.errors import ConfigError
from research.experiments import experiment as experiment_module
from research.experiments import rotate
from research.experiments.budget import CIFAR10, FASHION_MNIST, Budget
from research.experiments.rotate import BUDGETS, RotateExperiment, markdown_table
from research.runs import RunResult


def result(accuracy, entropy, load):
    metrics = {'accuracy': accuracy, 'dispatch entropy': entropy}
    return RunResult(metrics, 0.2, 1000, 2_345_678, 8, {'moe': report(load)})


def test_table():
    results = {
        'single': [result(0.8, math.log(10), [1.0])],
        'MoE': [result(0.9, 2.0, [0.3, 0.7, 0.0]), result(0.92, 1.0, [0.2, 0.3, 0.5])],
        'none yet': [],
    }
    single, mixture = cells(markdown_table(results, {'single': 10**6, 'MoE': 12_340_000}))
    assert single == ['single', '1', '80.00', '–', '–', '–', '1.0', '2,346 k']
    assert mixture == [
        'MoE', '2', '91.00 ± 1.41', '1.500 ± 0.707', '0.60 / 0.30 / 0.10', '1 of 6', '12.3',
        '2,346 k',
    ]  # fmt: skip


TINY = Budget(
    'tiny',
    'very small',
    (
        'model.expert.backbone.stem_channels=4',
        'model.expert.backbone.base_channels=4',
        'model.expert.head.in_channels=32',
        'model.router.conv_channels=4',
        'train_dataloader.batch_size=20',
        'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0',
        'train_cfg.max_epochs=1',
    ),
)


@pytest.mark.sweep(keep=0)  # takes long
@pytest.mark.usefixtures('in_process')
def test_experiment(tmp_path, monkeypatch, capsys):
    """Trains and writes; a second run finds everything done."""
    data = write_fashion_mnist(tmp_path / 'data', num_train=20, num_test=10)
    page = tmp_path / 'results.md'
    page.write_text('before\n<!-- rotate-tiny:begin -->\n<!-- rotate-tiny:end -->\nafter\n')
    monkeypatch.setattr(experiment_module, 'RESULTS', page)
    monkeypatch.setattr(experiment_module, 'PICTURES', tmp_path / 'pictures')
    monkeypatch.setattr(experiment_module, 'SEEDS', (3,))
    experiment = RotateExperiment(FASHION_MNIST, TINY, data, tmp_path / 'runs', seeds=[3], jobs=2)
    experiment.run()
    first = page.read_text()
    lines = first.splitlines()
    assert (lines[0], lines[-1]) == ('before', 'after')
    assert 'Budget `tiny`: very small.' in lines
    one, several, *_ = experiment.methods
    (mixture,) = [row for row in cells(first) if row[0] == several.name]
    (trained,) = experiment.results(several)
    # Of 20 samples, two of each of ten classes.
    assert 0 <= trained.metrics['dispatch entropy'] <= math.log(10) + 1e-6
    assert mixture[2:4] == [
        f'{100 * trained.metrics["accuracy"]:.2f}',
        f'{trained.metrics["dispatch entropy"]:.3f}',
    ]
    (single,) = experiment.results(one)
    assert single.metrics['dispatch entropy'] == pytest.approx(rotate.CHANCE, abs=1e-5)
    capsys.readouterr()
    monkeypatch.setattr(experiment_module, 'train', None)
    experiment.run()
    assert '4 of 4 runs are finished.' in capsys.readouterr().out
    assert page.read_text() == first


@pytest.mark.parametrize(('data_set', 'budget', 'width', 'images', 'iterations'), [
    (FASHION_MNIST, 'cpu', 16, 5_000, 785), (FASHION_MNIST, 'gpu', 64, 60_000, 28_140),
    (CIFAR10, 'cpu', 16, 12_500, 1_955), (CIFAR10, 'gpu', 64, 50_000, 23_460),
])  # fmt: skip
def test_what_the_budgets_say(data_set, budget, width, images, iterations, tmp_path):
    """The texts name widths, images and iterations; these are what the trainings get."""
    chosen = BUDGETS[data_set][budget]
    experiment = RotateExperiment(data_set, chosen, tmp_path, tmp_path, [0], jobs=1)
    for method in experiment.methods:
        options = parse_options([*experiment.options(method, 0), *method.options])
        cfg = load_config(str(experiment_module.CONFIGS / f'{method.config}.py'), options)
        backbone = cfg.model.expert.backbone
        wanted = 4 if 'narrow' in method.name else width
        assert backbone.get('base_channels', 64) == backbone.get('stem_channels', 64) == wanted
        assert cfg.model.expert.head.in_channels == 8 * wanted
        loader = cfg.train_dataloader
        assert loader.dataset.dataset.get('indices', data_set.num_train) == images
        epochs = cfg.train_cfg.max_epochs
        assert epochs * math.ceil(2 * images / loader.batch_size) == iterations
        assert f'{images:,} training images, so {2 * images:,} samples' in chosen.text
        assert f'{epochs} epochs in batches of {loader.batch_size}' in chosen.text
        assert budget != 'cpu' or f'({iterations:,} iterations)' in chosen.text.replace(
            f'({iterations} ', f'({iterations:,} '
        )


def test_on_the_data_of_the_paper(tmp_path):
    """CIFAR-10 in place of Fashion-MNIST takes the data alone."""
    folder = write_cifar10(tmp_path / 'data')
    note_checksums(folder)
    experiment = RotateExperiment(CIFAR10, TINY, folder.parent, tmp_path / 'runs', [0], jobs=1)
    for method in experiment.methods:
        experiment.prepare(method)
    experiment.write()
    assert experiment.written == tmp_path / 'runs' / 'tiny' / 'tables'
    assert (experiment.written / 'rotate-cifar10-tiny.md').is_file()
    with pytest.raises(ConfigError, match=r'prepare_data\.py cifar10 --out DIR` makes it'):
        RotateExperiment(CIFAR10, TINY, tmp_path / 'no', tmp_path, [0], jobs=1).run()
