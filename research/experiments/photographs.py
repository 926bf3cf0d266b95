"""A RetinaNet on photographs: are experts worth their cost, and do they know an object's size?

The backbone, EfficientNet-Lite0 with ImageNet's weights, is frozen, and its maps are read from a
cache (:func:`mmdet_moe.models.frozen.frozen`), so that neck and head alone cost time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from mmdet_moe.analysis.files import write_file
from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError
from research.experiments.budget import MIXED_PRECISION, NO_WORKERS
from research.experiments.domains_detector import SIDE, WIDTH, neck_and_head_flops
from research.experiments.experiment import CONFIGS, Method
from research.experiments.scenes import Task
from research.experiments.sizes import MeasuredExperiment, markdown_table, plot


@dataclass(frozen=True)
class Photographs(Task):
    """A task on photographs.

    Attributes:
        epochs: Of every training, of 16 images an iteration.
        classes: Instead of those of VOC.
        sizes: Whether the table of :mod:`research.experiments.sizes` is written, too.
    """

    epochs: int = 12
    classes: tuple[str, ...] = ()
    sizes: bool = False


_DENSE = 'retinanet_lite0_dense_voc2007'
_SOFT = 'retinanet_lite0_moe_soft_voc2007'
_WIDE = ('model.bbox_head.feat_channels=52',)
_VOC = (
    Method('dense', _DENSE),
    # As dear as two of the experts: 528 MFLOPs of 540, at 320×320 pixels.
    Method('dense, 52 channels', _DENSE, _WIDE),
    Method('soft', _SOFT),
    Method('hard', 'retinanet_lite0_moe_hard_voc2007'),
    Method('no balancing', 'retinanet_lite0_moe_unbalanced_voc2007'),
    # As dear as the dense one: one whole expert, or two narrow ones.
    Method(
        'soft, one expert',
        _SOFT,
        # Otherwise the one weight would scale what the layer gives.
        ('model.bbox_head.top_k=1', 'model.bbox_head.router.softmax=straight_through'),
    ),
    Method('soft, narrow', 'retinanet_lite0_moe_equal_voc2007'),
)
VOC = Photographs(
    name='voc',
    methods=_VOC,
    pictured=_VOC[2:],
    # Experts from random weights each see a part of few images: of one seed, they were 0.4 to 4.7
    # AP behind the dense model after 24 epochs.
    pretraining=Method('pretraining', _DENSE),
    starts={_VOC[1].name: Method('pretraining, 52 channels', _DENSE, _WIDE)},
    num_dense=2,
)

_PIXEL = ('model.bbox_head.granularity=pixel', 'model.bbox_head.whole_maps=True')
_NORMALISED = ('model.bbox_head.router.normalise_levels=5',)
_WITHIN = ('custom_hooks.1.loss.within=level',)
_CLUSTERS = ('model.bbox_head.router.init=kmeans', 'model.bbox_head.router.noise=False')
_PERSONS = (
    Method('dense', _DENSE),
    # The names are those of the experiment with digits.
    Method('image', _SOFT),
    Method('pixel', _SOFT, _PIXEL),
    Method('pixel: both', _SOFT, (*_PIXEL, *_NORMALISED, *_WITHIN)),
    Method(
        'pixel: level normalised, k-means start', _SOFT, (*_PIXEL, *_NORMALISED, *_CLUSTERS)
    ),
)  # fmt: skip
PERSONS = Photographs(
    name='persons',
    methods=_PERSONS,
    pictured=_PERSONS[1:],
    pretraining=Method('pretraining', _DENSE),
    epochs=6,
    classes=('person',),
    sizes=True,
)
TASKS = {task.name: task for task in (VOC, PERSONS)}


class PhotographsExperiment(MeasuredExperiment):
    """All methods of a task on photographs.

    Attributes:
        measured: Of what the FLOPs are told.

    Args:
        task: What is trained.
        *args: As for :class:`~research.experiments.experiment.Experiment`; each number of epochs
            has its own folder of runs.
        epochs: Of every training; by default those of the task, and only they are published.

    Raises:
        ConfigError: For fewer epochs than 1.
    """

    measured = 'neck and head'

    def __init__(self, task: Photographs, *args, epochs: int | None = None) -> None:
        super().__init__(task, *args)
        self.is_default = epochs in (None, task.epochs)
        self.epochs = task.epochs if epochs is None else epochs
        if self.epochs < 1:
            raise ConfigError(f'--epochs {epochs}: give at least 1')
        self.features = self.work_dir / 'features'
        self.work_dir /= f'{self.epochs}_epochs'
        self._bases: dict[Path, Method] = {}
        self.task = replace(
            task,
            methods=self._with_files(task.methods),
            pictured=self._with_files(task.pictured),
            pretraining=task.pretraining and self._with_files([task.pretraining])[0],
            starts={name: self._with_files([start])[0] for name, start in task.starts.items()},
        )
        self.methods, self.classes, self.sizes = self.task.methods, task.classes, task.sizes
        after = f'{self.epochs} epochs after as many of a dense model'
        self.headline = f'{after}, 16 images an iteration, mixed precision, AdamW, frozen backbone'
        self._flops: dict[str, float] = {}

    def _with_files(self, methods: Sequence[Method]) -> tuple[Method, ...]:
        """The same methods, whose configs are files that freeze the backbone."""
        made = []
        for method in methods:
            file = self.work_dir / 'configs' / method.key
            self._bases[file.with_suffix('.py')] = method
            made.append(replace(method, config=str(file)))
        return tuple(made)

    def prepare(self, check: bool = True) -> None:
        """State the budget, write the configs, and see whether the data are there.

        Args:
            check: Without it the last is left out.

        Raises:
            ConfigError: If they are not.
        """
        print(f'{self.headline}.', flush=True)
        if check and not (self.data / 'train.json').is_file():
            raise ConfigError(
                f"--data: there is no '{self.data / 'train.json'}'; docs/data.md says how "
                'tools/prepare_data.py makes it'
            )
        for path, method in self._bases.items():
            text = config_text(method.config, self.classes, str(self.features))
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                write_file(path, text.encode())
            options = parse_options([f'data_root={self.data}', *method.options])
            if check:
                check_config(load_config(str(path), options))
            # Before there are trainings, which it would disturb in one process.
            self._flops[method.name] = neck_and_head_flops(load_config(str(path), options))

    def run(self, table_only: bool = False) -> None:
        self.prepare(check=not table_only or not self.records()['data'])
        self.check([*self.pretraining, *self.methods])
        if not table_only:
            if self.sizes:
                self.train_and_measure()
            else:
                self.train(self.methods, self.task.sparse)
            self.analyse(self.task.sparse)
        self.write()

    def options(self, method: Method, seed: int) -> list[str]:
        return [
            *super().options(method, seed),
            *(MIXED_PRECISION, *NO_WORKERS),
            # MMDetection's base keeps workers, of which there are none.
            *(f'{of}_dataloader.persistent_workers=False' for of in ('train', 'val')),
            *(f'{of}_dataloader.batch_size=16' for of in ('train', 'val')),
            f'train_cfg.max_epochs={self.epochs}',
            f'train_cfg.val_interval={self.epochs}',
            f'param_scheduler.1.T_max={self.epochs}',
        ]

    def publish(
        self, complete: bool, tables: dict[str, str], pictures: dict[str, Callable[[Path], None]]
    ) -> None:
        name = self.task.name
        costs = []
        for method in self.methods:
            if runs := self.results(method):
                seconds = median(run.seconds_per_iteration for run in runs)
                flops = self._flops[method.name] / 1e6
                costs.append(f'{method.name} {flops:.0f} MFLOPs, {seconds:.2f} s')
        text = f'{self.headline}. Cost of {self.measured} for an image, and time of an iteration: '
        tables = {**tables, name: f'{text}{"; ".join(costs)}.\n\n{tables[name]}'}
        if self.sizes:
            found = self.found()
            complete = complete and all(
                len(found.get(method.name, ())) == len(self.seeds) for method in self.methods
            )
            tables[f'{name}-sizes'] = markdown_table(found)
            if any('layers' in run for runs in found.values() for run in runs):
                pictures = {**pictures, f'{name}-sizes.png': partial(plot, found)}
        super().publish(complete, tables, pictures)


def config_text(base: str, classes: Sequence[str], cache: str) -> str:
    """A config with a frozen backbone, a narrow neck and head, and one anchor a place and ratio.

    Args:
        base: Name of the config of which it is made, below ``configs/``.
        classes: Other ones than its own, if any.
        cache: Folder for the backbone's maps.
    """
    # So that the padding, and with it the cache, does not depend on the batch.
    pad = {'type': 'BatchFixedSizePad', 'size': (SIDE, SIDE)}
    head: dict[str, Any] = {
        **dict.fromkeys(('in_channels', 'feat_channels'), WIDTH),
        'anchor_generator': {'octave_base_scale': 5, 'scales_per_octave': 1},
        **({'num_classes': len(classes)} if classes else {}),
    }
    text = f"""# Written by `tools/reproduce.py`.
_base_ = {str(CONFIGS / f'{base}.py')!r}
model = dict(
    data_preprocessor=dict(batch_augments=[{pad!r}]),
    neck=dict(out_channels={WIDTH}),
    bbox_head={head!r},
)
model['backbone'] = dict(
    _delete_=True, type='mmdet_moe.Frozen', module={{{{_base_.model.backbone}}}}, cache={cache!r}
)
"""
    if classes:
        dataset = f'dict(dataset=dict(metainfo=dict(classes={tuple(classes)!r})))'
        text += f'train_dataloader = {dataset}\nval_dataloader = {dataset}\n'
        text += f'test_dataloader = {dataset}\n'
    return text
