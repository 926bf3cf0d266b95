"""A model with a μMoE in MMEngine's training loop."""

import torch
from mmengine.model import BaseModel
from torch import nn

from mmdet_moe.engine.expert_report import ExpertReportHook
from mmdet_moe.moe import MuMoEConv1x1, add_experts


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        add_experts(self, {'conv': {'type': 'CPMuMoE', 'num_experts': (3, 2), 'rank': 2}})

    def forward(self, inputs, targets, mode='tensor'):
        x = self.conv(inputs).mean((2, 3))
        if mode == 'loss':
            return {'loss': (x - targets).square().mean()}
        return list(x) if mode == 'predict' else x


def trained(make_runner, *args, **options):
    torch.manual_seed(0)
    runner = make_runner(Model(), *args, **options)
    runner.train()
    return runner


def test_a_resumed_training_goes_on_as_the_uninterrupted_one(make_runner):
    whole = trained(make_runner, max_iters=4, name='whole')
    trained(make_runner, max_iters=2, name='parts')
    parts = trained(make_runner, max_iters=4, name='parts', resume=True)
    assert parts.iter == 4
    state = whole.model.state_dict()
    assert state['conv.gate.norms.0.num_batches_tracked'] == 4
    for key, value in parts.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_moving_average(make_runner, tmp_path):
    hook = {'type': 'EMAHook', 'momentum': 0.5, 'update_buffers': True}
    runner = trained(make_runner, [hook], max_iters=2, val_interval=2)
    checkpoint = torch.load(tmp_path / 'run' / 'iter_2.pth', weights_only=False)
    averaged, plain = checkpoint['state_dict'], checkpoint['ema_state_dict']
    key = 'conv.experts.factors.0'
    assert not torch.equal(averaged[key], plain[f'module.{key}'])
    assert isinstance(runner.model.conv, MuMoEConv1x1)


def test_what_became_experts_is_logged(make_runner, tmp_path):
    trained(make_runner, [ExpertReportHook()], max_iters=1)
    (log,) = (tmp_path / 'run').glob('*/*.log')
    (row,) = (line for line in log.read_text().splitlines() if line.startswith('conv '))
    assert row.split()[:8] == ['conv', 'Conv2d', '3', '×', '2', 'all', '0', 'pixel']
