"""The analysis of one model on one data set: the passes over the images, and what is made of them.

1. The statistics pass predicts every image once and records detections, objects and decisions.
2. The interventions predict every image again with changed decisions, features shared where no
   changed layer comes before them.
3. The summary reads the records, file by file.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from mmengine.runner import Runner
from torch import nn

from mmdet_moe.analysis.association import (
    COCO_SIZES,
    POSITIONS,
    SIZES,
    Association,
    Bins,
    coco_size_bin,
    position_bin,
    size_bin,
)
from mmdet_moe.analysis.attribution import Tracer, replaced
from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.evaluation import ClassificationMetrics, DetectionMetrics
from mmdet_moe.analysis.interventions import (
    ALL,
    Intervention,
    applied,
    experts_remembered,
    interventions_on,
)
from mmdet_moe.analysis.layer_statistics import MAX_LEVELS, LayerStatistics
from mmdet_moe.analysis.outcomes import CORRECT, MISSED, WRONG, Outcomes
from mmdet_moe.analysis.recorder import Recorder
from mmdet_moe.analysis.records import Arrays, Records

SCHEMA, VERSION = 'mmdet_moe.experts', 1
#: Raise it whenever the records of the same analysis would have other contents.
RECORD_FORMAT = 2
#: Images in one file of records: what an interruption costs at most.
IMAGES_PER_FILE = 64
Progress = Callable[[int], None]


class Study:
    """Model, data and records of one analysis.

    Args:
        model: In evaluation mode, on its device.
        data: The data set.
        folder: Where the records go.
        plan: What identifies this analysis, see :class:`Records`.
        score_thr: Detections below it count for AP alone.
        overwrite: Replace the records of another analysis.

    Raises:
        ConfigError: If the model has no MoE layer, or the folder belongs to another analysis.
    """

    def __init__(
        self,
        model: nn.Module,
        data: AnalysisData,
        folder: Path,
        plan: dict,
        score_thr: float,
        overwrite: bool = False,
    ) -> None:
        self.model = model
        self.data = data
        self.score_thr = score_thr
        self.tracer = Tracer(model)
        self.layers = self.tracer.layers
        plan = {**plan, 'format': RECORD_FORMAT, 'layers': list(self.layers), 'images': len(data)}
        self.statistics = Records(folder / 'statistics', plan, overwrite)
        self.interventions = interventions_on(self.layers)
        described = [asdict(intervention) for intervention in self.interventions]
        self._changed = Records(
            folder / 'interventions', {**plan, 'interventions': described}, overwrite
        )

    @property
    def is_detector(self) -> bool:
        """Whether the model predicts boxes."""
        return self.tracer.is_detector

    # Passes --------------------------------------------------------------------------------------

    def record(self, progress: Progress = lambda images: None) -> None:
        """The statistics pass, from where it stopped.

        Args:
            progress: Told the number of images that are done, after each batch.
        """
        recorder = Recorder(self.tracer, self.data)
        with self.tracer:
            for first, end, batches in self._chunks(self.statistics, progress):
                for indices, batch in batches:
                    recorder.add(indices, self.tracer.predict(batch))
                    progress(len(indices))
                self.statistics.write(first, end, recorder.take())

    @torch.no_grad()
    def intervene(self, progress: Progress = lambda images: None) -> None:
        """Predict every image with every intervention, from where it stopped."""
        if not self.interventions:
            return
        for first, end, batches in self._chunks(self._changed, progress):
            parts: dict[str, list[np.ndarray]] = {}
            for indices, batch in batches:
                data = self.model.data_preprocessor(batch, False)
                with (
                    _shared_features(self.model, data['inputs']) as sharing,
                    experts_remembered(self.layers),
                ):
                    for number, intervention in enumerate(self.interventions):
                        with (
                            applied(intervention, self.layers, (number, indices[0])),
                            sharing(self._is_in_head(intervention)),
                        ):
                            results = self.model(**data, mode='predict')
                        for name, array in self._predictions(indices, results).items():
                            parts.setdefault(f'{number}/{name}', []).append(array)
                progress(len(indices))
            self._changed.write(first, end, {k: np.concatenate(v) for k, v in parts.items()})

    def _is_in_head(self, intervention: Intervention) -> bool:
        """Whether no changed layer stands before the features."""
        changed = [name for name in self.layers if intervention.layer in (name, ALL)]
        return self.is_detector and all(name.split('.')[0].endswith('head') for name in changed)

    def _predictions(self, indices: list[int], results: list) -> Arrays:
        if not self.is_detector:
            scores = torch.stack([result.pred_score for result in results])
            return {'prediction': scores.argmax(1).cpu().numpy().astype(np.int32)}
        found = [result.pred_instances for result in results]
        counts = [len(instances) for instances in found]
        return {
            'image': np.repeat(np.array(indices, np.int32), counts),
            **{
                name: torch.cat([instances[field] for instances in found]).cpu().numpy()
                for name, field in (('box', 'bboxes'), ('score', 'scores'), ('label', 'labels'))
            },
        }

    def _chunks(
        self, records: Records, progress: Progress
    ) -> Iterator[tuple[int, int, Iterator[tuple[list[int], dict]]]]:
        """What is still to do: (first image, end, batches) of each file of records."""
        done, total = records.num_images, len(self.data)
        progress(done)
        if done == total:
            return
        order = range(done, total)
        loader = Runner.build_dataloader(
            {**self.data.loader_cfg, 'dataset': self.data.dataset, 'sampler': order}
        )
        size = loader.batch_size
        batches = iter(loader)
        per_file = max(1, IMAGES_PER_FILE // size) * size
        for first in range(done, total, per_file):
            end = min(first + per_file, total)
            starts = range(first, end, size)
            yield (
                first,
                end,
                ((list(range(start, min(start + size, end))), next(batches)) for start in starts),
            )

    # Summary -------------------------------------------------------------------------------------

    def summarise(self, run: dict, permutations: int = 999) -> dict:
        """``experts.json`` without history and verdict.

        Args:
            run: What is to be said of config, checkpoint and split.
            permutations: Of each test.
        """
        builders = [
            _LayerSummary(layer.num_experts, self.data, self.score_thr)
            for layer in self.layers.values()
        ]
        totals = {'num_objects': 0, 'num_detections': 0}
        for arrays in self.statistics:
            for number, builder in enumerate(builders):
                builder.add(arrays, f'{number}/')
            totals['num_objects'] += _num_objects(arrays)
            if self.is_detector:
                totals['num_detections'] += int((arrays['det_score'] >= self.score_thr).sum())
        layers = {}
        for (name, layer), builder in zip(self.layers.items(), builders, strict=True):
            layers[name] = {
                'top_k': layer.top_k,
                'granularity': layer.granularity,
                **builder.as_dict(permutations),
            }
        return {
            'schema': SCHEMA,
            'version': VERSION,
            'run': {
                **run,
                'task': 'detection' if self.is_detector else 'classification',
                'num_images': len(self.data),
                **totals,
                'score_thr': self.score_thr if self.is_detector else None,
                'classes': self.data.classes,
                'superclasses': self.data.superclasses,
                'num_levels': self.tracer.num_levels,
            },
            **self.metrics(),
            'layers': layers,
        }

    def metrics(self) -> dict:
        """The metrics of the unchanged model and of all interventions, as in ``experts.json``."""
        if self.is_detector:
            metrics = DetectionMetrics(self.data, len(self.data))
            fields = ('image', 'box', 'score', 'label')
            unchanged = metrics(*_columns(self.statistics, [f'det_{field}' for field in fields]))
            truth = ()
        else:
            metrics = ClassificationMetrics(self.data.classes)
            fields = ('prediction',)
            *_, true_labels = _columns(self.statistics, ['prediction', 'label'])
            unchanged = metrics(*_columns(self.statistics, ['prediction', 'label']))
            truth = (true_labels,)
        interventions = []
        # Only if all images have been through them: metrics of a part cannot be compared.
        if self.interventions and self._changed.num_images == len(self.data):
            for number, intervention in enumerate(self.interventions):
                columns = _columns(self._changed, [f'{number}/{field}' for field in fields])
                interventions.append({**asdict(intervention), 'metrics': metrics(*columns, *truth)})
        return {'metrics': unchanged, 'interventions': interventions}

    def outcomes(self) -> Outcomes:
        """What became of every object and every detection above the threshold."""
        make = _detector_outcomes if self.is_detector else _classifier_outcomes
        names = list(self.layers)
        parts = [make(arrays, names, self.score_thr) for arrays in self.statistics]
        columns = {
            field: np.concatenate([getattr(part, field) for part in parts])
            for field in Outcomes.__dataclass_fields__
            if field != 'weights'
        }
        weights = {name: np.concatenate([part.weights[name] for part in parts]) for name in names}
        return Outcomes(**columns, weights=weights)


@contextmanager
def _shared_features(model: nn.Module, inputs: torch.Tensor) -> Iterator[Callable]:
    """Gives a context in which the model takes the features of ``inputs`` from a cache."""
    cache: list = []

    @contextmanager
    def sharing(shared: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if shared:
                if not cache:
                    cache.append(model.extract_feat(inputs))
                stack.enter_context(replaced(model, 'extract_feat', lambda _: cache[0]))
            yield

    yield sharing


def _columns(records: Records, names: list[str]) -> list[np.ndarray]:
    """Whole columns of the records, of all files."""
    parts = [[arrays[name] for name in names] for arrays in records]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _num_objects(arrays: Arrays) -> int:
    return int((~arrays['obj_crowd']).sum()) if 'obj_crowd' in arrays else len(arrays['label'])


def _sizes(boxes: np.ndarray) -> np.ndarray:
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1))


def _relative_centres(boxes: np.ndarray, image: np.ndarray, arrays: Arrays) -> np.ndarray:
    """(n, 2): x and y of the middle of boxes, relative to their images."""
    rows = np.searchsorted(arrays['image'], image)
    height_width = arrays['size'][rows].astype(np.float64)
    return (boxes[:, :2] + boxes[:, 2:]) / 2 / height_width[:, ::-1]


class _LayerSummary:
    """All statistics of one layer."""

    def __init__(self, num_experts: int, data: AnalysisData, score_thr: float) -> None:
        self.num_experts = num_experts
        self.score_thr = score_thr
        self.decisions = LayerStatistics(num_experts)
        self.group_of = _group_of(data)
        self.bins = {
            'size': SIZES,
            'size_coco': COCO_SIZES,
            'class': Bins(data.classes),
            'superclass': Bins(list(data.superclasses)) if data.superclasses else None,
            'cluster': Bins(data.clusters) if data.clusters else None,
            'level': Bins([str(level) for level in range(MAX_LEVELS)]),
            'position': POSITIONS,
        }
        self.associations: dict[str, dict[str, Association]] = {}
        self._levels = 0

    def add(self, arrays: Arrays, prefix: str) -> None:
        """One file of records."""
        if f'{prefix}dec_weights' in arrays:
            centre = arrays[f'{prefix}dec_centre']
            self.decisions.add(
                arrays[f'{prefix}dec_weights'],
                arrays[f'{prefix}dec_level'],
                arrays[f'{prefix}dec_image'],
                None if np.isnan(centre).all() else centre,
                arrays[f'{prefix}dec_unit'],
            )
        if f'{prefix}link_object' in arrays:
            self._add_objects(arrays, prefix)
        if 'det_box' in arrays:
            self._add_detections(arrays, prefix)

    def _add_objects(self, arrays: Arrays, prefix: str) -> None:
        owner = arrays[f'{prefix}link_object']
        rest = (
            arrays[f'{prefix}link_unit'],
            arrays[f'{prefix}link_share'],
            arrays[f'{prefix}link_weights'],
        )
        if 'obj_box' not in arrays:
            cluster = arrays['cluster'][owner] if 'cluster' in arrays else None
            self._count('objects', arrays['label'][owner], *rest, cluster=cluster)
            return
        boxes = arrays['obj_box'][owner]
        self._count(
            'objects',
            arrays['obj_label'][owner],
            *rest,
            size=_sizes(boxes),
            level=arrays[f'{prefix}link_level'],
            centre=_relative_centres(boxes, arrays['obj_image'][owner], arrays),
        )

    def _add_detections(self, arrays: Arrays, prefix: str) -> None:
        found = (arrays['det_match'] >= 0) & (arrays['det_score'] >= self.score_thr)
        found &= arrays[f'{prefix}det_unit'] >= 0
        boxes = arrays['det_box'][found]
        self._count(
            'detections',
            arrays['det_label'][found],
            arrays[f'{prefix}det_unit'][found],
            np.ones(int(found.sum())),
            arrays[f'{prefix}det_weights'][found],
            size=_sizes(boxes),
            level=arrays['det_level'][found],
            centre=_relative_centres(boxes, arrays['det_image'][found], arrays),
        )

    def _count(
        self,
        source: str,
        label: np.ndarray,
        unit: np.ndarray,
        share: np.ndarray,
        weights: np.ndarray,
        size: np.ndarray | None = None,
        level: np.ndarray | None = None,
        centre: np.ndarray | None = None,
        cluster: np.ndarray | None = None,
    ) -> None:
        bins = {'class': label}
        if cluster is not None:
            bins['cluster'] = cluster
        if self.group_of is not None:
            bins['superclass'] = self.group_of[label]
        if size is not None:
            bins |= {'size': size_bin(size), 'size_coco': coco_size_bin(size)}
            bins['position'] = position_bin(centre[:, 0], centre[:, 1])
            self._levels = max(self._levels, int(level.max(initial=-1)) + 1)
            bins['level'] = level
        tables = self.associations.setdefault(source, {})
        for attribute, values in bins.items():
            if attribute not in tables:
                tables[attribute] = Association(len(self.bins[attribute]), self.num_experts)
            tables[attribute].add(unit, values.astype(np.int64), share, weights)

    def as_dict(self, permutations: int) -> dict:
        """The layer's part of ``experts.json``."""
        summary = self.decisions.as_dict(permutations)
        for source, tables in self.associations.items():
            found = summary['associations'].setdefault(source, {})
            for attribute, table in tables.items():
                bins = self.bins[attribute]
                result = table.result(permutations)
                if attribute == 'level':
                    if self._levels < 2:
                        continue
                    bins = Bins(bins.names[: self._levels])
                    result = replace(result, counts=result.counts[: self._levels])
                found[attribute] = result.as_dict(bins)
        return summary


def _group_of(data: AnalysisData) -> np.ndarray | None:
    """int64 (classes,): the super-class of each class; None without super-classes."""
    if data.superclasses is None:
        return None
    groups = np.full(len(data.classes), -1, np.int64)
    for number, members in enumerate(data.superclasses.values()):
        groups[members] = number
    return groups


def _detector_outcomes(arrays: Arrays, layers: list[str], score_thr: float) -> Outcomes:
    shown = (arrays['det_score'] >= score_thr) & (arrays['det_match'] != -2)
    matched = arrays['det_match'][shown]
    correct = matched >= 0
    is_found = np.zeros(len(arrays['obj_label']), bool)
    is_found[matched[correct]] = True
    missed = ~is_found & ~arrays['obj_crowd']
    boxes = np.concatenate([arrays['det_box'][shown], arrays['obj_box'][missed]])
    true_label = np.full(len(matched), -1, np.int32)
    true_label[correct] = arrays['obj_label'][matched[correct]]
    weights = {}
    for number, name in enumerate(layers):
        prefix = f'{number}/'
        held = np.full((len(is_found), arrays[f'{prefix}det_weights'].shape[1]), np.nan, np.float32)
        owner, share = arrays[f'{prefix}link_object'], arrays[f'{prefix}link_share']
        held[owner] = 0
        np.add.at(held, owner, share[:, None] * arrays[f'{prefix}link_weights'])
        weights[name] = np.concatenate([arrays[f'{prefix}det_weights'][shown], held[missed]])
    count = int(missed.sum())
    return Outcomes(
        image=np.concatenate([arrays['det_image'][shown], arrays['obj_image'][missed]]),
        box=boxes,
        label=np.concatenate([arrays['det_label'][shown], arrays['obj_label'][missed]]),
        true_label=np.concatenate([true_label, arrays['obj_label'][missed]]),
        score=np.concatenate([arrays['det_score'][shown], np.full(count, np.nan, np.float32)]),
        kind=np.concatenate([np.where(correct, CORRECT, WRONG), np.full(count, MISSED)]).astype(
            np.uint8
        ),
        size=_sizes(boxes).astype(np.float32),
        level=np.concatenate([arrays['det_level'][shown], arrays['obj_level'][missed]]),
        weights=weights,
    )


def _classifier_outcomes(arrays: Arrays, layers: list[str], _: float) -> Outcomes:
    count = len(arrays['label'])
    height, width = arrays['size'].T
    weights = {}
    for number, name in enumerate(layers):
        prefix = f'{number}/'
        held = np.zeros((count, arrays[f'{prefix}link_weights'].shape[1]), np.float32)
        share = arrays[f'{prefix}link_share'][:, None]
        np.add.at(held, arrays[f'{prefix}link_object'], share * arrays[f'{prefix}link_weights'])
        weights[name] = held
    zeros = np.zeros(count)
    return Outcomes(
        image=arrays['image'],
        box=np.stack([zeros, zeros, width, height], axis=1).astype(np.float32),
        label=arrays['prediction'],
        true_label=arrays['label'],
        score=arrays['score'],
        kind=np.where(arrays['prediction'] == arrays['label'], CORRECT, WRONG).astype(np.uint8),
        size=np.full(count, np.nan, np.float32),
        level=np.full(count, -1, np.int32),
        weights=weights,
    )
