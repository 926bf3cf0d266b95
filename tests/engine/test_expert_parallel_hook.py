"""A Runner of two processes that hold the experts together, against one of one process."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from ranks import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdet_moe import cli
from mmdet_moe.engine import ExpertParallelHook
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import add_experts


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Sequential()
        self.head.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh())
        self.head.pixel = nn.Conv2d(4, 2, 1)

    def forward(self, inputs, mode='tensor'):
        y = self.head(self.conv(inputs))
        return {'loss': (y - 1).square().mean()} if mode == 'loss' else y


def model(parts=2):
    torch.manual_seed(0)
    model = Model()
    entry = dict(num_experts=4, top_k=2, expert_init='independent', expert_parallel=parts)
    # Into a part of it, as the presets do.
    add_experts(model.head, {'block': entry, 'pixel': entry}, router=dict(noise=False))
    return model


def runner(folder, world_size, model, epochs=2, **options):
    images = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    wrapper = dict(type='mmdet_moe.ExpertParallelDDP', device_ids=None, broadcast_buffers=False)
    return Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=8 // world_size,
            dataset=[dict(inputs=image) for image in images],
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            optimizer=dict(type='Adam', lr=0.01), clip_grad=dict(max_norm=0.05)
        ),
        custom_hooks=[ExpertParallelHook(), *options.pop('hooks', ())],
        launcher='pytorch' if world_size > 1 else 'none',
        cfg=dict(model_wrapper_cfg=wrapper if world_size > 1 else None),
        experiment_name=f'{folder.name}{epochs}',
        log_level='ERROR',
        randomness=dict(seed=5),
        **options,
    )  # fmt: skip


def play(rank, world_size, base):
    results = {}
    runner(base / 'whole', world_size, model()).train()
    runner(base / 'half', world_size, model(), epochs=1).train()
    half = str(base / 'half' / 'epoch_1.pth')
    runner(base / 'half', world_size, model(), load_from=half, resume=True).train()
    if world_size > 1:
        dist.barrier()  # the first rank saves
    for name in ('whole', 'half'):
        results[name] = torch.load(base / name / 'epoch_2.pth', weights_only=False)['state_dict']
    if world_size > 1:
        for name, options in REFUSED.items():
            with pytest.raises(ConfigError) as caught:
                runner(base / 'refused', world_size, model(), **options).train()
            results[name] = str(caught.value)
        with pytest.raises(ConfigError) as caught:
            runner(base / 'half', world_size, model(1), load_from=half, resume=True).train()
        results['resumed'] = str(caught.value)
        with pytest.raises(ConfigError, match='ExpertParallelHook'):
            model().state_dict()
    return results


REFUSED = {
    'EMA': dict(hooks=[dict(type='EMAHook')]),
}


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    return run_on_ranks(play, 2, folder, folder)


def test_trains_saves_and_resumes_as_one_process(ranks, tmp_path):
    expected = play(0, 1, tmp_path)
    torch.testing.assert_close(expected['half'], expected['whole'], rtol=0, atol=0)
    for rank in ranks:
        for name in ('whole', 'half'):
            assert list(rank[name]) == list(expected['whole'])
            torch.testing.assert_close(rank[name], expected['whole'], rtol=0, atol=1e-5)
        torch.testing.assert_close(rank['half'], rank['whole'], rtol=0, atol=0)


def test_refused(ranks):
    for rank in ranks:
        assert 'EMAHook' in rank['EMA']
        assert 'load_from' in rank['resumed']


@pytest.mark.parametrize('own', [[], [ExpertParallelHook()]])
def test_tools_register_it_once(own, monkeypatch):
    """Two of them would take the optimizer's state apart twice."""
    built = SimpleNamespace(hooks=own, register_hook=own.append)
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: built)
    cli._build_runner(Config({'default_scope': 'mmengine', 'launcher': 'none'}))
    assert [isinstance(hook, ExpertParallelHook) for hook in own].count(True) == 1


def paramwise(key):
    return {'optim_wrapper': {'paramwise_cfg': {'custom_keys': {key: {'lr_mult': 0.1}}}}}


@pytest.mark.parametrize(('changes', 'parts', 'match'), [
    ({}, (2,), None),
    ({}, (2, 4), 'same number in all layers'),
    ({'model': nn.Linear(1, 1)}, (2,), 'use MMDistributedDataParallel'),
    ({'optim_wrapper': OptimWrapperDict()}, (2,), 'use one OptimWrapper'),
    ({'cfg': paramwise('head.block.experts.0')}, (2,), "'head.block.experts.0' finds none"),
    ({'cfg': paramwise('head.block')}, (2,), None),
    ({'optim_wrapper': SimpleNamespace(loss_scaler=torch.amp.GradScaler('cpu'))}, (2,), 'bfloat16'),
])  # fmt: skip
def test_refused_by_itself(changes, parts, match):
    """What two processes are not needed for."""
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)
    runner = {'model': ddp, 'optim_wrapper': None, 'hooks': [], 'cfg': {}, **changes}
    runner = SimpleNamespace(**runner)
    spread = [SimpleNamespace(parts=number) for number in parts]
    with pytest.raises(ConfigError, match=match) if match else nullcontext():
        ExpertParallelHook()._check(runner, spread)
