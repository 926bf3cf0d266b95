"""What became experts, at the beginning of a training's log."""

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from mmdet_moe.engine.dry_run import dry_run, image_size
from mmdet_moe.engine.exact_resume import random_state, set_random_state
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
        state = random_state()
        try:
            size = image_size(runner.cfg)
            heading = f'Experts (FLOPs of one image of {size[0]}×{size[1]} pixels)'
            if spread_experts(model) or (
                is_model_wrapper(runner.model)
                and not isinstance(runner.model, DistributedDataParallel)
            ):
                raise ConfigError(f'{type(runner.model).__name__} runs on all ranks together')
            run = dry_run(model, runner.cfg.default_scope, size, num_images=1)
            report = report_of(model, run)
        except Exception as error:
            # Hours of training are worth more than a number.
            heading, report = f'Experts (no FLOPs: {in_one_line(error)})', report_of(model)
        finally:
            set_random_state(state)  # the models draw from them
        runner.logger.info(f'{heading}\n{report}')
