"""Ends a training by its own loss."""

import math

from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor

from mmdet_moe.checks import check_integer, check_number
from mmdet_moe.errors import ConfigError
from mmdet_moe.registry import HOOKS


@HOOKS.register_module()
class StopAtLossHook(Hook):
    """Makes the current iteration the last one, with all that a last one brings.

    The model is validated and saved as at the end of the full training. Under distributed training
    the mean of the ranks decides. Checkpoints keep the latest and the smallest value, so that a
    resumed training goes on with them, or ends at once if it had stopped.

    Args:
        threshold: Stops once the loss is at most this.
        rise: Stops once the loss is more than this above its smallest value so far; at least 0.
        key: Which of the logged losses: ``'loss'`` is the sum of all, those of balancing included.
        begin: Iterations before the first one that may stop.

    Raises:
        ConfigError: If there is nothing to stop at, for options out of range, for a training by
            epochs, and for losses that the model does not log.
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
        owner = type(self).__name__
        if threshold is not None:
            check_number(owner, 'threshold', threshold)
        if rise is not None:
            check_number(owner, 'rise', rise, least=0)
        check_integer(owner, 'begin', begin, least=0)
        self.threshold = -math.inf if threshold is None else threshold
        self.rise = math.inf if rise is None else rise
        self.key = key
        self.begin = begin
        self._latest = self._smallest = math.inf

    def before_train(self, runner: Runner) -> None:
        """Start anew, or go on with the values of the checkpoint, which may have been the last."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ConfigError(
                'StopAtLossHook stops after an iteration: use '
                "train_cfg=dict(type='IterBasedTrainLoop', max_iters=...)"
            )
        kept = runner.message_hub.get_info(self._info, {}) if runner.iter else {}
        self._latest = kept.get('latest', math.inf)
        self._smallest = kept.get('smallest', math.inf)
        # Decided anew, as with other options the training may go on; unless the values are older
        # than the checkpoint, which then was trained further without this hook.
        if kept.get('iterations') == runner.iter and self._stops_after(runner.iter):
            runner.logger.info(f'{self._found}: the training stopped there')
            runner.train_loop._max_iters = runner.iter

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
        self._latest = value.item()
        self._smallest = min(self._smallest, self._latest)
        done = runner.iter + 1
        # MMEngine saves it with every checkpoint, that of this iteration included, as the
        # CheckpointHook comes later, and loads it when the training is resumed.
        kept = {'iterations': done, 'latest': self._latest, 'smallest': self._smallest}
        runner.message_hub.update_info(self._info, kept)
        if self._stops_after(done):
            runner.logger.info(f'{self._found}: the training stops after {done} iterations')
            # The loop, and the hooks that come after this one, then see the last iteration: with
            # MMEngine's `stop_training` there would be neither a checkpoint nor a validation.
            runner.train_loop._max_iters = done

    def _stops_after(self, iterations: int) -> bool:
        """Whether the latest loss, that of the last of so many iterations, ends the training."""
        reached = self._latest <= self.threshold or self._latest > self._smallest + self.rise
        return iterations > self.begin and reached

    @property
    def _info(self) -> str:
        # With the key: hooks for different losses keep different values.
        return f'stop_at_loss/{self.key}'

    @property
    def _found(self) -> str:
        return f'{self.key} is {self._latest:.4f} (smallest {self._smallest:.4f})'
