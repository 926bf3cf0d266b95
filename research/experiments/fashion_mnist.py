"""Balancing methods of a ResNet-18 with a mixture of narrow stages, on Fashion-MNIST."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from research.experiments.budget import Budget, BudgetedExperiment
from research.experiments.experiment import Method, changed_by, dead_experts
from research.experiments.markdown import (
    NOTHING,
    mean_and_std,
    mean_per_layer,
    table,
)
from research.plots import plot_class_specialisation
from research.runs import RunResult, mean_std

METHODS = (
    Method('dense', 'resnet18_moe_dense_fashion_mnist'),
    Method('soft: importance', 'resnet18_moe_soft_fashion_mnist'),
    Method('soft: KL', 'resnet18_moe_soft_kl_fashion_mnist'),
    Method('hard: relative', 'resnet18_moe_hard_fashion_mnist'),
    Method('hard: mean', 'resnet18_moe_hard_mean_fashion_mnist'),
    Method('no balancing', 'resnet18_moe_unbalanced_fashion_mnist'),
)
DENSE, MOE_METHODS = METHODS[0], METHODS[1:]


BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(
            'cpu',
            'a quarter of the width (16 to 128 channels), the first 10,000 training images, 8 '
            'epochs in batches of 64 (1,256 iterations), the rate divided by 10 after epochs 5 and '
            '7; experts so wide that two cost what the dense stage does; all 10,000 test images',
            (
                'model.backbone.stem_channels=16',
                'model.backbone.base_channels=16',
                'model.head.in_channels=128',
                'train_dataloader.dataset.indices=10000',
                'train_dataloader.batch_size=64',
                'train_cfg.max_epochs=8',
                'train_cfg.val_interval=8',
                'default_hooks.checkpoint.interval=8',
                'param_scheduler.milestones=[5,7]',
                # Side by side on few cores, worker processes only take time from the training.
                'train_dataloader.num_workers=0',
                'val_dataloader.num_workers=0',
            ),
            ('model.backbone.expert_channels=equal_flops',),
        ),
        Budget(
            'gpu',
            'the configs as they are: full width (64 to 512 channels), 60,000 training images, 30 '
            'epochs in batches of 128; all 10,000 test images',
        ),
    )
}


class FashionMNISTExperiment(BudgetedExperiment):
    """All methods with one budget."""

    def run(self, table_only: bool = False) -> None:
        self.check(METHODS)
        if not table_only:
            self.prepare(DENSE)
            self.train(METHODS)
            self.analyse(MOE_METHODS)
        self.write()

    def options(self, method: Method, seed: int) -> list[str]:
        options = super().options(method, seed)
        return options if method == DENSE else [*options, *self.budget.moe_options]

    def write(self) -> None:
        results = {method.name: self.results(method) for method in METHODS}
        found = {method.name: self.analyses(method) for method in MOE_METHODS}
        flops = {m.name: self.active_flops(m) for m in METHODS if results[m.name]}
        text = (
            f'{self.budget.headline}\n\n{accuracy_table(results, flops)}\n\n'
            f'{specialisation_table(found)}'
        )
        pictures = {}
        if all(found.values()):
            first = {name: runs[0] for name, runs in found.items()}
            name = f'fashion-mnist-{self.budget.name}-specialisation.png'
            pictures[name] = partial(plot_class_specialisation, first)
        complete = all(
            len(runs) == len(self.seeds) for runs in (*results.values(), *found.values())
        )
        self.publish(complete, {f'fashion-mnist-{self.budget.name}': text}, pictures)


def accuracy_table(results: dict[str, list[RunResult]], flops: dict[str, int]) -> str:
    """Mean ± standard deviation over the seeds, one row per method.

    Args:
        results: The finished runs by method.
        flops: Active FLOPs of one image by method.
    """
    columns = (
        'method', 'seeds', 'accuracy', 'active MFLOPs', 'parameters', 'load CV²', 'dead experts',
        'information on input',
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for name, runs in results.items():
            if not runs:
                continue
            cells = [name, str(len(runs)), mean_and_std([run.metrics['accuracy'] for run in runs])]
            cells += [f'{flops[name] / 1e6:.1f}', f'{runs[0].total_parameters / 1e3:,.0f} k']
            if runs[0].layers:
                cells += [
                    _of_reports(runs, 'load_cv2'),
                    dead_experts(runs),
                    _of_reports(runs, 'mi_input'),
                ]
            else:
                cells += [NOTHING] * 3
            yield cells

    return table(columns, rows())


def _of_reports(runs: Sequence[RunResult], key: str) -> str:
    return mean_per_layer([[report[key] for report in run.layers.values()] for run in runs])


def specialisation_table(found: dict[str, list[dict]]) -> str:
    """What the experts of the only MoE layer know of the class; mean over the seeds.

    Args:
        found: Contents of ``experts.json`` by method.
    """
    columns = (
        'method', 'seeds', 'information on class', 'largest p', 'accuracy', 'best expert alone',
        'worst expert alone', 'all alike', 'at random', 'worst to remove',
    )  # fmt: skip
    # Each of the values after an intervention, of its kinds.
    after: tuple[Callable[[dict], float], ...] = (
        lambda changed: max(changed['only']),
        lambda changed: min(changed['only']),
        lambda changed: changed['equal'][0],
        lambda changed: changed['random'][0],
        lambda changed: min(changed['without']),
    )

    def rows() -> Iterator[list[str]]:
        for name, runs in found.items():
            if not runs:
                continue
            (layer,) = runs[0]['layers']
            classes = [run['layers'][layer]['associations']['objects']['class'] for run in runs]
            changed = [changed_by(run, layer, 'accuracy') for run in runs]
            yield [
                name,
                str(len(runs)),
                mean_and_std([entry['mi'] for entry in classes], digits=2),
                f'{max(entry["p_adjusted"] for entry in classes):.3f}',
                mean_and_std([run['metrics']['accuracy'] for run in runs]),
                *(f'{mean_std([value(of_run) for of_run in changed])[0]:.3f}' for value in after),
            ]

    return table(columns, rows())
