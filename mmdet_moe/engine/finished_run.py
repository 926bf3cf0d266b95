"""Validate a run that was interrupted between its last checkpoint and its last validation."""

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner


class FinishedRunHook(Hook):
    """MMEngine saves the last checkpoint before it validates; resumed from there, nothing is left
    to train, and it would end without a word. The hook validates in that case.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._nothing_to_train = False

    def before_train(self, runner: Runner) -> None:
        """See whether anything is left to train."""
        loop = runner.train_loop
        self._nothing_to_train = loop.iter >= loop.max_iters

    def after_train(self, runner: Runner) -> None:
        """Validate if nothing was trained."""
        if self._nothing_to_train and runner.val_loop is not None:
            print_log('The training was finished before; it is validated now.', logger='current')
            runner.val_loop.run()
