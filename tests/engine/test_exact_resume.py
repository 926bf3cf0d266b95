"""What a checkpoint of a training holds besides weights; `research/interrupted.py`: bit for bit."""

from types import SimpleNamespace

import pytest
import torch
from mmdet.models.data_preprocessors import BatchSyncRandomResize
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from ranks import run_on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdet_moe.engine.exact_resume import ExactResumeHook
from mmdet_moe.moe import GAPRouter, MoELayer


class Model(BaseModel):
    def __init__(self, resize=False):
        super().__init__()
        torch.manual_seed(0)
        self.resize = BatchSyncRandomResize((4, 12), interval=3, size_divisor=4) if resize else None
        self.sizes = []
        router = GAPRouter(3, 2, 1, noise=False, init='kmeans')
        self.moe = MoELayer(nn.Conv2d(3, 2, 1), 2, 1, router)

    def forward(self, inputs, mode='tensor'):
        if self.resize is not None:
            inputs, _ = self.resize(inputs, [])
            self.sizes.append(inputs.shape[-1])
        y = self.moe(inputs)
        return {'loss': (y - 1).square().mean()} if mode == 'loss' else [y.mean()]


def train(folder, stop=None, by_epoch=False, seed=5, model=None, sampler_seed=None, **options):
    """Eight iterations of 24 images, or, by epoch, two of four; k-means needs 128 images."""
    images = torch.randn(8 * 24, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    loader = dict(
        batch_size=24,
        dataset=[dict(inputs=image) for image in images[: 96 if by_epoch else None]],
        sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
    )
    if sampler_seed is not None:
        loader['sampler']['seed'] = sampler_seed
    hook = dict(type='CheckpointHook', by_epoch=False, **options.pop('checkpoint', {}))
    runner = Runner(
        model=model or Model(),
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=2) if by_epoch
        else dict(by_epoch=False, max_iters=stop or 8),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.01)),
        default_hooks=dict(checkpoint=hook),
        custom_hooks=[ExactResumeHook()],
        experiment_name=f'{folder.name}{stop}{len(options)}',
        log_level='ERROR',
        randomness=dict(seed=seed),
        **options,
    )  # fmt: skip
    runner.train()
    return runner.model.state_dict()


def test_a_start_that_waits_for_items_goes_on(tmp_path):
    expected = train(tmp_path / 'whole', checkpoint=dict(interval=8))
    train(tmp_path / 'half', stop=3, checkpoint=dict(interval=3))
    resumed = train(tmp_path / 'half', resume=True, checkpoint=dict(interval=8))
    assert expected['moe.router.start.done']
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def test_a_size_that_was_drawn_for_some_iterations_stays(tmp_path):
    whole, half, resumed = Model(True), Model(True), Model(True)
    expected = train(tmp_path / 'whole', model=whole, checkpoint=dict(interval=8))
    train(tmp_path / 'half', stop=4, model=half, checkpoint=dict(interval=4))
    found = train(tmp_path / 'half', model=resumed, resume=True, checkpoint=dict(interval=8))
    assert half.sizes + resumed.sizes == whole.sizes
    assert len(set(whole.sizes)) > 1
    assert whole.sizes[4] != 4  # as it would be without
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_seed_that_nobody_gave_is_kept(tmp_path):
    train(tmp_path / 'half', stop=3, seed=None, checkpoint=dict(interval=3))
    seed = torch.load(tmp_path / 'half/iter_3.pth')['meta']['seed']
    expected = train(tmp_path / 'whole', seed=seed)
    resumed = train(tmp_path / 'half', resume=True, seed=None)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def test_a_sampler_with_a_seed_of_its_own_keeps_it(tmp_path):
    expected = train(tmp_path / 'whole', sampler_seed=42)
    train(tmp_path / 'half', stop=3, sampler_seed=42, checkpoint=dict(interval=3))
    resumed = train(tmp_path / 'half', resume=True, sampler_seed=42)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def test_a_part_that_is_no_longer_there(tmp_path):
    """Multi-scale training that is turned off in the middle."""
    train(tmp_path, stop=4, model=Model(True), checkpoint=dict(interval=4))
    train(tmp_path, resume=True, checkpoint=dict(interval=8))
    assert torch.load(tmp_path / 'iter_8.pth')['meta']['iter'] == 8


def test_several_optimizers():
    wrapper = OptimWrapperDict(a=OptimWrapper(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)))
    state = ExactResumeHook()._state(SimpleNamespace(model=Model(), optim_wrapper=wrapper))
    assert not state['gradients']


def test_a_checkpoint_of_one_name_stays(tmp_path):
    train(tmp_path, checkpoint=dict(interval=2, max_keep_ckpts=1, filename_tmpl='latest.pth'))
    assert torch.load(tmp_path / 'latest.pth')['meta']['iter'] == 8


@pytest.mark.parametrize(
    ('iteration', 'told', 'validations'),
    [
        (4, {'by_epoch': True}, 2),
        (4, {'by_epoch': True, 'validated': True}, 1),
        (4, {'by_epoch': None}, 2),  # of an earlier version
        (6, {'by_epoch': None}, 1),
        (6, {}, 1),
        (6, {'by_epoch': True}, 2),  # after an epoch that was begun anew in its middle
    ],
)
def test_validated_are_weights_of_the_end_of_an_epoch(
    tmp_path, monkeypatch, iteration, told, validations
):
    train(tmp_path, by_epoch=True, checkpoint=dict(interval=1))
    path = tmp_path / f'iter_{iteration}.pth'
    content = torch.load(path)
    content['meta']['epoch'] = iteration // 4
    content['mmdet_moe_resumption'].update(told)
    torch.save(content, path)
    validated = []
    loop = SimpleNamespace(run=lambda: validated.append(1))
    monkeypatch.setattr(Runner, 'val_loop', property(lambda _: loop))
    monkeypatch.setattr(Runner, 'build_val_loop', lambda *_: loop)
    train(tmp_path, by_epoch=True, load_from=str(path), resume=True)
    assert len(validated) == validations


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(3))

    def forward(self, x, parts):
        return sum(self.parts[part](x).sum() for part in parts)


def play(rank, world_size):
    model = DistributedDataParallel(Halves(), find_unused_parameters=True)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1), accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 4)
    with wrapper.optim_context(model):
        loss = model(torch.full((1, 1), 2.0), (rank,))
    wrapper.update_params(loss)
    state = ExactResumeHook()._state(SimpleNamespace(model=model, optim_wrapper=wrapper))
    return {name: gradient.item() for name, gradient in state['gradients'].items()}


def test_ranks_that_train_different_parts(tmp_path):
    """A rank without a gradient takes part in the mean as one whose gradient is 0."""
    mean = 2 / 2 / 2  # of two ranks, and of two batches
    expected = {f'parts.{part}.weight': mean for part in range(2)}
    assert run_on_ranks(play, 2, tmp_path) == [expected] * 2
