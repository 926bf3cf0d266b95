"""Balancing methods of a ResNet-18 with a mixture of narrow stages, on images of classes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from research.experiments.budget import (
    CIFAR100,
    FASHION_MNIST,
    MIXED_PRECISION,
    NO_WORKERS,
    Budget,
    BudgetedExperiment,
    DataSet,
)
from research.experiments.experiment import EXPERTS, Method, changed_by, dead_experts, per_layer
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.plots import plot_class_specialisation
from research.runs import RunResult, mean_std

#: By the name of each method, what its configs are called by.
_METHODS = {
    'dense': 'dense',
    'soft: importance': 'soft',
    'soft: KL': 'soft_kl',
    'soft: Switch': 'switch',
    'hard: relative': 'hard',
    'hard: mean': 'hard_mean',
    'loss-free bias': 'loss_free',
    'no balancing': 'unbalanced',
}
#: What the classes may be told apart by, and how tables call it.
ATTRIBUTES = {'class': 'class', 'superclass': 'super-class'}


@dataclass(frozen=True)
class Task:
    """A data set, and what is compared on it.

    Attributes:
        data_set: Whose images.
        methods: The rows of the tables; the first one is the dense model.
        budgets: That there are, by name.
        pictured: One of :data:`ATTRIBUTES`: that of the picture.
    """

    data_set: DataSet
    methods: tuple[Method, ...]
    budgets: dict[str, Budget]
    pictured: str


def _methods_of(data_set: DataSet, without: Sequence[str] = ()) -> tuple[Method, ...]:
    return tuple(
        Method(name, f'resnet18_moe_{config}_{data_set.suffix}')
        for name, config in _METHODS.items()
        if name not in without
    )


def _budget(name: str, text: str, channels: int, options: Sequence[str]) -> Budget:
    """Networks that are narrower than the configs say, on a CPU."""
    return Budget(
        name,
        text,
        (
            f'model.backbone.stem_channels={channels}',
            f'model.backbone.base_channels={channels}',
            f'model.head.in_channels={8 * channels}',
            *options,
            *NO_WORKERS,
        ),
        ('model.backbone.expert_channels=equal_flops',),
    )


_CIFAR_SCHEDULE = (
    'train_cfg.max_epochs=25',
    'train_cfg.val_interval=25',
    'param_scheduler.milestones=[14,21]',
    MIXED_PRECISION,
)


def _cifar_text(width: str, batch: int, iterations: int) -> str:
    return (
        f'{width}, all 50,000 training images, 25 epochs in batches of {batch} ({iterations:,} '
        'iterations) in mixed precision, the rate divided by 10 after epochs 14 and 21, as the '
        'paper does after 100 and 150 of 180; experts so wide that two cost what the dense stage '
        'does; all 10,000 test images'
    )


TASKS = {
    FASHION_MNIST.name: Task(
        FASHION_MNIST,
        _methods_of(FASHION_MNIST, without=('soft: Switch', 'loss-free bias')),
        {
            'cpu': _budget(
                'cpu',
                'a quarter of the width (16 to 128 channels), the first 10,000 training images, 8 '
                'epochs in batches of 64 (1,256 iterations), the rate divided by 10 after epochs 5 '
                'and 7; experts so wide that two cost what the dense stage does; all 10,000 test '
                'images',
                16,
                (
                    'train_dataloader.dataset.indices=10000',
                    'train_dataloader.batch_size=64',
                    'train_cfg.max_epochs=8',
                    'train_cfg.val_interval=8',
                    'default_hooks.checkpoint.interval=8',
                    'param_scheduler.milestones=[5,7]',
                ),
            ),
            'gpu': Budget(
                'gpu',
                'the configs as they are: full width (64 to 512 channels), 60,000 training images, '
                '30 epochs in batches of 128; all 10,000 test images',
            ),
        },
        pictured='class',
    ),
    CIFAR100.name: Task(
        CIFAR100,
        _methods_of(CIFAR100),
        {
            'cpu': _budget(
                'cpu',
                _cifar_text('a quarter of the width (16 to 128 channels)', 128, 9775),
                16,
                _CIFAR_SCHEDULE,
            ),
            'short': _budget(
                'short',
                _cifar_text('an eighth of the width (8 to 64 channels)', 128, 9775),
                8,
                _CIFAR_SCHEDULE,
            ),
            'half': _budget(
                'half',
                _cifar_text('half of the width (32 to 256 channels)', 256, 4900),
                32,
                (*_CIFAR_SCHEDULE, 'train_dataloader.batch_size=256'),
            ),
            'gpu': Budget(
                'gpu',
                'the configs as they are: full width (64 to 512 channels), 50,000 training images, '
                '180 epochs in batches of 128; all 10,000 test images',
            ),
        },
        pictured='superclass',
    ),
}


class ClassificationExperiment(BudgetedExperiment):
    """All methods of a task with one budget.

    Args:
        task: What is compared on what.
        *args, **kwargs: As for :class:`BudgetedExperiment`, without its data set.
    """

    def __init__(self, task: Task, *args, **kwargs) -> None:
        super().__init__(task.data_set, *args, **kwargs)
        self.task = task

    @property
    def name(self) -> str:
        return f'{self.data_set.name}-{self.budget.name}'

    @property
    def files(self) -> Mapping[str, Sequence[str]]:
        found = 'layers/*/associations/objects/'
        pictured = f'{found}{self.task.pictured}/'
        kept = (
            *('metrics/accuracy', 'interventions/metrics/accuracy'),
            *('interventions/layer', 'interventions/kind'),
            *(f'{found}{of}/{figure}' for of in ATTRIBUTES for figure in ('mi', 'p_adjusted')),
            *(f'{pictured}bins', f'{pictured}expert_given_bin'),
        )
        return {EXPERTS: kept}

    def run(self, table_only: bool = False) -> None:
        dense, *experts = self.task.methods
        self.check(self.task.methods)
        if not table_only:
            self.prepare(dense)
            self.train(self.task.methods, analysed=experts)
            self.analyse(experts)
        self.write()

    def options(self, method: Method, seed: int) -> list[str]:
        options = super().options(method, seed)
        is_dense = method == self.task.methods[0]
        return options if is_dense else [*options, *self.budget.moe_options]

    def write(self) -> None:
        methods = self.task.methods
        results = {method.name: self.results(method) for method in methods}
        found = {method.name: self.analyses(method) for method in methods[1:]}
        flops = {m.name: self.active_flops(m) for m in methods if results[m.name]}
        text = (
            f'{self.budget.headline}\n\n{accuracy_table(results, flops)}\n\n'
            f'{specialisation_table(found)}'
        )
        pictures = {}
        if all(found.values()):
            first = {method: runs[0] for method, runs in found.items()}
            pictures[f'{self.name}-specialisation.png'] = partial(
                plot_class_specialisation, first, attribute=self.task.pictured
            )
        complete = all(
            len(runs) == len(self.seeds) for runs in (*results.values(), *found.values())
        )
        self.publish(complete, {self.name: text}, pictures)


def accuracy_table(results: dict[str, list[RunResult]], flops: dict[str, int]) -> str:
    """Mean ± standard deviation over the seeds, one row per method.

    Args:
        results: The finished runs by method; times are compared with those of the first one.
        flops: Active FLOPs of one image by method.
    """
    columns = (
        'method', 'seeds', 'accuracy', 'active MFLOPs', 's/iteration (× dense)', 'parameters',
        'load CV²', 'dead experts', 'information on input',
    )  # fmt: skip
    of_dense = [run.seconds_per_iteration for run in next(iter(results.values()))]

    def rows() -> Iterator[list[str]]:
        for name, runs in results.items():
            if not runs:
                continue
            cells = [name, str(len(runs)), mean_and_std([run.metrics['accuracy'] for run in runs])]
            seconds = [run.seconds_per_iteration for run in runs]
            ratio = NOTHING
            if len(seconds) == len(of_dense):  # of each seed, whose runs shared a machine
                ratio = f'{median(a / b for a, b in zip(seconds, of_dense, strict=True)):.2f}'
            cells += [f'{flops[name] / 1e6:.1f}', f'{median(seconds):.3f} ({ratio})']
            cells.append(f'{runs[0].total_parameters / 1e3:,.0f} k')
            if runs[0].layers:
                cells += [
                    per_layer(runs, 'load_cv2'),
                    dead_experts(runs),
                    per_layer(runs, 'mi_input'),
                ]
            else:
                cells += [NOTHING] * 3
            yield cells

    return table(columns, rows())


def specialisation_table(found: dict[str, list[dict]]) -> str:
    """What the experts of the only MoE layer know of the class; mean over the seeds.

    Args:
        found: Contents of ``experts.json`` by method.
    """
    attributes = [
        attribute for attribute in ATTRIBUTES
        if any(attribute in _associations(run) for runs in found.values() for run in runs)
    ]  # fmt: skip
    columns = ['method', 'seeds']
    for attribute in attributes:
        columns += [f'information on {ATTRIBUTES[attribute]}', 'largest p']
    columns += [
        'accuracy', 'best expert alone', 'worst expert alone', 'all alike', 'at random',
        'worst to remove',
    ]  # fmt: skip
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
            changed = [changed_by(run, layer, 'accuracy') for run in runs]
            cells = [name, str(len(runs))]
            for attribute in attributes:
                told = [_associations(run)[attribute] for run in runs]
                cells.append(mean_and_std([entry['mi'] for entry in told], digits=2))
                cells.append(f'{max(entry["p_adjusted"] for entry in told):.3f}')
            cells.append(mean_and_std([run['metrics']['accuracy'] for run in runs]))
            cells += [f'{mean_std([of(run) for run in changed])[0]:.3f}' for of in after]
            yield cells

    return table(columns, rows())


def _associations(experts: dict) -> dict:
    (layer,) = experts['layers'].values()
    return layer['associations']['objects']
