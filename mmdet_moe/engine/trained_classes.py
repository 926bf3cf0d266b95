"""Whether a checkpoint knows the classes that it is tested on."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_moe.engine.preflight import check_trained_classes


class TrainedClassesHook(Hook):
    """Compares the classes of a checkpoint with those of the data, once both are there.

    That is before a test, and before a training goes on; one that begins from other weights may
    have classes of its own.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare them.

        Raises:
            ConfigError: Their numbers do not mean the same.
        """
        tested = getattr(runner._test_loop, 'dataloader', None)
        field = 'train_dataloader.dataset' if tested is None else 'test_dataloader.dataset'
        loader = runner.train_dataloader if tested is None and runner._resume else tested
        metainfo = getattr(getattr(loader, 'dataset', None), 'metainfo', None)
        check_trained_classes(checkpoint.get('meta') or {}, metainfo, field)
