"""The experiment of the cluster mixtures in miniature, and its tables by hand."""

import json
import re
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import logged

from mmdet_moe import cli
from mmdet_moe.errors import ConfigError
from projects.cluster_theory import experiment as theory
from projects.cluster_theory.cluster_alignment_hook import RECORD_FILE
from projects.cluster_theory.experiment import Result, Run
from research.experiments import experiment

SMALL = (
    'train_dataloader.batch_size=300',
    'train_dataloader.dataset.num_samples=300',
    'val_dataloader.dataset.num_samples=200',
    'test_dataloader.dataset.num_samples=200',
    'train_cfg.max_iters=4',
)


@pytest.fixture
def small(monkeypatch):
    """The models of the table, trained for a moment."""
    models = {m: replace(m, options=(*SMALL, *m.options)) for m in theory.TABLE}
    names = ('SINGLE_LINEAR', 'SINGLE', 'MIXTURE_LINEAR', 'MIXTURE')
    for name, model in zip(names, models.values(), strict=True):
        monkeypatch.setattr(theory, name, model)
    monkeypatch.setattr(theory, 'TABLE', tuple(models.values()))
    variant = replace(theory.VARIANTS[1], options=(*SMALL, *theory.VARIANTS[1].options))
    monkeypatch.setattr(theory, 'VARIANTS', (theory.VARIANTS[0], variant))
    published = {(s, models[m]): value for (s, m), value in theory.PUBLISHED.items()}
    monkeypatch.setattr(theory, 'PUBLISHED', published)


class OneProcess:
    """Stands for the pool: its processes would not see what a test has replaced."""

    def __init__(self, jobs, context, initializer, initargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        pass


@pytest.mark.usefixtures('small')
@pytest.mark.sweep(keep=0)  # takes long
def test_everything_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, 'ProcessPoolExecutor', OneProcess)
    page, pictures = tmp_path / 'page.md', tmp_path / 'pictures'
    page.write_text('before\n<!-- theory:begin -->\nold\n<!-- theory:end -->\nafter\n')
    monkeypatch.setattr(experiment, 'RESULTS', page)
    monkeypatch.setattr(experiment, 'PICTURES', pictures)
    monkeypatch.setattr(theory, 'SETTINGS', (1, 2))
    monkeypatch.setattr(theory, 'RUNS', 2)
    assert theory.run(tmp_path / 'runs', [1, 2], runs=2) == page
    out = capsys.readouterr().out
    assert '0 of 14 trainings are finished.' in out
    assert re.search(r'14/14 setting . .*0\.0 min left', out.replace(',', ''))
    content = page.read_text()
    assert content.startswith('before\n<!-- theory:begin -->\n| setting')
    assert content.endswith('\n<!-- theory:end -->\nafter\n')
    assert content.count('| S1 |') == content.count('| S2 |') == 4
    assert content.count('gate: softmax') == 1
    names = [{f'theory_s{s}_{x}.png' for x in ('alignment', 'entropy', 'routing')} for s in (1, 2)]
    assert {path.name for path in pictures.iterdir()} == names[0]
    for s in (1, 2):
        drawn = (tmp_path / 'runs' / f's{s}' / 'figures').iterdir()
        assert {path.name for path in drawn} == names[s - 1]
    theory.run(tmp_path / 'runs', [1, 2], runs=2)
    assert '14 of 14 trainings are finished.' in capsys.readouterr().out
    assert page.read_text() == content
    # What was interrupted is trained anew.
    interrupted = Run(1, theory.MIXTURE, 1).folder(tmp_path / 'runs')
    before = json.loads((interrupted / 'result.json').read_text())
    (interrupted / 'result.json').unlink()
    written = theory.run(tmp_path / 'runs', [1, 2], runs=2, table_only=True)
    # What is published is not replaced by less.
    assert page.read_text() == content
    assert (written / 'theory.md').read_text().count('| S1 |') == 4
    assert not (interrupted / 'result.json').exists()
    theory.run(tmp_path / 'runs', [1, 2], runs=2)
    assert '13 of 14 trainings are finished.' in capsys.readouterr().out
    assert json.loads((interrupted / 'result.json').read_text()) == before
    # Of other settings nothing is taken over.
    published = theory.PUBLISHED
    longer = {m: replace(m, options=(*m.options, 'train_cfg.max_iters=5')) for m in theory.TABLE}
    monkeypatch.setattr(theory, 'TABLE', tuple(longer.values()))
    monkeypatch.setattr(
        theory, 'PUBLISHED', {(s, longer[m]): value for (s, m), value in published.items()}
    )
    with pytest.raises(ConfigError, match=r'other settings \(train_cfg.max_iters: 4 there, 5 now'):
        theory.run(tmp_path / 'runs', [1, 2], runs=2, table_only=True)
    # What was interrupted begins anew, whatever its settings were.
    for path in (tmp_path / 'runs').glob('*/*/*/result.json'):
        path.unlink()
    with pytest.raises(ConfigError, match='holds no finished training'):
        theory.run(tmp_path / 'runs', [1, 2], runs=2, table_only=True)


@pytest.mark.usefixtures('small')
def test_killed_process(tmp_path, monkeypatch):
    class Killed(OneProcess):
        def submit(self, function, *args):
            future = Future()
            future.set_exception(BrokenProcessPool('...'))
            return future

    monkeypatch.setattr(theory, 'ProcessPoolExecutor', Killed)
    with pytest.raises(ConfigError, match=r'ended from outside.*start the command again'):
        theory.run(tmp_path, [3], runs=1)


@pytest.mark.usefixtures('small')
def test_a_training_is_that_of_the_tool(tmp_path, monkeypatch):
    """Whatever else the process has trained before."""
    theory.train(Run(2, theory.SINGLE, 0), tmp_path)
    result = theory.train(Run(2, theory.MIXTURE, 7), tmp_path)
    monkeypatch.chdir(tmp_path)
    config = theory.CONFIGS / 'mixture.py'
    loaders = ('train', 'val', 'test')
    options = [*SMALL, *(f'{name}_dataloader.dataset.setting=s2' for name in loaders)]
    options.append('randomness.seed=7')
    cli.run_train([str(config), '--work-dir', 'tool', '--cfg-options', *options])
    states = [
        torch.load(path / 'iter_4.pth', weights_only=False)['state_dict']
        for path in (Run(2, theory.MIXTURE, 7).folder(tmp_path), Path('tool'))
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    (validation,) = [line for line in logged('tool') if 'accuracy/top1' in line]
    assert result.accuracy == validation['accuracy/top1']
    assert result.test_entropy == validation['moe/dispatch_entropy']
    assert result.iterations == 4
    with np.load(Path('tool') / RECORD_FILE) as record:
        assert result.train_entropy == record['dispatch_entropy'][-1]
        assert result.router_centre == np.abs(record['router_centres'][-1]).max()


@pytest.mark.usefixtures('small')
def test_failure_names_the_log(tmp_path):
    broken = replace(theory.MIXTURE, options=('train_dataloader.dataset.sigma=-1',))
    with pytest.raises(ConfigError, match=r'failed; see .*output\.log') as caught:
        theory.train(Run(1, broken, 0), tmp_path)
    log = Path(str(caught.value).rpartition(' ')[2])
    assert 'sigma=-1 must be a finite number of at least 0' in log.read_text()


def test_wrong_settings(tmp_path):
    with pytest.raises(ConfigError, match='--settings 1 2 1: give different numbers'):
        theory.run(tmp_path, [1, 2, 1])
    with pytest.raises(ConfigError, match=r'--settings \[5\]: the paper has the settings 1 to 4'):
        theory.run(tmp_path, [1, 5])


def test_table_by_hand():
    mixture = [
        Result(99.0, 300, 0.10, 0.12, 0.1, 0.5),
        Result(98.0, 501, 0.20, 0.16, 0.6, 0.4),
    ]
    results = {Run(1, theory.MIXTURE, i): result for i, result in enumerate(mixture)}
    results[Run(1, theory.SINGLE, 0)] = Result(83.1, 501)
    single, mixed = theory.markdown_table(results).splitlines()[2:]
    assert single == (
        '| S1 | single, non-linear | 1 | 83.10 | 79.6 | no: +3.50 of ±2.00 | – | – | – | – |'
    )
    # Two of 98.5 ± 0.7071 against 99.46 ± 0.55.
    assert mixed == (
        '| S1 | mixture, non-linear | 2 | 98.50 ± 0.71 | 99.46 ± 0.55 | yes: -0.96 of ±1.10 '
        '| 0.140 ± 0.028 | 0.098 | 0.150 ± 0.071 | 0.35 / 0.45; centre in 1 of 2 |'
    )
    # A small published deviation: 1 point counts.
    small = theory.markdown_table({Run(3, theory.MIXTURE, 0): replace(mixture[0], accuracy=99.2)})
    assert 'yes: -0.79 of ±1.00' in small


def test_variants_by_hand():
    variant = theory.VARIANTS[1]
    results = {
        Run(1, theory.MIXTURE, 0): Result(99.0, 300, 0.1, 0.1, 0.1, 0.1),
        Run(1, variant, 0): Result(90.0, 501, 0.3, 0.1, 0.1, 0.1),
        Run(1, variant, 1): Result(92.0, 400, 0.5, 0.1, 0.1, 0.1),
        Run(2, theory.MIXTURE, 0): Result(1.0, 1, 0.1, 0.1, 0.1, 0.1),
    }
    assert theory.variants_table(results).splitlines()[2:] == [
        '| as in the table | 1 | 99.00 | 0.100 | 300 – 300 |',
        '| gate: softmax | 2 | 91.00 ± 1.41 | 0.400 ± 0.141 | 400 – 501 |',
    ]
