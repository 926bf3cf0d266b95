"""One detector for unlike data sets: the question of :mod:`domains`, asked to a detector.

Any folders in COCO's layout (``train.json``, ``val.json``, ``images/``) are joined, each with its
classes. The backbone is frozen, and its maps are read from a cache
(:func:`mmdet_moe.models.frozen.frozen`), so that neck and head alone cost time. A dense detector is
trained first; all heads start as copies of it and go on, the dense one as well: an expert sees a
part of the images, which is too little for its start in so short a training.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.models import build_model
from mmdet_moe.cli import load_config
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.flops import count_flops
from research.experiments.budget import MIXED_PRECISION, NO_WORKERS
from research.experiments.domains import plot_gains
from research.experiments.experiment import (
    CONFIGS,
    Experiment,
    Method,
    dead_experts,
    folder_name,
    per_layer,
)
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.runs import RunResult, mean_std

NAME = 'domains-detector'
#: Channels of the neck and of both subnets; edge of the images in px.
WIDTH, SIDE = 32, 320
#: The data sets whose table stands in docs/results.md: blood cells, tarmac (FOD-A), VOC2007.
PUBLISHED = ('blood', 'tarmac', 'voc')
#: Of the training before, which gives the common start; of what goes on from it.
START_ITERATIONS, ITERATIONS = 1500, 750
_NO_NOISE = {'noise': False}
#: Clusters within the levels: otherwise they are the levels.
_KMEANS = {'init': 'kmeans', 'normalise_levels': 5, **_NO_NOISE}
_SWITCH = {'type': 'mmdet_moe.SwitchLoss', 'weight': 0.01}
# The number of data sets is filled in.
_DAMEX = {'type': 'mmdet_moe.DatasetLoss', 'weight': 0.1}


@dataclass(frozen=True)
class Head:
    """Both subnets of the head: dense, or as experts that cost as much.

    Attributes:
        experts: E; 0 for a dense head.
        top_k: k; with more than 1 the experts are narrow.
        router: Options of the router.
        loss: Config of the balancing loss, if any.
        apart: A dense detector for each data set, which goes on with that one alone, for its share
            of the iterations: each image is seen as often as by the others.
    """

    experts: int = 0
    top_k: int = 1
    router: Mapping[str, Any] = field(default_factory=dict, hash=False)
    loss: Mapping[str, Any] | None = field(default=None, hash=False)
    apart: bool = False


START = 'start'
DENSE, APART = 'dense', 'a dense detector for each data set'
HEADS = {
    DENSE: Head(),
    APART: Head(apart=True),
    '4 experts: Switch': Head(4, loss=_SWITCH),
    '4 experts: DAMEX': Head(4, loss=_DAMEX),
    '4 experts: k-means start, Switch': Head(4, router=_KMEANS, loss=_SWITCH),
    # Nothing asks for even shares, which the data sets do not have.
    '4 experts: k-means start': Head(4, router=_KMEANS),
    '8 experts: k-means start, Switch': Head(8, router=_KMEANS, loss=_SWITCH),
    '4 narrow experts, k = 2: DAMEX': Head(4, 2, loss=_DAMEX),
    '4 narrow experts, k = 2: k-means start, Switch': Head(4, 2, _KMEANS, _SWITCH),
}
_BASES = (
    'models/retinanet_lite0', 'datasets/voc2007', 'schedules/voc_adamw', 'default_runtime'
)  # fmt: skip


class DomainsDetectorExperiment(Experiment):
    """All heads on the joined data sets.

    Args:
        data: Folder of the folders of the data sets, which are called by their names.
        *args: As for :class:`Experiment`.
        iterations: Of each training that goes on from the start.
        start_iterations: Of the start.

    Raises:
        ConfigError: If there are not at least two such folders.
    """

    name = NAME

    def __init__(
        self,
        data: Path,
        *args,
        iterations: int = ITERATIONS,
        start_iterations: int = START_ITERATIONS,
    ) -> None:
        super().__init__(data, *args)
        self.iterations, self.start_iterations = iterations, start_iterations
        self.start = Method(START, str(self.work_dir / 'configs' / START))
        self.classes, images = self.of_data(
            'classes and images', lambda: _classes_and_images(self.data)
        )
        self.names = tuple(self.classes)
        lengths = (iterations, start_iterations)
        self.is_default = self.names == PUBLISHED and lengths == (ITERATIONS, START_ITERATIONS)
        self.shares = {name: of_set / sum(images.values()) for name, of_set in images.items()}
        self._flops: dict[str, int] = {}

    def run(self, table_only: bool = False) -> None:
        self._write_config(DENSE, self.start)
        for name in HEADS:
            for method in self.methods(name):
                self._write_config(name, method)
                if not table_only:
                    check_config(load_config(method.config + '.py'))
            self.flops(name)  # before there are trainings, which it would disturb in one process
        methods = [method for name in HEADS for method in self.methods(name)]
        self.check([self.start, *methods])
        if not table_only:
            self.train(methods)
        self.write()

    def methods(self, name: str) -> list[Method]:
        """The trainings of a row: one, or one for each data set."""
        keys = [name] if not HEADS[name].apart else [f'{name}, {of}' for of in self.names]
        folder = self.work_dir / 'configs'
        return [Method(key, str(folder / folder_name(key))) for key in keys]

    def options(self, method: Method, seed: int) -> list[str]:
        start = self.start_options(method, seed)
        return [f'randomness.seed={seed}', MIXED_PRECISION, *NO_WORKERS, *start]

    def start_of(self, method: Method) -> Method | None:
        return None if method == self.start else self.start

    def _write_config(self, name: str, method: Method) -> None:
        """The config of a training: a file that ``tools/train.py`` runs, too."""
        names = [of for of in self.names if method.name == f'{name}, {of}'] or self.names
        iterations = self.start_iterations if method == self.start else self.iterations
        text = config_text(
            HEADS[name],
            {of: (str(self.data / of), self.classes[of]) for of in self.names},
            max(1, round(iterations * sum(self.shares[of] for of in names))),
            str(self.work_dir / 'features'),
            learnt=names,
        )
        path = Path(f'{method.config}.py')
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            write_file(path, text.encode())

    def write(self) -> None:
        found = {name: self.found(name) for name in HEADS}
        complete = all(len(runs) == len(self.seeds) for runs in found.values())
        flops = {name: self.flops(name) for name, runs in found.items() if runs}
        text = (
            f'{self.iterations} iterations of 16 images after {self.start_iterations} that all '
            'have in common, mixed precision, AdamW; '
            + ', '.join(
                f'{name}: {len(self.classes[name])} classes, {self.shares[name]:.0%} of the images'
                for name in self.names
            )
            + f'.\n\n{markdown_table(found, self.names, flops)}'
        )
        pictures = {}
        if complete:
            gains = gains_over_dense(found, self.names)
            pictures[f'{NAME}.png'] = partial(
                plot_gains, gains, 'AP above the dense head of equal cost (bars: mean, dots: seeds)'
            )
        self.publish(complete, {NAME: text}, pictures)

    def found(self, name: str) -> dict[int, list[RunResult]]:
        """The finished trainings of a row by seed; those for each data set in their order."""
        methods = self.methods(name)
        results = {seed: [self._result(m, seed) for m in methods] for seed in self.seeds}
        return {seed: runs for seed, runs in results.items() if None not in runs}

    def flops(self, name: str) -> int:
        """Active FLOPs of neck and head for one image."""
        if name not in self._flops:
            cfg = Config.fromfile(f'{self.methods(name)[0].config}.py')
            self._flops[name] = neck_and_head_flops(cfg)
        return self._flops[name]


def _classes_and_images(data: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The classes of each data set, by the name of its folder, and how many images have objects."""
    classes, images = {}, {}
    for path in sorted(data.glob('*/train.json')):
        content = json.loads(path.read_text())
        classes[path.parent.name] = [category['name'] for category in content['categories']]
        images[path.parent.name] = len({of['image_id'] for of in content['annotations']})
    if len(classes) < 2:
        raise ConfigError(
            f"--data: '{data}' holds {len(classes)} folders with a train.json; give a folder that "
            'holds one for each of at least two data sets, as `tools/prepare_data.py yolo` and '
            '`voc2007` write them'
        )
    return classes, images


def neck_and_head_flops(cfg: Config) -> int:
    """Active FLOPs for one image of a detector without its frozen, cached backbone.

    Args:
        cfg: Loses the cache, as what is read costs no FLOPs.
    """
    del cfg.model.backbone.cache
    # Where pixels are routed, weights and image decide about the cost.
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, image = build_model(cfg), torch.randn(1, 3, SIDE, SIDE)
    # The frozen backbone is the same in all, and most of the whole.
    return count_flops(model, image) - count_flops(model.backbone, image)


def config_text(
    head: Head,
    folders: Mapping[str, tuple[str, Sequence[str]]],
    iterations: int,
    cache: str,
    learnt: Sequence[str],
) -> str:
    """A config of MMDetection.

    Args:
        head: What its head is like.
        folders: Path and classes of each data set by name.
        iterations: Of the training.
        cache: Folder for the backbone's maps.
        learnt: The data sets whose images are trained with.
    """
    classes = dict.fromkeys(name for _, of_set in folders.values() for name in of_set)
    bbox_head: dict[str, Any] = {
        'num_classes': len(classes), 'in_channels': WIDTH, 'feat_channels': WIDTH,
        'anchor_generator': {'octave_base_scale': 5, 'scales_per_octave': 1},
    }  # fmt: skip
    hooks = []
    if head.experts:
        # With less than the whole of one chosen expert it would not start as the dense head.
        alone = {'softmax': 'straight_through'} if head.top_k == 1 else {}
        bbox_head |= {
            'type': 'mmdet_moe.MoERetinaHead', 'num_experts': head.experts, 'top_k': head.top_k,
            'decision_weight': 'uniform',
            'router': {'type': 'mmdet_moe.GAPRouter', **alone, **head.router},
            **({} if head.top_k == 1 else {'width': 'equal'}),
        }  # fmt: skip
        hooks.append({'type': 'mmdet_moe.ExpertUtilizationHook'})
    if head.loss is not None:
        of_sets = head.loss['type'].endswith('DatasetLoss')
        loss = {**head.loss, **({'sources': len(folders)} if of_sets else {})}
        hooks.append({'type': 'mmdet_moe.BalancingLossHook', 'loss': loss})
    model = {
        'data_preprocessor': {
            # So that the padding, and with it the cache, does not depend on the batch.
            'batch_augments': [{'type': 'BatchFixedSizePad', 'size': (SIDE, SIDE)}]
        },
        'neck': {'out_channels': WIDTH},
        'bbox_head': bbox_head,
    }
    datasets = {
        split: [
            {
                'type': 'CocoDataset', 'data_root': root, 'metainfo': {'classes': tuple(of_set)},
                'ann_file': f'{split}.json', 'data_prefix': {'img': 'images/'},
                **({'test_mode': True} if split == 'val' else
                   {'filter_cfg': {'filter_empty_gt': True, 'min_size': 32}}),
                # No images, but classes.
                **({'indices': 0, 'serialize_data': False}
                   if split == 'train' and name not in learnt else {}),
            }
            for name, (root, of_set) in folders.items()
        ]
        for split in ('train', 'val')
    }  # fmt: skip
    meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances')
    test_pipeline = [
        {'type': 'LoadImageFromFile'},
        {'type': 'Resize', 'scale': (SIDE, SIDE), 'keep_ratio': True},
        {'type': 'LoadAnnotations', 'with_bbox': True},
        {'type': 'PackDetInputs', 'meta_keys': meta_keys},
    ]
    names = tuple(folders)
    bases = ',\n'.join(f'    {str(CONFIGS / "_base_" / f"{base}.py")!r}' for base in _BASES)
    return f"""# Written by `tools/reproduce.py {NAME}`.
_base_ = [
{bases},
]
model = {model!r}
model['backbone'] = dict(
    _delete_=True, type='mmdet_moe.Frozen', module={{{{_base_.model.backbone}}}}, cache={cache!r}
)
joined = dict(_delete_=True, type='mmdet_moe.JointDataset', names={names!r})
train_dataloader = dict(
    batch_size=16,
    dataset=dict(
        **joined, datasets={datasets['train']!r}, pipeline={{{{_base_.train_pipeline}}}}
    ),
)
val_dataloader = dict(
    batch_size=16,
    dataset=dict(
        **joined, datasets={datasets['val']!r}, pipeline={test_pipeline!r}
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type='MultiDatasetsEvaluator',
    metrics={[{'type': 'CocoMetric', 'metric': 'bbox'}] * len(names)!r},
    dataset_prefixes={names!r},
)
test_evaluator = val_evaluator
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters={iterations}, val_interval={iterations}
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, T_max={iterations}),
]
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval={max(1, iterations // 5)}),
    logger=dict(log_metric_by_epoch=False, interval={min(50, iterations)}),
)
log_processor = dict(by_epoch=False)
custom_hooks = {hooks!r}
"""


def of_data_sets(runs: Sequence[RunResult], names: Sequence[str]) -> list[float]:
    """AP of each data set, of the one training or of its own."""
    runs = runs if len(runs) == len(names) else [runs[0]] * len(names)
    # MMDetection logs no metric where nothing at all was detected.
    return [run.metrics.get(f'AP {name}', 0.0) for run, name in zip(runs, names, strict=True)]


def gains_over_dense(
    found: Mapping[str, Mapping[int, list[RunResult]]], names: Sequence[str]
) -> dict[str, list[float]]:
    """Mean AP of the data sets above that of the dense head of the same seed, in points."""

    def ap(name: str, seed: int) -> float:
        return 100 * float(np.mean(of_data_sets(found[name][seed], names)))

    dense = found.get(DENSE, {})
    return {
        name: [ap(name, seed) - ap(DENSE, seed) for seed in by_seed if seed in dense]
        for name, by_seed in found.items()
        if name != DENSE
    }


def markdown_table(
    found: Mapping[str, Mapping[int, list[RunResult]]],
    names: Sequence[str],
    flops: Mapping[str, int],
) -> str:
    """Mean ± standard deviation over the seeds, in points of AP.

    Args:
        found: The finished trainings of each row, by seed.
        names: Of the data sets.
        flops: Active ones by row.
    """
    columns = (
        'head', 'seeds', 'AP, mean of the data sets', 'against dense',
        *(f'AP {name}' for name in names), 'active MFLOPs', 's/iteration', 'parameters',
        'information on the data set (cls / reg)', 'dead experts',
    )  # fmt: skip
    gains = gains_over_dense(found, names)

    def rows() -> Iterator[list[str]]:
        for name, by_seed in found.items():
            if not by_seed:
                continue
            aps = [[100 * ap for ap in of_data_sets(runs, names)] for runs in by_seed.values()]
            paired = gains.get(name)
            first = next(iter(by_seed.values()))
            seconds = [r.seconds_per_iteration for runs in by_seed.values() for r in runs]
            cells = [name, str(len(by_seed)), mean_and_std([np.mean(ap) for ap in aps], 1)]
            cells.append(f'{mean_std(paired)[0]:+.1f}' if paired else NOTHING)
            cells += [mean_and_std(of_set, 1) for of_set in zip(*aps, strict=True)]
            cells += [f'{flops[name] / 1e6:.0f}', f'{median(seconds):.2f}']
            cells.append(f'{sum(run.total_parameters for run in first) / 1e3:,.0f} k')
            if not first[0].layers:
                yield [*cells, NOTHING, NOTHING]
                continue
            runs = [of_seed[0] for of_seed in by_seed.values()]
            yield [*cells, per_layer(runs, 'mi_source'), dead_experts(runs)]

    return table(columns, rows())
