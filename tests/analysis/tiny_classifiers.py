"""A tiny trained classifier whose head holds experts, sparse or factorised, and its data."""

import torch
from miniature import write_fashion_mnist
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmdet_moe.analysis.models import build_model

CONFIG = """
default_scope = 'mmpretrain'
data_preprocessor = dict(num_classes=10, mean=[127.5], std=[64.])
val_dataloader = dict(
    batch_size=50, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='FashionMNIST', data_root={root!r}, split='test', test_mode=True,
                 download=False, pipeline=[dict(type='PackInputs')]),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
model = dict(
    type='mmdet_moe.WithExperts', of='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=18, in_channels=1, base_channels=4, stem_channels=4,
                  strides=(2, 2, 2, 2)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=32,
              loss=dict(type='CrossEntropyLoss')),
    experts=[dict(at='head.fc', {experts})],
)
"""
SPARSE = "num_experts=4, top_k=2, granularity='token'"
FACTORISED = (
    "type='mmdet_moe.{kind}', num_experts={experts}, rank={rank}, activation={activation!r}"
)


def write_classifier(folder, experts, num_images=100, steps=30, noise=1.0):
    """Write data, config and checkpoint into a folder; train the model for some steps,
    and add noise to the experts.

    Args:
        folder: Where to.
        experts: Text of the options of what becomes of ``head.fc``.
        noise: Relative to the experts' weights.

    Returns:
        The paths of config and checkpoint, and the model in evaluation mode.
    """
    write_fashion_mnist(folder / 'data', num_train=10, num_test=num_images)
    path = folder / 'config.py'
    path.write_text(CONFIG.format(root=str(folder / 'data'), experts=experts))
    cfg = Config.fromfile(path)
    init_default_scope('mmpretrain')
    model = build_model(cfg).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = list(Runner.build_dataloader(cfg.val_dataloader))
    for step in range(steps):
        data = model.data_preprocessor(batches[step % len(batches)], True)
        optimizer.zero_grad()
        model(**data, mode='loss')['loss'].backward()
        optimizer.step()
    with torch.no_grad():  # experts that differ: none can do the others' work
        for parameter in model.head.fc.experts.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    checkpoint = folder / 'model.pth'
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    return path, checkpoint, model.eval()
