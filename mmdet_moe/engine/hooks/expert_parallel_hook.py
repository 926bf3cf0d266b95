"""Training with experts that are spread over ranks under MMEngine's Runner."""

import re
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import EMAHook, Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from mmdet_moe.engine.hooks.layers import unwrapped_model
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.expert_parallel import (
    SpreadExperts,
    all_experts,
    clip_grad_norm_,
    expert_parameters,
    keep_from_ddp,
    spread_experts,
)
from mmdet_moe.registry import HOOKS, MODEL_WRAPPERS

_PARTS = 'expert_parallel'


@MODEL_WRAPPERS.register_module()
class ExpertParallelDDP(MMDistributedDataParallel):
    """MMEngine's, for models with spread experts anywhere, also in a part that a preset made.

    Args:
        module: The model.
        *args, **kwargs: As of ``MMDistributedDataParallel``.
    """

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        keep_from_ddp(module)
        super().__init__(module, *args, **kwargs)


@HOOKS.register_module()
class ExpertParallelHook(Hook):
    """Saves all experts of layers with ``expert_parallel``, and clips by the norm of all gradients.

    A checkpoint holds the weights of one process, and loads wherever those do. The optimizer's
    state of the experts is kept rank by rank, and goes on with the same ``expert_parallel`` alone.
    Without such a layer the hook does nothing; ``tools/train.py`` and ``tools/test.py`` always
    register it.

    Raises:
        ConfigError: At the start, for what would be wrong with spread experts: an EMA of the
            weights, scaled losses (float16), several optimizers, another wrapper than DDP,
            ``custom_keys`` of single experts; at a resumption, for the optimizer's state of another
            ``expert_parallel``.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Take part in what the Runner does on one rank alone."""
        spread = spread_experts(unwrapped_model(runner))
        for experts in spread:
            experts.gives_part = True
        if not spread or not isinstance(runner.optim_wrapper, OptimWrapper):
            return  # nothing to do, or a test
        self._check(runner, spread)
        if getattr(runner.optim_wrapper, 'clip_func', None) is torch.nn.utils.clip_grad_norm_:
            runner.optim_wrapper.clip_func = clip_grad_norm_
        runner.save_checkpoint = partial(self._save, runner, runner.save_checkpoint)

    def _check(self, runner: Runner, spread: list[SpreadExperts]) -> None:
        wrapper, scaler = runner.optim_wrapper, getattr(runner.optim_wrapper, 'loss_scaler', None)
        wrong = None
        if len({experts.parts for experts in spread}) > 1:
            wrong = 'has to be the same number in all layers'
        elif not isinstance(runner.model, DistributedDataParallel):
            wrong = (
                f'does not go with the model wrapper {type(runner.model).__name__}; use '
                'MMDistributedDataParallel'
            )
        elif any(isinstance(hook, EMAHook) for hook in runner.hooks):
            wrong = 'does not go with EMAHook, whose averages nobody gathers; remove it'
        elif isinstance(wrapper, OptimWrapperDict):
            wrong = 'does not go with several optimizers; use one OptimWrapper'
        elif scaler is not None and scaler.is_enabled():
            wrong = (
                'does not go with scaled losses, of which each rank would skip steps of its own; '
                "set optim_wrapper.dtype='bfloat16' and loss_scale=None"
            )
        elif key := _of_single_experts(runner):
            wrong = (
                'gives experts other names on each rank, of which paramwise_cfg.custom_keys '
                f'{key!r} finds none; name the whole layer'
            )
        if wrong:
            raise ConfigError(f'expert_parallel={spread[0].parts} {wrong}')

    def _save(self, runner: Runner, save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        model = unwrapped_model(runner)
        state = tree_map_only(torch.Tensor, torch.Tensor.cpu, runner.optim_wrapper.state_dict())
        own = {id(parameter) for parameter in expert_parameters(model)}
        places = chain.from_iterable(g['params'] for g in runner.optim_wrapper.param_groups)
        of_experts = {i for i, parameter in enumerate(places) if id(parameter) in own}
        mine = {i: state['state'].pop(i) for i in of_experts & state['state'].keys()}
        group = spread_experts(model)[0].group
        parts = [None] * dist.get_world_size(group)
        # To all of them, because which rank saves is the Runner's business.
        dist.all_gather_object(parts, mine, group=group)
        self._optimizer = {**state, _PARTS: len(parts), 'parts': parts}
        with all_experts(model):
            save(*args, **kwargs)
        del self._optimizer

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """The optimizer's state of every rank of the group instead of one rank's."""
        if 'optimizer' in checkpoint and hasattr(self, '_optimizer'):
            checkpoint['optimizer'] = self._optimizer

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """This rank's own part of the optimizer's state."""
        saved = checkpoint.get('optimizer')
        if not runner._resume or saved is None:
            return
        spread = spread_experts(unwrapped_model(runner))
        found, parts = saved.get(_PARTS, 1), spread[0].parts if spread else 1
        if found != parts:
            raise ConfigError(
                f'--resume: the optimizer was saved with the experts of a layer on {found} ranks, '
                f'but here they are on {parts}; go on as before (expert_parallel={found}), or take '
                'the weights alone with load_from'
            )
        if found > 1:
            parts = saved.pop('parts')
            saved['state'] |= parts[dist.get_rank(spread[0].group)]
            del saved[_PARTS]


def _of_single_experts(runner: Runner) -> str | None:
    wrapper = (runner.cfg.get('optim_wrapper') or {}) if runner.cfg else {}
    keys = (wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
    return next((key for key in keys if re.search(r'\bexperts\.\d', key)), None)
