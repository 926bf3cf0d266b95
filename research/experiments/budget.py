"""Experiments on Fashion-MNIST that fit the machine: small on a CPU, in full on a GPU."""

from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DefaultScope

from mmdet_moe.analysis.models import build_model
from mmdet_moe.cli import load_config
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.flops import count_flops
from research.experiments.experiment import CONFIGS, Experiment, Method


@dataclass(frozen=True)
class Budget:
    """How large the runs are.

    Attributes:
        name: On the command line.
        text: What it means, for the reader of the table.
        options: Of all runs, on top of the configs.
        moe_options: Of the MoE models.
    """

    name: str
    text: str
    options: tuple[str, ...] = ()
    moe_options: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """Stands above a table."""
        return f'Budget `{self.name}`: {self.text}.'


class BudgetedExperiment(Experiment):
    """Base class of experiments with a budget.

    Args:
        budget: What all of its runs are trained with.
        *args, **kwargs: As for :class:`Experiment`; each budget has its own folder of runs.
    """

    def __init__(self, budget: Budget, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.budget = budget
        self.work_dir /= budget.name
        self._flops: dict[Method, int] = {}

    def prepare(self, method: Method) -> None:
        """State the budget, and see whether the device and the data are there.

        Raises:
            ConfigError: If they are not.
        """
        print(self.budget.headline, flush=True)
        if self.budget.name == 'gpu' and get_device() == 'cpu':
            raise ConfigError('--budget gpu: there is no GPU here; use --budget cpu')
        if not self.data.is_dir():
            raise ConfigError(
                f"--data: there is no folder '{self.data}'; `tools/prepare_data.py fashion-mnist "
                '--out DIR` makes it, with --source DIR from files that you have already'
            )
        config = str(CONFIGS / f'{method.config}.py')
        check_config(load_config(config, {'data_root': str(self.data)}))

    def options(self, method: Method, seed: int) -> list[str]:
        return [*super().options(method, seed), *self.budget.options]

    def active_flops(self, method: Method) -> int:
        """FLOPs of one image, with the experts that it is sent to, of a method that has runs."""
        if method not in self._flops:
            folders = (self.run_dir(method, seed) for seed in self.seeds)
            cfg = Config.fromfile(next(path for folder in folders for path in folder.glob('*.py')))
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                model = build_model(cfg)
            channels = len(cfg.data_preprocessor.mean)
            self._flops[method] = count_flops(model, torch.randn(1, channels, 28, 28))
        return self._flops[method]
