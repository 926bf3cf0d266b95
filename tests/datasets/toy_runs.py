"""A model with two MoE layers that trains in milliseconds, and a Runner for it."""

import logging

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from mmdet_moe.moe import MoELayer

E, C = 4, 3


class ToyData(Dataset):
    """16 images with a target each; the channel of each image's bright plane alternates."""

    def __init__(self, size=16):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(size, C, 4, 4, generator=generator)
        for i in range(size):
            self.images[i, i % C] += 3
        self.targets = torch.randn(size, 2, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'inputs': self.images[index], 'targets': self.targets[index]}


class ToyModel(BaseModel):
    """Two MoE layers in a row, ``stem`` and ``body.moe``; the others are dense."""

    def __init__(self, router=None, num_experts=E):
        super().__init__()
        router = (
            {'noise': False, **(router or {})} if 'constraint' not in (router or {}) else router
        )

        def moe(out_channels):
            expert = nn.Conv2d(C, out_channels, 1)
            return MoELayer(expert, num_experts, min(2, num_experts), router, in_channels=C)

        self.stem = moe(C)
        self.body = nn.ModuleDict({'moe': moe(2)})
        for layer in (self.stem, self.body['moe']):
            nn.init.normal_(layer.router.fc.weight)

    def forward(self, inputs, targets, mode='tensor'):
        x = self.body['moe'](self.stem(inputs)).mean((2, 3))
        if mode == 'loss':
            return {'loss_task': (x - targets).square().mean()}
        return list(x) if mode == 'predict' else x


class DenseModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, 2, 1)

    def forward(self, inputs, targets, mode='tensor'):
        return {'loss_task': self.conv(inputs).square().mean()}


class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [float(x.sum()) for x in data_samples]

    def compute_metrics(self, results):
        return {'sum': sum(results)}


@pytest.fixture
def toy_model():
    return ToyModel


@pytest.fixture
def dense_model():
    return DenseModel()


@pytest.fixture
def make_runner(tmp_path):
    """``make_runner(model, hooks, max_iters=4, …)``; further options go to the Runner."""
    runners = []

    def make(model, hooks=(), max_iters=4, val_interval=100, name='run', **options):
        loader = {
            'dataset': ToyData(),
            'sampler': {'type': 'DefaultSampler', 'shuffle': False},
            'batch_size': 4,
            'collate_fn': {'type': 'default_collate'},
        }
        options = {
            'default_hooks': {
                'logger': {'type': 'LoggerHook', 'interval': 1},
                'checkpoint': {'type': 'CheckpointHook', 'interval': 2, 'by_epoch': False},
            },
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.05}},
            'visualizer': {'type': 'Visualizer', 'vis_backends': [{'type': 'LocalVisBackend'}]},
            **options,
        }
        # Unlike this one, a finite sampler makes MMEngine sleep between epochs.
        train_loader = {**loader, 'sampler': {'type': 'InfiniteSampler', 'shuffle': False}}
        loop = {'by_epoch': False, 'max_iters': max_iters, 'val_interval': val_interval}
        runner = Runner(
            model,
            work_dir=str(tmp_path / name),
            train_dataloader=options.pop('train_dataloader', train_loader),
            val_dataloader=loader,
            test_dataloader=loader,
            train_cfg=options.pop('train_cfg', loop),
            val_cfg={},
            test_cfg={},
            val_evaluator=[ToyMetric()],
            test_evaluator=[ToyMetric()],
            custom_hooks=list(hooks),
            experiment_name=f'{tmp_path.name}_{name}_{len(runners)}',
            **options,
        )
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.close()
