"""Checks of a config against the disk before anything is built.

A wrong path or class list otherwise shows up minutes later, deep in a toolbox, or never:
MMDetection ignores class names that an annotation file does not have. Every complaint is one
:class:`~mmdet_moe.errors.ConfigError` sentence with the config's field and the fix.
"""

from mmdet_moe.engine.preflight.checkpoints import (
    check_checkpoint,
    recorded_checkpoint,
    resumable_checkpoint,
)
from mmdet_moe.engine.preflight.config import check_config, check_runner
from mmdet_moe.engine.preflight.datasets import check_trained_classes, datasets_of

__all__ = [
    'check_checkpoint',
    'check_config',
    'check_runner',
    'check_trained_classes',
    'datasets_of',
    'recorded_checkpoint',
    'resumable_checkpoint',
]
