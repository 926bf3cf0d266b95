"""Rotated or not: a mixture of ResNet-18 against a single one.

The second experiment of arXiv 2208.02813, on its data, CIFAR-10, and on Fashion-MNIST. The ten
classes of either are hidden clusters: the label says nothing of them, the dispatch entropy how far
the experts divide them among themselves.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from research.experiments.budget import (
    CIFAR10,
    FASHION_MNIST,
    NO_WORKERS,
    Budget,
    BudgetedExperiment,
    DataSet,
)
from research.experiments.experiment import Method, dead_experts
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.runs import RunResult, mean_std

NARROW_WIDTH = 4


def _width(channels: int) -> tuple[str, ...]:
    return (
        f'model.expert.backbone.stem_channels={channels}',
        f'model.expert.backbone.base_channels={channels}',
        f'model.expert.head.in_channels={8 * channels}',
    )


def methods_of(data_set: DataSet) -> tuple[Method, ...]:
    """Single network and mixture, and the same with networks that find the task harder.

    The width of the latter does not go by the budget.
    """
    config = f'moe_rotate_resnet18_{data_set.suffix}'
    usual = (Method('single', f'{config}_single'), Method('MoE, 4 experts, top-1', config))
    narrow = _width(NARROW_WIDTH)
    return (*usual, *(replace(m, name=f'{m.name}, narrow', options=narrow) for m in usual))


#: Dispatch entropy of a router that knows nothing of ten equally frequent classes, in nats.
CHANCE = math.log(10)

_SCHEDULE = (
    *_width(16),
    'model.router.conv_channels=16',
    'train_cfg.max_epochs=5',
    'train_cfg.val_interval=5',
    'param_scheduler.milestones=[3,4]',
    *NO_WORKERS,
)
#: Of each data set, by name.
BUDGETS = {
    FASHION_MNIST: {
        'cpu': Budget(
            'cpu',
            'a quarter of the width (16 to 128 channels), the first 5,000 training images, so '
            '10,000 samples, 5 epochs in batches of 64 (785 iterations), the rate divided by 10 '
            'after epochs 3 and 4; all 10,000 test images, so 20,000 samples',
            (
                *_SCHEDULE,
                'train_dataloader.dataset.dataset.indices=5000',
                'train_dataloader.batch_size=64',
                'default_hooks.checkpoint.interval=5',
            ),
        )
    },
    CIFAR10: {
        'cpu': Budget(
            'cpu',
            'a quarter of the width (16 to 128 channels), the first 12,500 training images, so '
            '25,000 samples, 5 epochs in batches of 64 (1,955 iterations), the rate divided by 10 '
            'after epochs 3 and 4; all 10,000 test images, so 20,000 samples',
            (
                *_SCHEDULE,
                'train_dataloader.dataset.dataset.indices=12500',
                'train_dataloader.batch_size=64',
            ),
        )
    },
}
for _data_set, _budgets in BUDGETS.items():
    _budgets['gpu'] = Budget(
        'gpu',
        f'the configs as they are: full width (64 to 512 channels), all {_data_set.num_train:,} '
        f'training images, so {2 * _data_set.num_train:,} samples, 30 epochs in batches of 128; '
        'all 10,000 test images, so 20,000 samples',
    )


class RotateExperiment(BudgetedExperiment):
    """Single network and mixture with one budget, and both with narrow networks.

    Args:
        *args, **kwargs: As for :class:`BudgetedExperiment`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.methods = methods_of(self.data_set)

    @property
    def name(self) -> str:
        name = 'rotate' if self.data_set == FASHION_MNIST else f'rotate-{self.data_set.name}'
        return f'{name}-{self.budget.name}'

    def run(self, table_only: bool = False) -> None:
        self.check(self.methods)
        if not table_only:
            self.prepare(self.methods[1])
            self.train(self.methods)
        self.write()

    def write(self) -> None:
        results = {method.name: self.results(method) for method in self.methods}
        flops = {m.name: self.active_flops(m) for m in self.methods if results[m.name]}
        text = f'{self.budget.headline}\n\n{markdown_table(results, flops)}'
        complete = all(len(runs) == len(self.seeds) for runs in results.values())
        self.publish(complete, {self.name: text}, {})


def markdown_table(results: dict[str, list[RunResult]], flops: dict[str, int]) -> str:
    """Mean ± standard deviation over the seeds, one row per method.

    Args:
        results: The finished runs by method.
        flops: Active FLOPs of one image by method.
    """
    columns = (
        'model', 'seeds', 'test accuracy (%)', f'dispatch entropy (chance: {CHANCE:.3f})',
        'load, largest to smallest', 'dead experts', 'active MFLOPs', 'parameters',
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for name, runs in results.items():
            if not runs:
                continue
            accuracies = [100 * run.metrics['accuracy'] for run in runs]
            cells = [name, str(len(runs)), mean_and_std(accuracies, digits=2)]
            if len(runs[0].layers['moe']['load']) > 1:
                entropies = [run.metrics['dispatch entropy'] for run in runs]
                cells += [mean_and_std(entropies), _loads(runs), dead_experts(runs)]
            else:
                cells += [NOTHING] * 3
            cells += [f'{flops[name] / 1e6:.1f}', f'{runs[0].total_parameters / 1e3:,.0f} k']
            yield cells

    return table(columns, rows())


def _loads(runs: Sequence[RunResult]) -> str:
    """Shares of the images by rank of the expert, as mean over the seeds."""
    by_rank = zip(*(sorted(run.layers['moe']['load'], reverse=True) for run in runs), strict=True)
    return ' / '.join(f'{mean_std(shares)[0]:.2f}' for shares in by_rank)
