"""``experts.json``, without history and verdict, from the records of a study, file by file."""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from mmdet_moe.analysis.controls import Controls, RandomRouters
from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.records.contents import (
    BoxRecords,
    ClassifierRecords,
    DetectionRecords,
    DetectorRecords,
    ImageRecords,
    LayerRecords,
    concatenated,
)
from mmdet_moe.analysis.statistics.association import Association
from mmdet_moe.analysis.statistics.bins import (
    COCO_SIZES,
    POSITIONS,
    SIZES,
    Bins,
    box_sizes,
    coco_size_bin,
    level_bins,
    position_bin,
    size_bin,
)
from mmdet_moe.analysis.statistics.counterfactual import counterfactuals
from mmdet_moe.analysis.statistics.evaluation import ClassificationMetrics, DetectionMetrics
from mmdet_moe.analysis.statistics.flow import flows
from mmdet_moe.analysis.statistics.inference import interval, paired_interval, resampled_images
from mmdet_moe.analysis.statistics.layer_statistics import MAX_LEVELS, LayerStatistics
from mmdet_moe.analysis.statistics.matching import IGNORED
from mmdet_moe.analysis.statistics.polysemanticity import polysemanticity
from mmdet_moe.analysis.study import Study
from mmdet_moe.moe import MoELayer

SCHEMA, VERSION = 'mmdet_moe.experts', 4
# Given what each attribute is told, besides without; some of the classes make a super-class.
_GIVEN = {'class': ('level',), 'superclass': ('level',), 'level': ('class',)}
_GIVEN_BOTH = ('level', 'class')


def summarise(study: Study, run: dict, permutations: int = 999) -> dict:
    """``experts.json`` without history and verdict.

    Args:
        study: After its passes.
        run: What is to be said of config, checkpoint and split.
        permutations: Of each test.
    """
    summaries = [
        _LayerSummary(layer.num_experts, study.data, study.score_thr, study.controls.get(name))
        for name, layer in study.layers.items()
    ]
    for records in study.records if study.controls else ():
        for summary, layer in zip(summaries, records.layers, strict=True):
            if summary.controls is not None:
                summary.controls.learn(layer, len(records.images.index) / len(study.data))
    num_objects = num_detections = 0
    for records in study.records:
        for summary, layer in zip(summaries, records.layers, strict=True):
            summary.add(records, layer)
        if study.is_detector:
            num_objects += int((~records.objects.crowd).sum())
            num_detections += int(_counts(records.detections, study.score_thr).sum())
        else:
            num_objects += len(records.classes.label)
    measured = metrics_of(study, permutations)
    alone = counterfactuals(study)
    return {
        'schema': SCHEMA,
        'version': VERSION,
        'run': {
            **run,
            'task': 'detection' if study.is_detector else 'classification',
            'num_images': len(study.data),
            'images': None if study.data.is_whole else study.data.chosen,
            'num_objects': num_objects,
            'num_detections': num_detections,
            'score_thr': study.score_thr if study.is_detector else None,
            'classes': study.data.classes,
            'superclasses': study.data.superclasses,
            'num_levels': study.tracer.num_levels,
        },
        **measured,
        'flows': flows(study),
        'layers': {
            name: {
                'kind': 'sparse' if isinstance(layer, MoELayer) else 'factorised',
                'top_k': layer.top_k,
                'granularity': layer.granularity,
                **summary.as_dict(permutations),
                'polysemanticity': polysemanticity(
                    name, measured['metrics'], measured['interventions']
                ),
                'counterfactual': alone[name],
            }
            for (name, layer), summary in zip(study.layers.items(), summaries, strict=True)
        },
    }


def metrics_of(study: Study, resamples: int = 999) -> dict:
    """The metrics of the unchanged model and of all interventions, as in ``experts.json``.

    Args:
        study: After its passes.
        resamples: Of the images, for the intervals; the same for all, so that differences to the
            unchanged model are those on the same images.
    """
    if study.is_detector:
        metrics = DetectionMetrics(study.data, len(study.data))
        unchanged = concatenated(list(study.records.part('detections')))
    else:
        classes = concatenated(list(study.records.part('classes')))
        metrics = ClassificationMetrics(study.data.classes, classes.label)
        unchanged = classes.prediction
    times = resampled_images(len(study.data), resamples)
    before = metrics.evaluated(unchanged)
    values = before.resampled(times)
    # Only if all images have been through them: metrics of a part cannot be compared.
    is_complete = bool(study.interventions) and study.changed.num_images == len(study.data)
    made = zip(study.interventions, _changed(study), strict=True) if is_complete else ()
    interventions = []
    for intervention, found in made:
        after = metrics.evaluated(found)
        changed = after.resampled(times) if study.is_detector else {}
        difference = {}
        for name in values:
            if before.metrics[name] is None or after.metrics[name] is None:
                continue
            value = after.metrics[name] - before.metrics[name]
            if name == 'accuracy':
                known = {'interval': paired_interval(before.outcomes, after.outcomes)}
            else:
                ends = interval(changed[name] - values[name], value, len(study.data))
                num_changed = int((before.outcomes != after.outcomes).sum())
                known = {'interval': ends, 'num_changed': num_changed}
            difference[name] = {'value': value, **known}
        entry = {**asdict(intervention), 'metrics': after.metrics, 'difference': difference}
        if isinstance(metrics, ClassificationMetrics):
            changes = metrics.changed_per_class(before.outcomes, after.outcomes)
            entry['changed_per_class'] = changes
        interventions.append(entry)
    return {
        'metrics': before.metrics,
        'metrics_interval': {
            name: None
            if (value := before.metrics[name]) is None
            else _within_0_and_1(interval(of_name, value, len(study.data)))
            for name, of_name in values.items()
        },
        'interventions': interventions,
    }


def _within_0_and_1(ends: list[float] | None) -> list[float] | None:
    return None if ends is None else [min(max(end, 0.0), 1.0) for end in ends]


def _changed(study: Study) -> Iterator[BoxRecords | np.ndarray]:
    """What was predicted for all images, with one intervention after the other."""
    if study.is_detector:  # only those of one are in memory
        for number in range(len(study.interventions)):
            yield concatenated(list(study.changed.part(str(number))))
    else:
        yield from concatenated(list(study.changed)).prediction.T


def _counts(found: DetectionRecords, score_thr: float) -> np.ndarray:
    """bool (d,): right or wrong, above the threshold; what lies on a crowd is neither."""
    return (found.score >= score_thr) & (found.match != IGNORED)


class _LayerSummary:
    """All statistics of one layer."""

    def __init__(
        self,
        num_experts: int,
        data: AnalysisData,
        score_thr: float,
        routers: RandomRouters | None,
    ) -> None:
        self.num_experts = num_experts
        self.controls = None if routers is None else Controls(routers)
        self.score_thr = score_thr
        self.decisions = LayerStatistics(num_experts)
        self.group_of = _group_of(data)
        self.source_of = data.sources[1] if data.sources else None
        self.bins = {
            'size': SIZES,
            'size_coco': COCO_SIZES,
            'class': Bins(data.classes),
            'superclass': Bins(list(data.superclasses)) if data.superclasses else None,
            'cluster': Bins(data.clusters) if data.clusters else None,
            'dataset': Bins(data.sources[0]) if data.sources else None,
            'level': level_bins(MAX_LEVELS),
            'position': POSITIONS,
        }
        self.associations: dict[str, dict[str, Association]] = {}
        self._levels = 0

    def add(self, records: DetectorRecords | ClassifierRecords, layer: LayerRecords) -> None:
        """One file of records."""
        links = layer.links
        made = layer.decisions
        self.decisions.add(made)
        if self.controls is not None:
            self.controls.use(layer.controls)
            bins = {'level': made.level, 'position': position_bin(*made.centre.T)}
            self._control('decisions', bins, bins, made.unit, np.ones(len(made.unit)))
        if self.source_of is not None:
            bins, given = self._of_images(made.image), {'level': made.level}
            behind = (made.unit, np.ones(len(made.unit)), made.weights, made.image)
            self._count('decisions', bins, given, *behind)
        behind = (links.unit, links.share, links.weights)
        if isinstance(records, ClassifierRecords):
            bins = self._of_classes(records.classes.label[links.owner])
            if self.bins['cluster'] is not None:
                bins['cluster'] = records.classes.cluster[links.owner]
            image = records.images.index[links.owner]
            bins |= self._of_images(image)
            self._count('objects', bins, bins, *behind, image)
            return
        objects, found = records.objects, records.detections
        image = objects.image[links.owner]
        bins = self._of_classes(objects.label[links.owner]) | self._of_boxes(
            objects.box[links.owner], image, links.level, records.images
        )
        self._count('objects', bins, bins, *behind, image)
        behind = layer.detections
        shown = _counts(found, self.score_thr) & (behind.unit >= 0)
        bins = self._of_classes(found.label[shown]) | self._of_boxes(
            found.box[shown], found.image[shown], found.level[shown], records.images
        )
        unit, weights = behind.unit[shown], behind.weights[shown]
        self._count('detections', bins, bins, unit, np.ones(len(unit)), weights, found.image[shown])

    def _of_classes(self, label: np.ndarray) -> dict[str, np.ndarray]:
        bins = {'class': label}
        if self.group_of is not None:
            bins['superclass'] = self.group_of[label]
        return bins

    def _of_images(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return {} if self.source_of is None else {'dataset': self.source_of[image]}

    def _of_boxes(
        self, boxes: np.ndarray, image: np.ndarray, level: np.ndarray, images: ImageRecords
    ) -> dict[str, np.ndarray]:
        size = box_sizes(boxes)
        height, width = images.size[np.searchsorted(images.index, image)].astype(np.float64).T
        x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
        self._levels = max(self._levels, int(level.max(initial=-1)) + 1)
        return self._of_images(image) | {
            'size': size_bin(size),
            'size_coco': coco_size_bin(size),
            'position': position_bin(x / width, y / height),
            'level': level,
        }

    def _count(
        self,
        source: str,
        bins: dict[str, np.ndarray],
        given: dict[str, np.ndarray],
        unit: np.ndarray,
        share: np.ndarray,
        weights: np.ndarray,
        image: np.ndarray,
    ) -> None:
        self._control(source, bins, given, unit, share)
        tables = self.associations.setdefault(source, {})
        for attribute, values in bins.items():
            if attribute not in tables:
                names = [name for name in _GIVEN.get(attribute, _GIVEN_BOTH) if name in given]
                count = len(self.bins[attribute])
                tables[attribute] = Association(count, self.num_experts, names)
            tables[attribute].add(unit, values, share, weights, image, given)

    def _control(
        self,
        source: str,
        bins: dict[str, np.ndarray],
        given: dict[str, np.ndarray],
        unit: np.ndarray,
        share: np.ndarray,
    ) -> None:
        if self.controls is not None:
            level = given.get('level', np.zeros_like(unit))
            sizes = {attribute: len(self.bins[attribute]) for attribute in bins}
            self.controls.add(source, bins, unit, share, level, sizes)

    def as_dict(self, permutations: int) -> dict:
        """The layer's part of ``experts.json``."""
        found = {}
        for source, tables in self.associations.items():
            found[source] = {}
            for attribute, table in tables.items():
                if attribute == 'level' and self._levels < 2:
                    continue
                bins, result = self.bins[attribute], table.result(permutations)
                if attribute == 'level':
                    bins, result = level_bins(self._levels), result.first(self._levels)
                found[source][attribute] = bins, result
        summary = self.decisions.as_dict(permutations, found)
        if self.controls is not None:
            self.controls.fill(summary['associations'])
        return summary


def _group_of(data: AnalysisData) -> np.ndarray | None:
    """int64 (classes,): the super-class of each class; None without super-classes."""
    if data.superclasses is None:
        return None
    groups = np.full(len(data.classes), -1, np.int64)
    for number, members in enumerate(data.superclasses.values()):
        groups[members] = number
    return groups
