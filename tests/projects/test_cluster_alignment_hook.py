"""The record of a training against the weights and decisions that it is about."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS

from mmdet_moe import cli
from mmdet_moe.errors import ConfigError
from projects.cluster_theory import ClusterAlignmentHook, ClusterPatches
from projects.cluster_theory.cluster_alignment_hook import RECORD_FILE
from projects.cluster_theory.experiment import CONFIGS
from research.checks.interruptions import in_processes

CONFIG = str(CONFIGS / 'mixture.py')
OPTIONS = (
    'train_dataloader.batch_size=200',
    'train_dataloader.dataset.num_samples=200',
    'val_dataloader.dataset.num_samples=50',
    'custom_hooks.2.interval=3',
    'default_hooks.checkpoint.interval=1',
)
# Each rank, and each part of an interrupted run, would draw noise of its own.
NO_NOISE = ('model.router.noise=False', 'model.router.init_std=0.01')


def train(work_dir, iterations, *more, options=()):
    options = [
        *OPTIONS,
        f'train_cfg.max_iters={iterations}',
        f'experiment_name={work_dir}_{iterations}',
        *options,
    ]
    cli.run_train([CONFIG, '--work-dir', work_dir, *more, '--cfg-options', *options])
    with np.load(f'{work_dir}/{RECORD_FILE}') as record:
        return dict(record)


def test_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = train('run', 8)
    assert record['steps'].tolist() == [0, 3, 6, 8]
    assert math.isnan(record['loss'][0])
    assert math.isnan(record['dispatch_entropy'][0])
    assert not record['router_centres'][0].any()
    data = ClusterPatches(num_samples=1)
    for row, step in enumerate((3, 6, 8), start=1):
        state = torch.load(f'run/iter_{step}.pth', weights_only=False)['state_dict']
        for name, vectors in (('features', data.features), ('centres', data.centres)):
            for e in range(8):
                for k in range(4):
                    filters = [float(w @ vectors[k]) for w in state['moe.experts.weight'][e]]
                    largest = max(map(abs, filters))
                    assert record[f'expert_{name}'][row, e, k] == pytest.approx(largest, rel=1e-4)
                    inner = float(state['moe.router.fc.weight'][e] @ vectors[k])
                    assert record[f'router_{name}'][row, e, k] == pytest.approx(inner, abs=1e-7)
        assert record['load'][row].sum() == pytest.approx(1)
        assert 0 < record['dispatch_entropy'][row] < math.log(4)
    assert record['loss'][3] < math.log(2) + 1e-3


def test_entropy_and_load_of_the_batch(make_runner):
    class Decide(Hook):
        """The decisions of the forward pass, replaced by given ones."""

        priority = 'VERY_HIGH'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            routing = runner.model.moe.routing
            routing.expert_ids = (data_batch['cluster'] // 2)[:, None]
            self.clusters = data_batch['cluster']

    cfg = Config.fromfile(CONFIG)
    decide = Decide()
    runner = make_runner(
        MODELS.build(cfg.model), [decide, {'type': 'mmdet_moe.ClusterAlignmentHook'}], max_iters=1
    )
    loader = {**cfg.train_dataloader, 'batch_size': 40}
    runner._train_dataloader = {**loader, 'dataset': {**loader['dataset'], 'num_samples': 40}}
    runner._val_dataloader = runner._val_loop = runner._val_evaluator = None
    runner.train()
    with np.load(Path(runner.work_dir) / RECORD_FILE) as file:
        record = dict(file)
    counts = torch.bincount(decide.clusters, minlength=4).double()
    expected = 0.0
    for pair in (counts[:2], counts[2:]):
        p = pair / pair.sum()
        expected -= float(pair.sum() / 40 * (p * p.log()).sum())
    assert record['dispatch_entropy'][-1] == pytest.approx(expected)
    load = [float(counts[:2].sum() / 40), float(counts[2:].sum() / 40), *[0.0] * 6]
    assert record['load'][-1].tolist() == pytest.approx(load)


def test_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = train('whole', 7, options=NO_NOISE)
    first = train('parts', 4, options=NO_NOISE)
    parts = train('parts', 7, '--resume', options=NO_NOISE)
    assert first['steps'].tolist() == [0, 3, 4]
    assert parts['steps'].tolist() == [0, 3, 4, 6, 7]
    for key, values in whole.items():
        np.testing.assert_array_equal(parts[key][:3], first[key])
        np.testing.assert_allclose(parts[key][3:], values[2:], rtol=1e-4)
    # In another folder there is no record to go on with: it begins with the resumed weights.
    elsewhere = train('elsewhere', 7, '--resume', 'parts/iter_4.pth', options=NO_NOISE)
    assert elsewhere['steps'].tolist() == [4, 6, 7]
    unknown = {'loss', 'dispatch_entropy', 'load'}
    for key, values in elsewhere.items():
        np.testing.assert_allclose(values[1:], parts[key][3:], rtol=1e-4)
        if key in unknown:
            assert np.isnan(values[0]).all()
        else:
            np.testing.assert_array_equal(values[0], parts[key][2])


# With the initial weights of the config all losses are log 2 at first.
DIFFERENT_LOSSES = (*NO_NOISE, 'model.init_scale=0.5')


def test_two_ranks_record_what_one_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = train('one', 4, options=DIFFERENT_LOSSES)
    options = [*DIFFERENT_LOSSES, 'train_dataloader.batch_size=100']
    arguments = ('ranks', 4, '--launcher', 'pytorch')
    in_processes(tmp_path, lambda: train(*arguments, options=options), ranks=2)
    with np.load(f'ranks/{RECORD_FILE}') as record:
        for key, values in expected.items():
            np.testing.assert_allclose(record[key], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('interval', [0, -1, 2.5, 'a'])
def test_interval_is_refused(interval):
    with pytest.raises(ConfigError, match=r'ClusterAlignmentHook: interval=.* must be an integer'):
        ClusterAlignmentHook(interval)


def test_data_of_another_dimension_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train('run', 1, options=['train_dataloader.dataset.patch_dim=60'])
    assert 'the data has patch_dim=60, the model in_channels=50; give' in capsys.readouterr().err


@pytest.mark.parametrize('dense', [False, True])
def test_refused(dense, make_runner, toy_model, dense_model):
    hook = {'type': 'mmdet_moe.ClusterAlignmentHook'}
    runner = make_runner(dense_model if dense else toy_model(), [hook])
    with pytest.raises(ConfigError, match='needs data with features and centres, which ToyData'):
        runner.train()
    data = runner.train_dataloader.dataset
    data.features = data.centres = torch.zeros(2, 3)
    message = 'found no MoE layer' if dense else 'needs one MoE layer of FilterExperts.* has 0'
    with pytest.raises(ConfigError, match=message):
        runner.train()
