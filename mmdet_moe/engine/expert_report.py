"""What became experts, at the beginning of a training's log."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from mmdet_moe.engine.dry_run import dry_run, image_size
from mmdet_moe.engine.explain import in_one_line
from mmdet_moe.engine.hooks.layers import unwrapped_model
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import find_expert_layers, report_of
from mmdet_moe.moe.expert_parallel import spread_experts


class ExpertReportHook(Hook):
    """Logs the table of :func:`~mmdet_moe.moe.report_of`, with the FLOPs of one blank image.

    The training is the same as without: nothing that it goes on from is changed. A model that does
    not run on blank images is reported on without FLOPs.
    """

    def before_train(self, runner: Runner) -> None:
        """Log it."""
        model = unwrapped_model(runner)
        if not is_main_process() or not find_expert_layers(model):
            return
        try:
            size = image_size(runner.cfg)
            heading = f'Experts (FLOPs of one image of {size[0]}×{size[1]} pixels)'
            if spread_experts(model) or (
                is_model_wrapper(runner.model)
                and not isinstance(runner.model, DistributedDataParallel)
            ):
                raise ConfigError(f'{type(runner.model).__name__} runs on all ranks together')
            with _generators_kept():
                run = dry_run(model, runner.cfg.default_scope, size, num_images=1)
                report = report_of(model, run)
        except Exception as error:
            # Hours of training are worth more than a number.
            heading, report = f'Experts (no FLOPs: {in_one_line(error)})', report_of(model)
        runner.logger.info(f'{heading}\n{report}')


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave the states of the random number generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the models use it)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
