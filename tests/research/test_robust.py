"""Attacks on the runs of another experiment: which runs are attacked, how, and the tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tables_by_hand import cells

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.robustness import parse
from mmdet_moe.errors import ConfigError
from research.experiments import experiment as experiment_module
from research.experiments import robust as module
from research.experiments.budget import Budget
from research.experiments.classification import TASKS
from research.experiments.robust import EPS, RobustExperiment

TASK = replace(TASKS['cifar100'], methods=TASKS['cifar100'].methods[:3])
DENSE, SOFT, UNTRAINED = TASK.methods


def content(robust, expert=None):
    """Of a result file; the accuracy of expert 0 alone is the higher one."""

    def row(what, attacked, clean=0.9, noise=0.8, layer=None, expert=None):
        columns = {'clean': clean, 'noise': noise, 'attacked': attacked}
        columns = {k: None if v is None else {'mean': v} for k, v in columns.items()}
        return {'what': what, 'layer': layer, 'expert': expert, **columns}

    rows = [row('model', robust)]
    if expert is not None:
        rows += [row('changed', 0.7, None, 0.1, 'a'), row('clean_routing', 0.3, None, 0.8, 'a')]
        rows += [row('clean_image', 0.6, None, 0.85, 'a'), row('held', 0.2, None, None, 'a')]
        rows += [row('alone', x, 0.5, 0.4, 'a', e) for e, x in enumerate((expert, 0.01))]
    return {'steps': module.STEPS, 'images': module.IMAGES, 'rows': rows}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """One whose processes are called here, and all but one method of which are trained."""
    page = tmp_path / 'results.md'
    page.write_text('<!-- robust-cifar100-tiny:begin -->\n<!-- robust-cifar100-tiny:end -->\n')
    monkeypatch.setattr(experiment_module, 'RESULTS', page)
    monkeypatch.setattr(experiment_module, 'PICTURES', tmp_path)
    monkeypatch.setattr(experiment_module, 'SEEDS', (0, 1))
    monkeypatch.setattr(module, 'latest_checkpoint', lambda folder: folder / 'epoch_2.pth')
    budget = Budget('tiny', 'very small')
    found = RobustExperiment(TASK, budget, tmp_path / 'data', tmp_path / 'runs', [0, 1], 1)
    monkeypatch.setattr(found, 'check', lambda methods: None)
    monkeypatch.setattr(found, '_here', lambda m, seed: None if m == UNTRAINED else 'there')
    called = []

    def run_process(program, arguments, threads, output):
        assert Path(program[0]).is_file()
        args = parse(arguments)
        called.append(args)
        robust = {'pgd': 0.2, 'apgd': 0.1}[args.attack] + (0.1 if 'seed1' in str(args.out) else 0)
        is_soft = SOFT.key in str(args.out)
        # Whole or not at all, as the tool does: the tables are read while it writes.
        write_file(args.out, json.dumps(content(robust, 0.4 if is_soft else None)).encode())

    monkeypatch.setattr(module, 'run_process', run_process)
    for method in (DENSE, SOFT):
        for seed in (0, 1):
            folder = found.run_dir(method, seed)
            folder.mkdir(parents=True)
            (folder / 'config.py').touch()
    return found, called, page


def test_experiment(experiment, tmp_path, monkeypatch):
    found, called, page = experiment
    found.run()
    assert {(args.attack, args.eps, args.max_images) for args in called} == {
        (attack, eps, module.IMAGES) for attack in ('pgd', 'apgd') for eps in EPS
    }
    assert len(called) == 2 * 2 * 2 * len(EPS)
    assert called[0].cfg_options == {'data_root': str(tmp_path / 'data')}
    # A method is not trained, so that nothing is published.
    text = (found.written / 'robust-cifar100-tiny.md').read_text()
    assert all(f'eps = {eps}:' in text for eps in EPS)
    first, second = cells(text)[:2]
    robust = ['0.250 ± 0.071', '0.150 ± 0.071']
    assert first == ['dense', '2', '0.900 ± 0.000', '0.800 ± 0.000', *robust, *['–'] * 8]
    assert second[:6] == [SOFT.name, *first[1:6]]
    rest = (0.4, 0.01, 0.4, 0.1, 0.7, 0.3, 0.6, 0.2)
    assert second[6:] == [f'{value:.3f} ± 0.000' for value in rest]

    called.clear()
    found.task = replace(TASK, methods=(DENSE, SOFT))
    found.run()
    assert called == []
    assert text.strip() in page.read_text()

    # What other settings have found is found again.
    monkeypatch.setattr(module, 'STEPS', module.STEPS + 1)
    found.run()
    assert len(called) == 2 * 2 * 2 * len(EPS)
    assert all(args.overwrite for args in called)


def test_nothing_is_trained(experiment, monkeypatch):
    found = experiment[0]
    monkeypatch.setattr(found, '_here', lambda *run: None)
    with pytest.raises(
        ConfigError, match=r'no finished run; .*reproduce.py cifar100 --budget tiny'
    ):
        found.run()
