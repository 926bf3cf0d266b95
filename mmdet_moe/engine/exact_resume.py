"""A training that was interrupted goes on as if it had not been."""

import random
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmdet_moe.compat.distributed import note
from mmdet_moe.engine.hooks.layers import unwrapped_model
from mmdet_moe.files import remove_left_overs

_KEY = 'mmdet_moe_resumption'


class ExactResumeHook(Hook):
    """Puts what MMEngine leaves out of its checkpoints into them, and takes it up again.

    That is the state of the random numbers of every rank, and with ``accumulative_counts`` the
    gradients between two steps of the optimizer. A validation leaves the random numbers as they
    were, so that a training goes on alike with and without it. Former checkpoints are deleted
    once the new one is there, and not before, so that there always is one.

    MMEngine saves a checkpoint before it validates the model, and would never make up for the
    validation that an interruption has cost; the hook does, before the training goes on.

    Random numbers that the workers of a data loader draw start anew in a resumed training of
    iterations; with ``num_workers=0``, and in one of epochs without ``persistent_workers``, they
    are those of the uninterrupted one.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._validating: dict | None = None
        self._saved: dict | None = None
        self._resumed: dict | None = None
        self._deletions: list[tuple[Callable, str]] = []

    def before_train(self, runner: Runner) -> None:
        """See to the checkpoints of this training, and take up the gradients."""
        if is_main_process():
            remove_left_overs(runner.work_dir)
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hasattr(hook, 'file_backend'):
                hook.file_backend = _DeletesLater(hook.file_backend, self._deletions)
        theirs = runner.save_checkpoint

        @wraps(theirs)
        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            self._saved = self._state(runner)  # all ranks come here, and the first one saves
            theirs(*args, **kwargs)
            while self._deletions:
                delete, path = self._deletions.pop()
                delete(path)

        runner.save_checkpoint = save_checkpoint
        if runner._resume:
            self._restore()
            _validate_if_due(runner)
        if self._resumed is None:
            return
        parameters = dict(unwrapped_model(runner).named_parameters())
        for name, gradient in self._resumed['gradients'].items():
            parameters[name].grad = gradient.to(parameters[name])
        loop = runner.train_loop
        if not isinstance(loop, EpochBasedTrainLoop) and hasattr(loop, 'dataloader_iterator'):
            # There is no hook between the data that are passed over and the first new ones.
            loop.dataloader_iterator = _CallsFirst(loop.dataloader_iterator, self._restore)

    def before_train_epoch(self, runner: Runner) -> None:
        """Take up the random numbers."""
        if isinstance(loop := runner.train_loop, EpochBasedTrainLoop):
            if self._resumed is not None and loop.iter % len(loop.dataloader):
                note(
                    f'--resume: the checkpoint is of the middle of epoch {loop.epoch + 1}, which '
                    'starts anew'
                )
            self._restore()
            self._resumed = None

    def before_val(self, runner: Runner) -> None:
        """Remember the random numbers."""
        self._validating = _random_state()

    def after_val(self, runner: Runner) -> None:
        """Put them back."""
        if self._validating is not None:
            _set_random_state(self._validating)
        self._validating = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the state, where a training can go on from the checkpoint."""
        if 'optimizer' in checkpoint and self._saved is not None:
            checkpoint[_KEY] = self._saved

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the state for the start of the training."""
        if runner._resume:
            self._resumed = checkpoint.pop(_KEY, None)

    def _state(self, runner: Runner) -> dict[str, Any]:
        gradients = {}
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapper) and not wrapper.should_update():
            # Every rank has the gradients of its own images. As the sum over the ranks is all that
            # counts in the end, each goes on with the mean.
            for name, parameter in unwrapped_model(runner).named_parameters():
                if parameter.grad is not None:
                    all_reduce(parameter.grad, op='mean')
                    gradients[name] = parameter.grad.cpu().clone()
        random_state = self._validating or _random_state()
        return {'random': all_gather_object(random_state), 'gradients': gradients}

    def _restore(self) -> None:
        if self._resumed is not None and get_rank() < len(self._resumed['random']):
            _set_random_state(self._resumed['random'][get_rank()])


def _validate_if_due(runner: Runner) -> None:
    loop = runner.train_loop
    is_by_epoch = isinstance(loop, EpochBasedTrainLoop)
    done, end = (loop.epoch, loop.max_epochs) if is_by_epoch else (loop.iter, loop.max_iters)
    if runner.val_loop is None or done < max(loop.val_begin, 1):
        return
    loop._decide_current_val_interval()
    if done % loop.val_interval == 0 or done == end:
        was = 'was finished before' if done == end else 'goes on'
        print_log(f'The training {was}; it is validated first.', logger='current')
        runner.val_loop.run()


def _random_state() -> dict[str, Any]:
    """That of PyTorch, its GPU, NumPy and Python, in types that ``torch.load`` reads."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  (what MMEngine seeds)
    return {
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        'numpy': (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        'python': random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())
    kind, keys, *rest = state['numpy']
    keys = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state((kind, keys, *rest))  # noqa: NPY002
    random.setstate(state['python'])


class _DeletesLater:
    """A file backend of MMEngine that keeps what it is told to delete in a list."""

    def __init__(self, backend: Any, deletions: list[tuple[Callable, str]]) -> None:
        self._backend, self._deletions = backend, deletions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._deletions.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self._deletions.append((self._backend.rmtree, path))


class _CallsFirst:
    """An iterator that calls a function before its first item, but not before items passed over."""

    def __init__(self, iterator: Iterator, function: Callable[[], None]) -> None:
        self._iterator, self._function = iterator, function

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self._function is not None:
            # A data loader draws a seed for its workers when it is asked for its iterator, which
            # the uninterrupted training has done before.
            getattr(self._iterator, '_ensure_iterator', lambda: None)()
            self._function()
            self._function = None
        return next(self._iterator)
