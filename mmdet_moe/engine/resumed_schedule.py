"""A resumed training follows its config, also where learning rates or schedules were changed."""

import warnings
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmdet_moe.compat.distributed import note

# What a scheduler counts; all else in its state are settings.
_PROGRESS = ('last_step', '_global_step', '_last_value', 'verbose')


class ResumedScheduleHook(Hook):
    """Takes the optimizer's settings and the schedulers from the config when a training goes on.

    MMEngine takes those of the checkpoint: a training that is resumed with twice the iterations
    keeps the end and the milestones of the shorter one. Where the config says something else, its
    schedulers walk from the start to the iteration of the checkpoint, and the training goes on
    with the rates that it would have had there. Moments and all other state are the checkpoint's.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Replace them in the checkpoint before MMEngine loads them."""
        saved = checkpoint.get('optimizer') or {}
        if not runner._resume or 'param_groups' not in saved:
            return
        groups = [*saved['param_groups'], saved.get('base_param_settings') or {}]
        pairs = list(zip(groups, runner.optim_wrapper.param_groups, strict=False))
        old, schedulers = checkpoint.get('param_schedulers') or [], runner.param_schedulers or []
        if not isinstance(schedulers, list):
            return
        self._take_settings(pairs, schedulers)
        if old or schedulers:
            changed = _settings(old) != _settings([s.state_dict() for s in schedulers]) or any(
                group[key] != new[key]
                for group, new in pairs
                for key in group.keys() & new.keys() & {'initial_lr', 'initial_momentum'}
            )
        else:
            changed = any(group.get('lr') != new['lr'] for group, new in pairs)
        if not changed:
            return
        rate = groups[0]['lr']
        if any(getattr(s, 'need_val_args', False) for s in schedulers) or not (old or schedulers):
            note(
                f'--resume: the learning rate of the checkpoint, {rate:.4g}, goes on, although the '
                'config has another; where it has no schedule, or one that follows a metric, start '
                'with load_from instead to change it'
            )
            return
        meta = checkpoint['meta']
        _walk(schedulers, meta, runner)
        for group, new in pairs:
            group.update({key: value for key, value in new.items() if key != 'params'})
        checkpoint['param_schedulers'] = [s.state_dict() for s in schedulers]
        note(
            '--resume: the learning rate and its schedule in the config are not those of the '
            f"checkpoint; the config's are taken, at iteration {meta['iter']} "
            f'{groups[0]["lr"]:.4g} instead of {rate:.4g}'
        )

    @staticmethod
    def _take_settings(pairs: list[tuple[dict, dict]], schedulers: list) -> None:
        """Those that no schedule changes, such as ``weight_decay``."""
        scheduled = {'params', 'lr', 'initial_lr', 'initial_momentum'}
        if any(getattr(s, 'param_name', None) == 'momentum' for s in schedulers):
            scheduled |= {'momentum', 'betas'}
        taken: dict[str, str] = {}
        for group, new in pairs:
            for key in sorted(group.keys() & new.keys() - scheduled):
                if group[key] != new[key]:
                    taken.setdefault(key, f'{key}={new[key]} instead of {group[key]}')
                    group[key] = new[key]
        if taken:
            note(f"--resume: the config's settings of the optimizer: {', '.join(taken.values())}")


def _settings(states: list[dict]) -> list[dict]:
    return [{key: state[key] for key in state if key not in _PROGRESS} for state in states]


def _walk(schedulers: list, meta: dict[str, Any], runner: Runner) -> None:
    """Step schedulers as a training does up to the iteration and epoch of a checkpoint."""
    epochs = meta['epoch'] if isinstance(runner.train_loop, EpochBasedTrainLoop) else 0
    length = len(runner.train_dataloader) if epochs else meta['iter'] + 1
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the optimizer does not step in between
        for iteration in range(1, max(meta['iter'], epochs * length) + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch and iteration <= meta['iter']:
                    scheduler.step()
            if iteration % length == 0 and iteration // length <= epochs:
                for scheduler in schedulers:
                    if scheduler.by_epoch:
                        scheduler.step()
