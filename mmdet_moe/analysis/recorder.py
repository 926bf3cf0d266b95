"""Turns the predictions of a batch into records: detections, objects, and what each layer did."""

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.structures import InstanceData

from mmdet_moe.analysis.attribution import Decisions, Places, Tracer
from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.records.contents import (
    BoxRecords,
    ClassifierRecords,
    ClassRecords,
    ControlRecords,
    DecisionRecords,
    DetectionRecords,
    DetectorLayerRecords,
    DetectorRecords,
    ImageRecords,
    LayerRecords,
    LinkRecords,
    ObjectRecords,
    OriginRecords,
    concatenated,
)
from mmdet_moe.analysis.statistics.matching import match

#: Layers with a decision for every pixel have more than anybody can keep: so many of an image, or
#: of a layer with many experts as many as have so many weights.
MAX_DECISIONS, MAX_WEIGHTS = 4096, 1 << 15
#: The number of a decision: the image's index, then in so many bits its own one in the image.
ITEM_BITS = 28


class Recorder:
    """Collects batches until they are taken as one set of records.

    Args:
        tracer: The active tracer of the model.
        data: The data set.
    """

    def __init__(self, tracer: Tracer, data: AnalysisData) -> None:
        self.tracer = tracer
        self.data = data
        self._parts: list[DetectorRecords | ClassifierRecords] = []
        self._num_objects = 0

    @property
    def num_images(self) -> int:
        """Images since :meth:`take` was last called."""
        return sum(len(part.images.index) for part in self._parts)

    def take(self) -> DetectorRecords | ClassifierRecords:
        """Everything since the last call."""
        records = concatenated(self._parts)
        self._parts, self._num_objects = [], 0
        return records

    def add(self, indices: Sequence[int], results: list) -> None:
        """Add one batch.

        Args:
            indices: Of the batch's images in the data set, ascending.
            results: What :meth:`Tracer.predict` returned for them.
        """
        record = self._of_detector if self.tracer.is_detector else self._of_classifier
        self._parts.append(record(np.array(indices, np.int32), results))

    # Detectors -----------------------------------------------------------------------------------

    def _of_detector(self, indices: np.ndarray, results: list) -> DetectorRecords:
        detected, held, owners, parts = [], [], [], []
        for i, (index, result) in enumerate(zip(indices.tolist(), results, strict=True)):
            found, truth = boxes_of(index, result.pred_instances), self.data.objects(index)
            matched = match(
                found.box, found.score, found.label, truth.boxes, truth.labels, truth.crowd
            )
            first, count = self._num_objects, len(truth.labels)
            self._num_objects += count
            places = self.tracer.detection_places(i, result.pred_instances)
            detected.append(places)
            wanted = (~truth.crowd).nonzero()[0]
            responsible, owner = self.tracer.object_places(
                i,
                result.metainfo,
                torch.from_numpy(truth.boxes[wanted]),
                torch.from_numpy(truth.labels[wanted]),
            )
            held.append(responsible)
            owner = wanted[owner.numpy()]
            owners.append(first + owner)
            images = ImageRecords(indices[i : i + 1], np.array([result.ori_shape[:2]], np.int32))
            detections = DetectionRecords(
                **vars(found),
                level=places.level.numpy().astype(np.int32),
                match=np.where(matched >= 0, matched + first, matched),
            )
            objects = ObjectRecords(
                image=np.full(count, index, np.int32),
                box=truth.boxes,
                label=truth.labels.astype(np.int32),
                crowd=truth.crowd,
                level=_main_level(owner, responsible.level.numpy(), count),
            )
            parts.append([images, detections, objects])
        detections, objects, owner = Places.cat(detected), Places.cat(held), np.concatenate(owners)
        layers = []
        for name in self.tracer.layers:
            decisions = self.tracer.decisions(name, len(indices))
            kept = self._decisions(name, decisions, indices, results)
            behind = self._behind(name, decisions, objects, indices)
            links = _links(owner, objects.level.numpy(), behind)
            found = self._behind(name, decisions, detections, indices)
            named = np.concatenate([kept.unit, links.unit, found.unit])
            controls = self._controls(name, decisions, indices, named)
            layers.append(DetectorLayerRecords(kept, links, controls, found))
        return DetectorRecords(*concatenated(parts), layers)

    def _behind(
        self, name: str, decisions: Decisions | None, places: Places, indices: np.ndarray
    ) -> OriginRecords:
        """The decisions of a layer at some places."""
        experts = self.tracer.layers[name].num_experts
        unit = np.full(len(places), -1, np.int64)
        weights = np.full((len(places), experts), np.nan, np.float32)
        if decisions is not None:
            items = self.tracer.items(name, places).numpy()
            known = items >= 0
            unit[known] = _units(decisions, indices)[items[known]]
            weights[known] = decisions.weights.numpy()[items[known]]
        return OriginRecords(unit, weights)

    # Classifiers ---------------------------------------------------------------------------------

    def _of_classifier(self, indices: np.ndarray, results: list) -> ClassifierRecords:
        first = self._num_objects
        self._num_objects += len(indices)
        scores = torch.stack([r.pred_score for r in results]).float().cpu()
        shapes = [
            (result.metainfo.get('ori_shape') or self.data.image_size(index))[:2]
            for index, result in zip(indices.tolist(), results, strict=True)
        ]
        has_clusters = self.data.clusters is not None
        clusters = [self.data.cluster(index) if has_clusters else -1 for index in indices.tolist()]
        labels = np.array([self.data.label(index) for index in indices.tolist()], np.int32)
        classes = ClassRecords(
            label=labels,
            prediction=scores.argmax(1).numpy().astype(np.int32),
            score=scores.amax(1).numpy(),
            true_score=scores.numpy()[np.arange(len(labels)), labels],
            cluster=np.array(clusters, np.int32),
        )
        layers = []
        for name in self.tracer.layers:
            decisions = self.tracer.decisions(name, len(indices))
            kept = self._decisions(name, decisions, indices, results)
            links = _links(
                first + np.searchsorted(indices, kept.image),
                np.full(len(kept.unit), -1),
                OriginRecords(kept.unit, kept.weights),
            )
            controls = self._controls(name, decisions, indices, kept.unit)
            layers.append(LayerRecords(kept, links, controls))
        return ClassifierRecords(ImageRecords(indices, np.array(shapes, np.int32)), classes, layers)

    # Decisions -----------------------------------------------------------------------------------

    def _decisions(
        self, name: str, decisions: Decisions | None, indices: np.ndarray, results: list
    ) -> DecisionRecords:
        """The decisions of one layer that are kept."""
        if decisions is None:
            nothing = np.zeros(0, np.int32)
            weights = np.zeros((0, self.tracer.layers[name].num_experts), np.float32)
            centre = np.zeros((0, 2), np.float32)
            return DecisionRecords(nothing, nothing.astype(np.int64), nothing, centre, weights)
        image = decisions.image.numpy()
        kept = np.arange(len(image))
        most = max(1, min(MAX_DECISIONS, MAX_WEIGHTS // decisions.weights.shape[1]))
        if np.bincount(image).max(initial=0) > most:
            chosen = []
            for i, index in enumerate(indices.tolist()):
                mine = kept[image == i]
                if len(mine) > most:
                    # The same of all layers, whose decisions can so be compared.
                    rng = np.random.default_rng(index)
                    mine = np.sort(rng.choice(mine, most, replace=False))
                chosen.append(mine)
            kept = np.concatenate(chosen)
        return DecisionRecords(
            image=indices[image[kept]],
            unit=_units(decisions, indices)[kept],
            level=decisions.level.numpy()[kept].astype(np.int32),
            centre=_on_images(decisions, results)[kept],
            weights=decisions.weights.numpy()[kept],
        )

    def _controls(
        self, name: str, decisions: Decisions | None, indices: np.ndarray, units: np.ndarray
    ) -> ControlRecords:
        """What the layer's controls make of the decisions with these numbers, -1 for none."""
        routers = self.tracer.controls.get(name)
        shape = (0, 0) if routers is None else (routers.draws, routers.num_logits)
        unit = np.unique(units[units >= 0])
        if decisions is None or not len(unit):
            logits = np.zeros((0, *shape), np.float32)
            return ControlRecords(unit, np.zeros(0, np.int32), logits)
        every = _units(decisions, indices)
        order = np.argsort(every, kind='stable')
        rows = order[np.searchsorted(every, unit, sorter=order)]
        level = decisions.level.numpy()[rows].astype(np.int32)
        if routers is None:
            return ControlRecords(unit, level, np.zeros((len(unit), *shape), np.float32))
        return ControlRecords(unit, level, routers.logits(torch.from_numpy(decisions.first + rows)))


def predictions_of(indices: Sequence[int], results: list) -> BoxRecords | np.ndarray:
    """What was predicted for one batch: boxes, or (by a classifier) the classes, int32 (n,).

    Args:
        indices: Of the batch's images in the data set.
        results: The model's predictions for them.
    """
    if 'pred_score' in results[0]:
        scores = torch.stack([result.pred_score for result in results])
        return scores.argmax(1).cpu().numpy().astype(np.int32)
    pairs = zip(indices, results, strict=True)
    return concatenated([boxes_of(index, result.pred_instances) for index, result in pairs])


def boxes_of(index: int, found: InstanceData) -> BoxRecords:
    """The detections of one image.

    Args:
        index: The image's among those analysed.
        found: Its ``pred_instances``.
    """
    box, score, label = (found[key].cpu().numpy() for key in ('bboxes', 'scores', 'labels'))
    return BoxRecords(
        image=np.full(len(box), index, np.int32),
        box=box.astype(np.float32),
        score=score.astype(np.float32),
        label=label.astype(np.int32),
    )


def _links(owner: np.ndarray, level: np.ndarray, behind: OriginRecords) -> LinkRecords:
    """Every object counts 1, in equal parts for the places behind it that are known."""
    known = behind.unit >= 0
    keys = np.stack([owner[known], behind.unit[known], level[known]], axis=1)
    merged, first, places = np.unique(keys, axis=0, return_index=True, return_counts=True)
    _, which = np.unique(merged[:, 0], return_inverse=True)
    return LinkRecords(
        owner=merged[:, 0],
        unit=merged[:, 1],
        level=merged[:, 2].astype(np.int32),
        share=places / np.bincount(which, weights=places)[which],
        weights=behind.weights[known][first],
    )


def _on_images(decisions: Decisions, results: list) -> np.ndarray:
    """(T, 2): x and y of the decisions relative to their images without padding; NaN on padding."""
    scales = []
    for result in results:
        meta = result.metainfo
        if 'img_shape' not in meta or 'batch_input_shape' not in meta:
            scales.append([1, 1])  # a classifier's images fill their batch
            continue
        height, width = meta['img_shape'][:2]
        padded_height, padded_width = meta['batch_input_shape']
        scales.append([padded_width / width, padded_height / height])
    centre = decisions.centre.numpy() * np.array(scales, np.float32)[decisions.image.numpy()]
    centre[(centre >= 1).any(1)] = np.nan
    return centre


def _main_level(owner: np.ndarray, level: np.ndarray, count: int) -> np.ndarray:
    """The most frequent level of each owner's places, int32 (count,); of several the coarsest."""
    found = np.full(count, -1, np.int32)
    pairs, times = np.unique(np.stack([owner, level], axis=1), axis=0, return_counts=True)
    pairs = pairs[np.argsort(times, kind='stable')]
    found[pairs[:, 0]] = pairs[:, 1]  # the last one stays
    return found


def _units(decisions: Decisions, indices: np.ndarray) -> np.ndarray:
    image = indices.astype(np.int64)[decisions.image.numpy()]
    return (image << ITEM_BITS) | decisions.code.numpy()
