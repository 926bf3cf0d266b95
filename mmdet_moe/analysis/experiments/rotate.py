"""Rotated or not, on Fashion-MNIST: a mixture of ResNet-18 against a single one.

The second experiment of arXiv 2208.02813, on data that are there without a download. The ten
classes are hidden clusters: the label says nothing of them, the dispatch entropy how far the
experts divide them among themselves.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdet_moe.analysis.experiments.experiment import CONFIGS, Experiment, Method, dead_experts
from mmdet_moe.analysis.experiments.fashion_mnist import Budget
from mmdet_moe.analysis.experiments.markdown import (
    NOTHING,
    mean_and_std,
    replace_between_markers,
    table,
)
from mmdet_moe.analysis.models import build_model
from mmdet_moe.analysis.runs import REPOSITORY, RunResult, mean_std
from mmdet_moe.cli import load_config
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.models.flops import count_flops

SECTION = REPOSITORY / 'docs' / 'rotate_section.md'
SINGLE = Method('single', 'moe_rotate_resnet18_fashion_mnist_single')
MIXTURE = Method('MoE, 4 experts, top-1', 'moe_rotate_resnet18_fashion_mnist')
METHODS = (SINGLE, MIXTURE)
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
                'train_dataloader.persistent_workers=False',
                'val_dataloader.num_workers=0',
                'val_dataloader.persistent_workers=False',
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


class RotateExperiment(Experiment):
    """Single network and mixture with one budget.

    Args:
        budget: Entry of :data:`BUDGETS`.
        *args, **kwargs: As for :class:`Experiment`; each budget has its own folder of runs.
    """

    def __init__(self, budget: Budget, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.budget = budget
        self.work_dir /= budget.name

    def run(self, table_only: bool = False) -> None:
        print(f'Budget {self.budget.name}: {self.budget.text}.', flush=True)
        cfg = load_config(str(CONFIGS / f'{MIXTURE.config}.py'), {'data_root': str(self.data)})
        check_config(cfg)
        if not table_only:
            self.train(METHODS)
        self.write()

    def options(self, method: Method, seed: int) -> list[str]:
        return [*super().options(method, seed), *self.budget.options]

    def write(self) -> None:
        results = {method.name: self.results(method) for method in METHODS}
        flops = {m.name: self._active_flops(m) for m in METHODS if results[m.name]}
        text = (
            f'Budget `{self.budget.name}`: {self.budget.text}.\n\n{markdown_table(results, flops)}'
        )
        replace_between_markers(SECTION, 'rotate', text)

    def _active_flops(self, method: Method) -> int:
        folders = (self.run_dir(method, seed) for seed in self.seeds)
        cfg = Config.fromfile(next(path for folder in folders for path in folder.glob('*.py')))
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = build_model(cfg)
        return count_flops(model, torch.randn(1, cfg.model.in_channels, 28, 28))


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
