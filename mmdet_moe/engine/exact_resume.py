"""A training that was interrupted goes on as if it had not been."""

import os
import random
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.nn.parallel import DistributedDataParallel

from mmdet_moe.compat.distributed import note
from mmdet_moe.engine.hooks.layers import unwrapped_model
from mmdet_moe.files import remove_left_overs
from mmdet_moe.moe.expert_parallel import spread_experts
from mmdet_moe.moe.kmeans_start import KMeansStart

_KEY = 'mmdet_moe_resumption'


class ExactResumeHook(Hook):
    """Puts what MMEngine leaves out of its checkpoints into them, and takes it up again.

    That is the state of the random numbers of every rank, with ``accumulative_counts`` the
    gradients between two steps of the optimizer, the size that ``BatchSyncRandomResize`` has drawn
    for some iterations, and the items that ``init='kmeans'`` has seen so far. A validation leaves
    the random numbers as they were, so that a training goes on alike with and without it. Former
    checkpoints are deleted once the new one is there, and not before, so that there always is one.

    MMEngine saves a checkpoint before it validates the model, and would never make up for the
    validation that an interruption has cost; the hook does, before the training goes on.

    Random numbers that the workers of a data loader draw start anew in a resumed training of
    iterations; with ``num_workers=0``, and in one of epochs without ``persistent_workers``, they
    are those of the uninterrupted one. Gradients between two steps are lost where ranks hold
    different weights (``expert_parallel``, FSDP), or there are several optimizers; the log says so
    at the start.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._validating: dict | None = None
        self._saved: dict | None = None
        self._resumed: dict | None = None
        self._deletions: list[tuple[Callable, str]] = []
        self._seed: int | None = None

    def before_run(self, runner: Runner) -> None:
        """Remember the seed that the data loader was built with."""
        self._seed = runner.seed

    def before_train(self, runner: Runner) -> None:
        """See to the checkpoints of this training, and take up the gradients."""
        if is_main_process():
            remove_left_overs(runner.work_dir)
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hasattr(hook, 'file_backend'):
                hook.file_backend = _DeletesLater(hook.file_backend, self._deletions)
        theirs = runner.save_checkpoint

        @wraps(theirs)
        def save_checkpoint(out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
            # All ranks come here, and the first one saves.
            self._saved = {**self._state(runner), 'by_epoch': kwargs.get('by_epoch', True)}
            theirs(out_dir, filename, *args, **kwargs)
            while self._deletions:
                delete, path = self._deletions.pop()
                if path != os.path.join(out_dir, filename):  # else it is the new one, replaced
                    delete(path)

        runner.save_checkpoint = save_checkpoint
        wrapper = runner.optim_wrapper
        several = isinstance(wrapper, OptimWrapperDict)
        wrappers = wrapper.optim_wrappers.values() if several else [wrapper]
        counts = max(getattr(one, '_accumulative_counts', 1) for one in wrappers)
        if counts > 1 and (several or not _is_whole(runner)):
            note(
                f'accumulative_counts={counts}: gradients between two steps of the optimizer are '
                'not saved where ranks hold different weights, or with several optimizers; save at '
                f'multiples of {counts} iterations, so that a resumed training equals the '
                'uninterrupted one'
            )
        if runner._resume:
            _seed_loader(runner, self._seed)
            self._restore()
            self._validate_if_due(runner)
        if self._resumed is None:
            return
        model = unwrapped_model(runner)
        modules = dict(model.named_modules())  # of which a changed config may lack some
        for name, seen in self._resumed.get('waiting_items', {}).items():
            if name in modules:
                modules[name]._seen = [rows.cpu() for rows in seen]
        for name, size in self._resumed.get('sizes', {}).items():
            if name in modules:
                modules[name]._input_size = size
        parameters = dict(model.named_parameters())
        for name, gradient in self._resumed['gradients'].items():
            parameters[name].grad = gradient.to(parameters[name])
        loop = runner.train_loop
        if not isinstance(loop, EpochBasedTrainLoop) and hasattr(loop, 'dataloader_iterator'):
            # There is no hook between the data that are passed over and the first new ones.
            loop.dataloader_iterator = _CallsFirst(loop.dataloader_iterator, self._restore)

    def before_train_epoch(self, runner: Runner) -> None:
        """Take up the random numbers."""
        if isinstance(loop := runner.train_loop, EpochBasedTrainLoop):
            if self._resumed is not None and not self._at_end_of_epoch(loop):
                note(
                    f'--resume: the checkpoint is of the middle of epoch {loop.epoch + 1}, which '
                    'starts anew'
                )
            self._restore()
            self._resumed = None

    def before_val(self, runner: Runner) -> None:
        """Remember the random numbers."""
        self._validating = random_state()

    def after_val(self, runner: Runner) -> None:
        """Put them back."""
        if self._validating is not None:
            set_random_state(self._validating)
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
        gradients, model, wrapper = {}, unwrapped_model(runner), runner.optim_wrapper
        # An OptimWrapperDict counts no iterations.
        counts = isinstance(wrapper, OptimWrapper) and not isinstance(wrapper, OptimWrapperDict)
        if counts and _is_whole(runner) and not wrapper.should_update():
            # Every rank has the gradients of its own images. As the mean over the ranks is all that
            # counts in the end, each goes on with it; one without a gradient has one of zeros.
            parameters = dict(model.named_parameters())
            own = [name for name, parameter in parameters.items() if parameter.grad is not None]
            for name in sorted(set().union(*all_gather_object(own))):
                parameter = parameters[name]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                all_reduce(parameter.grad, op='mean')
                gradients[name] = parameter.grad.cpu().clone()
        state = self._validating or random_state()
        return {
            'random': all_gather_object(state),
            'validated': self._validating is not None,
            'gradients': gradients,
            'waiting_items': {
                name: module._seen
                for name, module in model.named_modules()
                if isinstance(module, KMeansStart) and module._seen
            },
            'sizes': {
                name: module._input_size
                for name, module in model.named_modules()
                if type(module).__name__ == 'BatchSyncRandomResize'
            },
        }

    def _restore(self) -> None:
        if self._resumed is not None and get_rank() < len(self._resumed['random']):
            set_random_state(self._resumed['random'][get_rank()])

    def _at_end_of_epoch(self, loop: EpochBasedTrainLoop) -> bool:
        saved = (self._resumed or {}).get('by_epoch')  # which earlier versions do not tell
        return loop.iter == loop.epoch * len(loop.dataloader) if saved is None else saved

    def _validate_if_due(self, runner: Runner) -> None:
        loop = runner.train_loop
        is_by_epoch = isinstance(loop, EpochBasedTrainLoop)
        if is_by_epoch and not self._at_end_of_epoch(loop):
            return  # it was validated before these weights
        if self._resumed is not None and self._resumed.get('validated'):
            return  # it was saved once more with the best score, as by save_best
        done, end = (loop.epoch, loop.max_epochs) if is_by_epoch else (loop.iter, loop.max_iters)
        if runner.val_loop is None or done < max(getattr(loop, 'val_begin', done + 1), 1):
            return
        loop._decide_current_val_interval()
        if done % loop.val_interval == 0 or done == end:
            was = 'was finished before' if done == end else 'goes on'
            print_log(f'The training {was}; it is validated first.', logger='current')
            runner.val_loop.run()


def _seed_loader(runner: Runner, built_with: int | None) -> None:
    # Where the config has no seed MMEngine goes on with that of the checkpoint, but has built the
    # loader with another one. A sampler with a seed of its own (of the config, or one for all ranks
    # with diff_rank_seed) keeps it.
    loader = runner.train_loop.dataloader
    for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        if hasattr(sampler, 'seed') and sampler.seed == built_with:
            sampler.seed = runner.seed
    start = loader.worker_init_fn
    if isinstance(start, partial) and start.keywords.get('seed') == built_with:
        loader.worker_init_fn = partial(start, seed=runner.seed)


def _is_whole(runner: Runner) -> bool:
    """Whether every rank has all weights: shards, and spread experts, have no mean."""
    is_wrapped = isinstance(runner.model, DistributedDataParallel)
    is_spread = bool(spread_experts(unwrapped_model(runner)))
    return not is_spread and (is_wrapped or get_world_size() == 1)


def random_state() -> dict[str, Any]:
    """That of PyTorch, its GPU, NumPy and Python, in types that ``torch.load`` reads."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  (what MMEngine seeds)
    return {
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        'numpy': (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        'python': random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
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
