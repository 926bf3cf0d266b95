"""Experiments with images of classes that fit the machine: small on a CPU, in full on a GPU."""

from dataclasses import dataclass

import torch
from mmengine.device import get_device

from mmdet_moe.analysis.models import build_model
from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.flops import count_flops
from research.experiments.experiment import CONFIGS, Experiment, Method
from research.runs import in_scope

#: Options of trainings side by side on few cores, where worker processes only take their time.
NO_WORKERS = ('train_dataloader.num_workers=0', 'val_dataloader.num_workers=0')
#: As ``--amp`` of ``tools/train.py``.
MIXED_PRECISION = 'optim_wrapper.type=AmpOptimWrapper'


@dataclass(frozen=True)
class DataSet:
    """Images of classes.

    Attributes:
        name: As ``tools/prepare_data.py`` calls them.
        side: Of the square images, in pixels.
        num_train: Images of the training split.
    """

    name: str
    side: int
    num_train: int

    @property
    def suffix(self) -> str:
        """At the end of the names of configs."""
        return self.name.replace('-', '_')


FASHION_MNIST = DataSet('fashion-mnist', 28, 60_000)
CIFAR10 = DataSet('cifar10', 32, 50_000)
CIFAR100 = DataSet('cifar100', 32, 50_000)


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
        data_set: Whose images.
        budget: What all of its runs are trained with.
        *args, **kwargs: As for :class:`Experiment`; each budget has its own folder of runs.
    """

    def __init__(self, data_set: DataSet, budget: Budget, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.data_set = data_set
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
                f"--data: there is no folder '{self.data}'; `tools/prepare_data.py "
                f'{self.data_set.name} --out DIR` makes it, with --source DIR from files that you '
                'have already'
            )
        config = str(CONFIGS / f'{method.config}.py')
        check_config(load_config(config, {'data_root': str(self.data)}))

    def options(self, method: Method, seed: int) -> list[str]:
        return [*super().options(method, seed), *self.budget.options]

    def active_flops(self, method: Method) -> int:
        """FLOPs of one image, with the experts that it is sent to, of a method."""
        if method not in self._flops:
            options = self._all_options(method, self.seeds[0])
            cfg = load_config(str(CONFIGS / f'{method.config}.py'), parse_options(options))
            with in_scope(cfg.default_scope):
                model = build_model(cfg)
            channels, side = len(cfg.data_preprocessor.mean), self.data_set.side
            self._flops[method] = count_flops(model, torch.randn(1, channels, side, side))
        return self._flops[method]
