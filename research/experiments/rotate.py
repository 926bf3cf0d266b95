"""Rotated or not, on Fashion-MNIST: a mixture of ResNet-18 against a single one.

The second experiment of arXiv 2208.02813, on data that are there without a download. The ten
classes are hidden clusters: the label says nothing of them, the dispatch entropy how far the
experts divide them among themselves.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from research.experiments.budget import Budget, BudgetedExperiment
from research.experiments.experiment import Method, dead_experts
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.runs import RunResult, mean_std

SINGLE = Method('single', 'moe_rotate_resnet18_fashion_mnist_single')
MIXTURE = Method('MoE, 4 experts, top-1', 'moe_rotate_resnet18_fashion_mnist')
NARROW_WIDTH = 4
_NARROW = (
    f'model.expert.backbone.stem_channels={NARROW_WIDTH}',
    f'model.expert.backbone.base_channels={NARROW_WIDTH}',
    f'model.expert.head.in_channels={8 * NARROW_WIDTH}',
)
#: The same with networks that find the task harder; their width does not go by the budget.
NARROW_METHODS = (
    replace(SINGLE, name=f'{SINGLE.name}, narrow', options=_NARROW),
    replace(MIXTURE, name=f'{MIXTURE.name}, narrow', options=_NARROW),
)
METHODS = (SINGLE, MIXTURE, *NARROW_METHODS)
#: Dispatch entropy of a router that knows nothing of ten equally frequent classes, in nats.
CHANCE = math.log(10)

BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(
            'cpu',
            'a quarter of the width (16 to 128 channels), the first 5,000 training images, so '
            '10,000 samples, 5 epochs in batches of 64 (785 iterations), the rate divided by 10 '
            'after epochs 3 and 4; all 10,000 test images, so 20,000 samples',
            (
                'model.expert.backbone.stem_channels=16',
                'model.expert.backbone.base_channels=16',
                'model.expert.head.in_channels=128',
                'model.router.conv_channels=16',
                'train_dataloader.dataset.dataset.indices=5000',
                'train_dataloader.batch_size=64',
                'train_cfg.max_epochs=5',
                'train_cfg.val_interval=5',
                'default_hooks.checkpoint.interval=5',
                'param_scheduler.milestones=[3,4]',
                # Side by side on few cores, worker processes only take time from the training.
                'train_dataloader.num_workers=0',
                'val_dataloader.num_workers=0',
            ),
        ),
        Budget(
            'gpu',
            'the configs as they are: full width (64 to 512 channels), all 60,000 training images, '
            'so 120,000 samples, 30 epochs in batches of 128; all 10,000 test images, so 20,000 '
            'samples',
        ),
    )
}


class RotateExperiment(BudgetedExperiment):
    """Single network and mixture with one budget, and both with narrow networks."""

    def run(self, table_only: bool = False) -> None:
        self.check(METHODS)
        if not table_only:
            self.prepare(MIXTURE)
            self.train(METHODS)
        self.write()

    def write(self) -> None:
        results = {method.name: self.results(method) for method in METHODS}
        flops = {m.name: self.active_flops(m) for m in METHODS if results[m.name]}
        text = f'{self.budget.headline}\n\n{markdown_table(results, flops)}'
        complete = all(len(runs) == len(self.seeds) for runs in results.values())
        self.publish(complete, {f'rotate-{self.budget.name}': text}, {})


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
