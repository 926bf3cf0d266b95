"""From the server to a trained classifier: what the tool prepares is what the training reads."""

import json
from pathlib import Path

import pytest
from miniature import expect_cifar, expect_fashion_mnist, pack, write_cifar100, write_fashion_mnist
from running import failure, load_tool, logged

from mmdet_moe import cli
from mmdet_moe.datasets import download

CONFIG = """
default_scope = 'mmpretrain'
data_root = 'data'
data_preprocessor = dict(num_classes={classes}, mean=[127.5] * {channels}, std=[64] * {channels})
train_dataloader = dict(
    batch_size=8, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type={type!r}, data_root=data_root, split='train', download=False,
                 pipeline=[dict(type='PackInputs')]),
)
val_dataloader = dict(
    batch_size=50, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type={type!r}, data_root=data_root, split='test', test_mode=True, download=False,
                 pipeline=[dict(type='PackInputs')]),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.001))
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False),
    logger=dict(type='LoggerHook', interval=1),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdet_moe.MoEResNet', depth=18, in_channels={channels}, stem_channels=8,
                  base_channels=8, out_indices=(3,), norm_eval=True, moe_stages=4, num_experts=3,
                  top_k=2),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes={classes}, in_channels=64,
              loss=dict(type='CrossEntropyLoss')),
)
custom_hooks = [
    dict(type='mmdet_moe.ExpertUtilizationHook'),
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.KLLoss')),
]
"""


def serve_cifar100(server, folder, monkeypatch):
    written = write_cifar100(folder, num_train=200, num_test=100)
    archive = pack(written)
    expect_cifar(monkeypatch, written, archive)
    server.files[f'/{download.CIFAR["cifar100"].path}'] = archive.read_bytes()


def serve_fashion_mnist(server, folder, monkeypatch):
    write_fashion_mnist(folder, num_train=50, num_test=20, gz=True)
    expect_fashion_mnist(monkeypatch, folder)
    for path in folder.iterdir():
        server.files[f'/{path.name}'] = path.read_bytes()


@pytest.mark.parametrize(
    ('command', 'serve', 'options'),
    [
        ('cifar100', serve_cifar100, dict(type='CIFAR100', classes=100, channels=3)),
        ('fashion-mnist', serve_fashion_mnist, dict(type='FashionMNIST', classes=10, channels=1)),
    ],
)
def test_download_and_train(server, tmp_path, monkeypatch, capsys, command, serve, options):
    serve(server, tmp_path / 'published', monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path('classifier.py').write_text(CONFIG.format(**options))
    train = ['classifier.py', '--work-dir', 'run']

    # The message about the missing data names the command that brings them.
    message = failure(capsys, cli.run_train, train)
    fix = f'`tools/prepare_data.py {command} --out data`'
    assert "train_dataloader.dataset.data_root: there is no folder 'data'" in message
    assert fix in message
    arguments = fix.strip('`').split()[1:]
    assert load_tool('prepare_data').main([*arguments, '--url-base', server.url]) == 0

    cli.run_train(train)
    entries = logged('run')
    losses = [entry for entry in entries if 'loss' in entry]
    assert len(losses) == 2
    for entry in losses:
        assert entry['loss_moe_backbone_layer4'] >= 0
        # The cross-entropy has no entry of its own next to the sum.
        assert entry['loss'] > entry['loss_moe_backbone_layer4']
    [accuracy] = [entry['accuracy/top1'] for entry in entries if 'accuracy/top1' in entry]
    assert 0 <= accuracy <= 100
    # The hook counts the images of the validation: those of the test split.
    report = json.loads(Path('run/expert_utilization_val.json').read_text())
    num_test = 100 if command == 'cifar100' else 20
    layer = report['layers']['backbone.layer4']
    assert layer['num_items'] == num_test
    assert sum(layer['load']) == pytest.approx(1)
