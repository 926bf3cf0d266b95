"""Data sets that are registered where their toolbox is installed."""

from contextlib import suppress

with suppress(ModuleNotFoundError):
    from mmdet_moe.datasets import cifar  # noqa: F401
