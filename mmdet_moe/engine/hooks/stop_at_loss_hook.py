"""Ends a training by its own loss."""

import math

from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor

from mmdet_moe.errors import ConfigError
from mmdet_moe.registry import HOOKS


@HOOKS.register_module()
class StopAtLossHook(Hook):
    """Makes the current iteration the last one, with all that a last one brings.

    The model is validated and saved as at the end of the full training. Under distributed training
    the mean of the ranks decides.

    Args:
        threshold: Stops once the loss is at most this.
        rise: Stops once the loss is more than this above its smallest value so far.
        key: Which of the logged losses: ``'loss'`` is the sum of all, those of balancing included.
        begin: Iterations before the first one that may stop.

    Raises:
        ConfigError: If there is nothing to stop at, for a training by epochs, and for losses that
            the model does not log.
    """

    def __init__(
        self,
        threshold: float | None = None,
        rise: float | None = None,
        key: str = 'loss',
        begin: int = 0,
    ) -> None:
        if threshold is None and rise is None:
            raise ConfigError('StopAtLossHook: give threshold, rise or both; it stops at nothing')
        self.threshold = -math.inf if threshold is None else threshold
        self.rise = math.inf if rise is None else rise
        self.key = key
        self.begin = begin
        self._smallest = math.inf

    def before_train(self, runner: Runner) -> None:
        """Start anew."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ConfigError(
                'StopAtLossHook stops after an iteration: use '
                "train_cfg=dict(type='IterBasedTrainLoop', max_iters=...)"
            )
        self._smallest = math.inf

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Look at the loss."""
        if self.key not in outputs:
            raise ConfigError(
                f'StopAtLossHook: key={self.key!r} is none of the losses {sorted(outputs)}'
            )
        value: Tensor = outputs[self.key].detach().clone()
        all_reduce(value, 'mean')
        loss = value.item()
        self._smallest = min(self._smallest, loss)
        if runner.iter < self.begin:
            return
        if loss <= self.threshold or loss > self._smallest + self.rise:
            runner.logger.info(
                f'{self.key} is {loss:.4f} (smallest {self._smallest:.4f}): the training stops '
                f'after {runner.iter + 1} iterations'
            )
            # The loop, and the hooks that come after this one, then see the last iteration: with
            # MMEngine's `stop_training` there would be neither a checkpoint nor a validation.
            runner.train_loop._max_iters = runner.iter + 1
