"""The hook in a Runner with a toy model; the values again by hand from the routings."""

import re
from statistics import fmean, variance
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.structures import BaseDataElement
from running import logged

from mmdet_moe.engine import BalancingLossHook
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MuMoEConv1x1

IMPORTANCE = {'type': 'mmdet_moe.ImportanceLoss', 'weight': 0.5}
Z = {'type': 'mmdet_moe.RouterZLoss', 'weight': 0.001}


class Recorder(Hook):
    """Keeps what every iteration put out and how it was routed."""

    def __init__(self):
        self.outputs, self.importance, self.z = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        layers = {'stem': runner.model.stem, 'body_moe': runner.model.body['moe']}
        self.outputs.append({k: v.item() for k, v in outputs.items()})
        layers = {k: m for k, m in layers.items() if getattr(m, 'has_run', False)}
        self.importance.append(
            {k: layer.routing.dense_weights().sum(0).tolist() for k, layer in layers.items()}
        )
        self.z.append(
            {
                k: (layer.routing.logits.exp().sum(1).log() ** 2).mean().item()
                for k, layer in layers.items()
            }
        )


def hook(loss=IMPORTANCE, **options):
    return {'type': 'mmdet_moe.BalancingLossHook', 'loss': loss, **options}


def importance_loss(importance):
    return 0.5 * variance(importance) / (fmean(importance) ** 2 + 1e-10)


def test_entries_of_all_layers(make_runner, toy_model):
    recorder = Recorder()
    make_runner(toy_model(), [hook(), recorder]).train()
    assert len(recorder.outputs) == 4
    for outputs, importance in zip(recorder.outputs, recorder.importance, strict=True):
        assert set(outputs) == {'loss', 'loss_task', 'loss_moe_stem', 'loss_moe_body_moe'}
        for layer in ('stem', 'body_moe'):
            expected = importance_loss(importance[layer])
            assert outputs[f'loss_moe_{layer}'] == pytest.approx(expected, abs=1e-5)
        parts = (v for k, v in outputs.items() if k != 'loss')
        assert outputs['loss'] == pytest.approx(sum(parts), abs=1e-5)


def test_several_losses_on_some_layers(make_runner, toy_model):
    recorder = Recorder()
    make_runner(toy_model(), [hook([IMPORTANCE, Z], layers=['body.*']), recorder]).train()
    for i, outputs in enumerate(recorder.outputs):
        assert set(outputs) == {
            'loss',
            'loss_task',
            'loss_moe_body_moe_ImportanceLoss',
            'loss_moe_body_moe_RouterZLoss',
        }
        expected = importance_loss(recorder.importance[i]['body_moe'])
        assert outputs['loss_moe_body_moe_ImportanceLoss'] == pytest.approx(expected, abs=1e-5)
        expected = 0.001 * recorder.z[i]['body_moe']
        assert outputs['loss_moe_body_moe_RouterZLoss'] == pytest.approx(expected, rel=1e-4)


def test_the_loss_trains_the_router(make_runner, toy_model):
    """With a weight that drowns the task, the importance gets balanced."""
    recorder = Recorder()
    strong = hook({**IMPORTANCE, 'weight': 50.0})
    optimizer = {'optimizer': {'type': 'Adam', 'lr': 0.05}}
    make_runner(toy_model(), [strong, recorder], max_iters=60, optim_wrapper=optimizer).train()
    losses = [importance_loss(importance['stem']) for importance in recorder.importance]
    assert sum(losses[-4:]) < 0.2 * sum(losses[:4])  # four batches are one epoch


def test_only_in_training(make_runner, toy_model):
    model = toy_model()
    runner = make_runner(model, [hook()], max_iters=2, val_interval=1)
    runner.train()  # a list of predictions in validation passes through
    batch = {'inputs': torch.randn(2, 3, 4, 4), 'targets': torch.zeros(2, 2)}
    assert set(model(**batch, mode='loss')) == {'loss_task'}  # detached after the training


def test_logged(make_runner, toy_model):
    runner = make_runner(toy_model(), [hook()])
    runner.train()
    names = {'loss_moe_stem', 'loss_moe_body_moe'}
    assert any(names <= entry.keys() for entry in logged(runner.log_dir))


def test_with_ema(make_runner, toy_model):
    """EMAHook deep-copies the model and evaluates the copy."""
    recorder = Recorder()
    hooks = [hook(), {'type': 'EMAHook', 'momentum': 0.5}, recorder]
    runner = make_runner(toy_model(), hooks, max_iters=4, val_interval=2)
    runner.train()
    assert all('loss_moe_stem' in outputs for outputs in recorder.outputs)
    checkpoint = torch.load(f'{runner.work_dir}/iter_4.pth', weights_only=False)
    assert not any('routing' in key for key in checkpoint['ema_state_dict'])
    resumed = make_runner(toy_model(), hooks, max_iters=6, resume=True)
    resumed.train()
    assert resumed.iter == 6


def test_model_without_moe_layers(make_runner, dense_model):
    runner = make_runner(dense_model, [hook()])
    with pytest.raises(ConfigError, match='BalancingLossHook found no MoE layer in DenseModel'):
        runner.train()


def test_factorised_layers_alone(make_runner, dense_model):
    dense_model.conv = MuMoEConv1x1(3, 2, 4, 3)
    runner = make_runner(dense_model, [hook()])
    message = r'BalancingLossHook: the model has only μMoE layers \(conv\), .* remove the hook'
    with pytest.raises(ConfigError, match=message):
        runner.train()


def test_factorised_layers_beside_sparse_ones_do_not_pay(make_runner, toy_model):
    model = toy_model()
    model.body['moe'] = MuMoEConv1x1(3, 2, 4, 3)
    recorder = Recorder()
    make_runner(model, [hook(), recorder]).train()
    assert all('loss_moe_stem' in outputs for outputs in recorder.outputs)
    assert not any('loss_moe_body_moe' in outputs for outputs in recorder.outputs)


def test_pattern_that_matches_nothing(make_runner, toy_model):
    runner = make_runner(toy_model(), [hook(layers=['stem', 'backbone.*'])])
    message = r"layers: 'backbone\.\*' matches none of the MoE layers \['stem', 'body\.moe'\]"
    with pytest.raises(ConfigError, match=message):
        runner.train()
    with pytest.raises(ConfigError, match="layers: '' matches none"):
        make_runner(toy_model(), [hook(layers=[])], name='nothing').train()


def test_refused_configs():
    for nothing in ([], None):
        with pytest.raises(ConfigError, match='loss is empty'):
            BalancingLossHook(nothing)
    with pytest.raises(ConfigError, match='GAPRouter is no balancing loss'):
        BalancingLossHook(
            {'type': 'mmdet_moe.GAPRouter', 'in_channels': 1, 'num_experts': 2, 'top_k': 1}
        )


def losses_of(runner):
    """The names of the losses in the log of a run."""
    entries = logged(runner.work_dir)
    return {key for entry in entries for key in entry if key.startswith('loss_moe_stem')}


def test_losses_of_one_class_and_of_two_hooks_all_count(make_runner, toy_model):
    entropies = [{'type': 'mmdet_moe.EntropyLoss', 'over': over} for over in ('batch', 'item')]
    hooks = [
        {'type': 'mmdet_moe.BalancingLossHook', 'loss': entropies},
        {'type': 'mmdet_moe.BalancingLossHook', 'loss': {'type': 'mmdet_moe.ImportanceLoss'}},
        {'type': 'mmdet_moe.BalancingLossHook', 'loss': {'type': 'mmdet_moe.RouterZLoss'}},
    ]
    runner = make_runner(toy_model(), hooks, max_iters=1)
    runner.train()
    assert losses_of(runner) == {
        'loss_moe_stem_EntropyLoss',
        'loss_moe_stem_EntropyLoss_2',
        'loss_moe_stem',
        'loss_moe_stem_2',
    }


def test_frozen_layer_is_refused(make_runner, toy_model):
    model = toy_model()
    model.stem.requires_grad_(False)
    runner = make_runner(
        model, [{'type': 'mmdet_moe.BalancingLossHook', 'loss': {'type': 'mmdet_moe.KLLoss'}}]
    )
    with pytest.raises(ConfigError, match='MoE layer "stem" is frozen'):
        runner.train()


@pytest.mark.parametrize('by_name', [False, True])
def test_data_sets_of_inputs_that_are_no_images(by_name, make_runner, toy_model):
    """Such as RoIs: hundreds of them have not the sources of 2 images."""

    class OfTwo(toy_model):
        def forward(self, inputs, data_samples, mode='tensor'):
            return super().forward(inputs, self.targets, mode)

        def train_step(self, data, optim_wrapper):
            self.targets = data['targets']
            samples = [BaseDataElement(metainfo={'dataset_source': i}) for i in range(2)]
            both = {'inputs': data['inputs'], 'data_samples': samples}
            return super().train_step(both if by_name else (*both.values(),), optim_wrapper)

    runner = make_runner(OfTwo(), [hook({'type': 'mmdet_moe.DatasetLoss', 'sources': 2})])
    with pytest.raises(ConfigError, match=r'"stem" decides on 4 inputs .* not on the 2 images'):
        runner.train()


@pytest.mark.parametrize(('sources', 'said'), [
    (None, None), (3, None), ([0, 1, (2, 3)], None), (2, 'sources=2 is for 2 data sets, but the t'),
    ([0, 1, 2, 3], 'is for 4 data sets, but the training has 3; leave it out'),
])  # fmt: skip
def test_how_many_data_sets_there_are(sources, said, toy_model):
    """By the data set that joins them; whoever says otherwise is told before the training."""
    loss = {'type': 'mmdet_moe.DatasetLoss'} | ({} if sources is None else {'sources': sources})
    joined = SimpleNamespace(metainfo={'sources': ('cells', 'tarmac', 'photographs')})
    loader = SimpleNamespace(dataset=joined)
    runner = SimpleNamespace(model=toy_model(), train_dataloader=loader)
    adds = BalancingLossHook(loss)
    if said:
        with pytest.raises(ConfigError, match=re.escape(said)):
            adds.before_train(runner)
    else:
        adds.before_train(runner)
        assert len(adds.losses[0].experts_of(4)) == 3


def test_a_layer_that_is_not_run_does_not_pay(make_runner, toy_model, monkeypatch):
    """As a head without a positive RoI; of several ranks the others would wait for its sums."""

    class Without(toy_model):
        def forward(self, inputs, targets, mode='tensor'):
            if mode == 'loss':
                return {'loss_task': self.stem(inputs).square().mean()}
            return super().forward(inputs, targets, mode)

    recorder = Recorder()
    make_runner(Without(), [hook(), recorder], max_iters=2).train()
    assert all(set(o) == {'loss', 'loss_task', 'loss_moe_stem'} for o in recorder.outputs)
    monkeypatch.setattr('mmdet_moe.engine.hooks.balancing_loss_hook.get_world_size', lambda: 2)
    with pytest.raises(ConfigError, match=r'"body\.moe" was not run in this iteration of one rank'):
        make_runner(Without(), [hook()], max_iters=1, name='ranks').train()


def test_all_calls_of_a_forward_pass_pay_together(make_runner, toy_model):
    """A layer that the model calls for parts of the batch, and once more for all of it."""

    class Twice(toy_model):
        def forward(self, inputs, targets, mode='tensor'):
            if mode == 'loss':
                for part in (inputs[:1], inputs[1:]):
                    self.stem(part)
                return {'loss_task': super().forward(inputs, targets)[0].square().mean()}
            return super().forward(inputs, targets, mode)

    constraint = {'type': 'mmdet_moe.MeanImportanceConstraint', 'threshold': 1.0}
    model, recorder = Twice({'constraint': constraint}), Recorder()
    make_runner(model, [hook(), recorder], max_iters=3).train()
    for outputs, importance in zip(recorder.outputs, recorder.importance, strict=True):
        assert sum(importance['stem']) == pytest.approx(8)  # each of 4 images twice
        expected = importance_loss(importance['stem'])
        assert outputs['loss_moe_stem'] == pytest.approx(expected, abs=1e-5)
    assert model.stem.router.constraint.num_batches == 3
