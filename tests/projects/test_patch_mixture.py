"""The mixture of arXiv 2208.02813 against a dense computation, and trained by the tools."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import METRICS, MODELS, init_default_scope
from running import logged

from mmdet_moe import cli
from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.errors import ConfigError
from projects.cluster_theory import ClusterPatches, PatchMixture
from projects.cluster_theory.experiment import CONFIGS, SETTINGS, TABLE, Run

METRIC_TYPES = ('mmpretrain.Accuracy', 'mmdet_moe.DispatchEntropy')


def mixture(name='mixture', **kwargs):
    cfg = Config.fromfile(CONFIGS / f'{name}.py').model
    return MODELS.build({**cfg, **kwargs})


def dense_by_hand(model, x, noise=0.0):
    """f(x), (N, 2): every expert on everything, the router's best one taken, times its value."""
    patches = x[:, :, 0].transpose(1, 2)
    values = patches.sum(1) @ model.moe.router.fc.weight.T + noise
    z = torch.einsum('npd,efd->npef', patches, model.moe.experts.weight)
    z = (z + model.moe.experts.bias) ** 3
    every = z.sum(1).unflatten(2, (2, -1)).sum(-1)
    best = values.argmax(1)
    rows = torch.arange(len(x))
    return values[rows, best][:, None] * every[rows, best], best


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('loss_on', ['logits', 'probabilities'])
def test_against_a_dense_computation(training, loss_on):
    model = mixture(loss_on=loss_on, init_scale=1.0).train(training)
    torch.nn.init.normal_(model.moe.router.fc.weight, std=0.05)
    batch = ClusterPatches(num_samples=40).__getitems__(range(40))
    torch.manual_seed(5)
    loss = model(**batch, mode='loss')['loss_cls']
    torch.manual_seed(5)
    noise = torch.rand(40, 8) if training else 0.0
    expected, best = dense_by_hand(model, batch['inputs'], noise)
    assert len(set(best.tolist())) > 2
    if loss_on == 'probabilities':
        expected = expected.softmax(1)
    reference = F.cross_entropy(expected, batch['gt_label'])
    torch.testing.assert_close(loss, reference, rtol=1e-4, atol=1e-4)
    parameters = [*model.moe.experts.parameters(), model.moe.router.fc.weight]
    found = torch.autograd.grad(loss, parameters)
    for gradient, by_hand in zip(found, torch.autograd.grad(reference, parameters), strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-4)


def test_a_single_model_is_a_mixture_of_one():
    model = mixture('single').train()
    batch = ClusterPatches(num_samples=30).__getitems__(range(30))
    weight, bias = model.moe.experts.weight[0], model.moe.experts.bias[0]
    assert weight.shape == (80, 50)
    z = (batch['inputs'][:, :, 0].transpose(1, 2) @ weight.T + bias) ** 3
    expected = z.sum(1).unflatten(1, (2, 40)).sum(2)
    torch.testing.assert_close(model(**batch), expected, rtol=1e-4, atol=1e-2)


def test_predictions():
    model = mixture(init_scale=1.0).eval()
    torch.nn.init.normal_(model.moe.router.fc.weight, std=0.05)
    batch = ClusterPatches(num_samples=10).__getitems__(range(10))
    samples = model(**batch, mode='predict')
    expected, best = dense_by_hand(model, batch['inputs'])
    for i, sample in enumerate(samples):
        torch.testing.assert_close(sample['pred_score'], expected[i].softmax(0))
        assert sample['gt_label'].tolist() == [batch['gt_label'][i]]
        assert sample['expert_ids'].tolist() == [best[i]]
        assert sample['cluster'] == batch['cluster'][i]
    del batch['cluster']
    assert 'cluster' not in model(**batch, mode='predict')[0]


def test_samples_without_a_label():
    model = mixture(init_scale=1.0).eval()
    batch = ClusterPatches(num_samples=10).__getitems__(range(10))
    inputs = batch['inputs']
    assert torch.equal(model(inputs), model(**batch))
    labelled, unlabelled = model(**batch, mode='predict'), model(inputs, mode='predict')
    for expected, sample in zip(labelled, unlabelled, strict=True):
        assert set(sample) == {'pred_score', 'expert_ids'}
        assert torch.equal(sample['pred_score'], expected['pred_score'])
    with pytest.raises(ConfigError, match=r"the batch has no gt_label, which mode='loss' needs"):
        model(inputs, mode='loss')


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode='scores' is unknown; use 'tensor', 'loss' or 'pred"):
        mixture()(torch.zeros(1, 50, 1, 4), mode='scores')


def test_pickled_predictions_grow_linearly():
    """And so do those that the metrics keep, which distributed ranks pickle to exchange them."""
    model = mixture().eval()
    metrics = [METRICS.build(dict(type=name)) for name in METRIC_TYPES]
    sizes = []
    for number in (100, 200):
        batch = ClusterPatches(num_samples=number).__getitems__(range(number))
        samples = model(**batch, mode='predict')
        kept = [samples]
        for metric in metrics:
            metric.results.clear()
            metric.process(None, samples)
            kept.append(metric.results)
        sizes.append([len(pickle.dumps(results)) for results in kept])
    for small, large in zip(*sizes, strict=True):
        assert large < 2.1 * small


def test_refused():
    with pytest.raises(ConfigError, match="loss_on='scores' is unknown"):
        PatchMixture(loss_on='scores')
    with pytest.raises(ConfigError, match='PatchMixture: num_classes=1 must be an integer of at l'):
        PatchMixture(num_classes=1)
    with pytest.raises(ConfigError, match='FilterExperts: num_filters=0 must be an integer of at'):
        PatchMixture(num_filters=0)


def test_inputs_of_other_data_are_refused():
    batch = ClusterPatches(num_samples=3, patch_dim=60).__getitems__(range(3))
    message = r'in_channels=50 wants inputs \(N, 50, 1, P\), got \(3, 60, 1, 4\); set model.in_ch'
    with pytest.raises(ConfigError, match=message):
        mixture()(**batch, mode='loss')


SMALL = (
    'train_dataloader.batch_size=400',
    'train_dataloader.dataset.num_samples=400',
    'val_dataloader.dataset.num_samples=300',
    'test_dataloader.dataset.num_samples=300',
    'test_dataloader.batch_size=70',
)


@pytest.mark.parametrize(
    'run', [Run(setting, model, 0) for setting, model in zip((3, 2, 4, 1), TABLE, strict=True)]
)
def test_config_trains_and_tests(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(run.config)
    options = [*SMALL, *run.options, 'train_cfg.max_iters=12', 'train_cfg.val_interval=12']
    options.append('default_hooks.logger.interval=4')
    cli.run_train([config, '--work-dir', 'run', '--cfg-options', *options])
    losses = [line['loss'] for line in logged('run') if 'loss' in line]
    assert losses[-1] < losses[0]
    (metrics,) = [line for line in logged('run') if 'accuracy/top1' in line]
    assert 0 <= metrics['moe/dispatch_entropy'] <= 1.39
    options = [*SMALL, *run.options, 'experiment_name=test']
    cli.run_test([config, 'run/iter_12.pth', '--work-dir', 'test', '--cfg-options', *options])
    tested = json.loads(next(Path('test').glob('*/*.json')).read_text())
    assert tested['accuracy/top1'] == pytest.approx(metrics['accuracy/top1'])
    assert tested['moe/dispatch_entropy'] == pytest.approx(metrics['moe/dispatch_entropy'])


@pytest.mark.parametrize('model', TABLE, ids=lambda model: model.key)
@pytest.mark.parametrize('number', SETTINGS)
def test_run_is_what_its_name_says(number, model):
    """Setting, activation, number of experts and filters, and how they are trained."""
    run = Run(number, model, 0)
    cfg = load_config(str(run.config), parse_options(run.options))
    for loader, split in (('train', 'train'), ('val', 'test'), ('test', 'test')):
        dataset = cfg[f'{loader}_dataloader'].dataset
        assert (dataset.setting, dataset.split) == (f's{number}', split)
    is_single, is_linear = 'single' in model.name, 'non-linear' not in model.name
    init_default_scope('mmpretrain')
    built = MODELS.build(cfg.model)
    experts = built.moe.experts
    assert experts.activation == ('linear' if is_linear else 'cubic')
    assert experts.weight.shape == ((1, 2 * 40, 50) if is_single else (8, 2 * 8, 50))
    optimizer = build_optim_wrapper(built, cfg.optim_wrapper).optimizer
    if is_single:
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam
        assert (group['lr'], group['weight_decay']) == (3e-3 if is_linear else 1e-2, 5e-4)
    else:
        of_experts, of_router = optimizer.param_groups
        assert (of_experts['lr'], of_experts['normalize']) == (1e-3, True)
        assert (of_router['lr'], of_router['normalize']) == (0.1, False)
        assert of_router['params'] == [built.moe.router.fc.weight]


def test_same_seed_same_model(tmp_path, monkeypatch):
    """Also after another training in the same process."""
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / 'mixture.py')
    options = [*SMALL, 'train_cfg.max_iters=5']
    for name, seed in (('a', 1), ('b', 2), ('c', 1)):
        given = [*options, f'randomness.seed={seed}', f'experiment_name={name}']
        cli.run_train([config, '--work-dir', name, '--cfg-options', *given])
    a, b, c = (torch.load(f'{name}/iter_5.pth', weights_only=False)['state_dict'] for name in 'abc')
    assert all(torch.equal(a[key], c[key]) for key in a)
    assert not torch.equal(a['moe.experts.weight'], b['moe.experts.weight'])


def test_balancing_by_config(tmp_path, monkeypatch):
    """The paper's load-balancing loss is Switch's."""
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / 'mixture.py')
    options = [*SMALL, 'train_cfg.max_iters=2', 'default_hooks.logger.interval=1']
    options.append('custom_hooks.3.loss.weight=0.5')
    cli.run_train([config, '--work-dir', 'run', '--cfg-options', *options])
    first = next(line for line in logged('run') if 'loss' in line)
    # The logits are all 0 at first, so P is uniform and the loss is the weight.
    assert first['loss_moe_moe'] == pytest.approx(0.5)
    assert first['loss'] == pytest.approx(first['loss_cls'] + 0.5)
