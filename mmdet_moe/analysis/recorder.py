"""Turns the predictions of a batch into arrays: detections, objects and decisions of every layer.

Arrays of one file of records (i images, d detections, o objects, L layers by their number):

- ``image`` int32 (i,), index in the data set; ``size`` int32 (i, 2), its height and width in px; of
  a classifier also ``label`` and ``prediction`` int32 and ``score`` float32, and ``cluster`` int32
  where the images come from hidden clusters.
- ``det_image`` int32, ``det_box`` float32 (d, 4), ``det_score`` float32, ``det_label`` int32,
  ``det_level`` int32, ``det_match`` int64 (the row of its object, or what
  :mod:`~mmdet_moe.analysis.matching` says).
- ``obj_image``, ``obj_box``, ``obj_label``, ``obj_crowd``, and ``obj_level`` int32, the level of
  most of its anchors or RoIs, -1 without. A classifier's images are its objects.
- ``L/det_unit`` int64 (d,), the number of the decision behind each detection, -1 if unknown, and
  ``L/det_weights`` float32 (d, E), NaN there.
- ``L/link_object``, ``L/link_unit``, ``L/link_level``, ``L/link_share``, ``L/link_weights``: which
  decisions stand behind each object, and which share of it each one has.
- ``L/dec_image``, ``L/dec_unit``, ``L/dec_level``, ``L/dec_centre``, ``L/dec_weights``: the
  decisions themselves, at most :data:`MAX_DECISIONS` of an image, drawn at random.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mmdet_moe.analysis.attribution import Decisions, Places, Tracer
from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.matching import match
from mmdet_moe.analysis.records import Arrays

#: Layers with a decision for every pixel have more than anybody can keep.
MAX_DECISIONS = 4096
# The number of a decision: the image's index, then its own number in the image.
_ITEM_BITS = 28


class Recorder:
    """Collects batches until they are taken as one set of arrays.

    Args:
        tracer: The active tracer of the model.
        data: The data set.
    """

    def __init__(self, tracer: Tracer, data: AnalysisData) -> None:
        self.tracer = tracer
        self.data = data
        self._parts: dict[str, list[np.ndarray]] = {}
        self._rows = {'objects': 0}

    def take(self) -> Arrays:
        """Everything since the last call."""
        arrays = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        self._parts, self._rows = {}, {'objects': 0}
        return arrays

    def add(self, indices: Sequence[int], results: list) -> None:
        """Add one batch.

        Args:
            indices: Of the batch's images in the data set.
            results: What :meth:`Tracer.predict` returned for them.
        """
        record = self._detections if self.tracer.is_detector else self._classifications
        record(list(indices), results)

    def _append(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            self._parts.setdefault(name, []).append(array)

    # Detectors -----------------------------------------------------------------------------------

    def _detections(self, indices: list[int], results: list) -> None:
        detected, held, owners, rows = [], [], [], []
        for i, (index, result) in enumerate(zip(indices, results, strict=True)):
            found, truth = result.pred_instances, self.data.objects(index)
            boxes, scores, labels = (
                found[key].detach().cpu().numpy() for key in ('bboxes', 'scores', 'labels')
            )
            matched = match(boxes, scores, labels, truth.boxes, truth.labels, truth.crowd)
            first = self._rows['objects']
            self._rows['objects'] += len(truth.labels)
            places = self.tracer.detection_places(i, found)
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
            rows.append((boxes, scores, labels))
            self._append(
                image=np.array([index], np.int32),
                size=np.array([result.ori_shape[:2]], np.int32),
                det_image=np.full(len(boxes), index, np.int32),
                det_box=boxes.astype(np.float32),
                det_score=scores.astype(np.float32),
                det_label=labels.astype(np.int32),
                det_level=places.level.numpy().astype(np.int32),
                det_match=np.where(matched >= 0, matched + first, matched),
                obj_image=np.full(len(truth.labels), index, np.int32),
                obj_box=truth.boxes,
                obj_label=truth.labels.astype(np.int32),
                obj_crowd=truth.crowd,
                obj_level=_main_level(owner, responsible.level.numpy(), len(truth.labels)),
            )
        detections, objects = Places.cat(detected), Places.cat(held)
        owner = np.concatenate(owners)
        for number, name in enumerate(self.tracer.layers):
            decisions = self.tracer.decisions(name, len(indices))
            self._decisions(number, decisions, indices, results)
            unit, weights = self._behind(name, decisions, detections, indices)
            self._append(**{f'{number}/det_unit': unit, f'{number}/det_weights': weights})
            unit, weights = self._behind(name, decisions, objects, indices)
            self._links(number, owner, unit, objects.level.numpy(), weights)

    def _behind(
        self, name: str, decisions: Decisions | None, places: Places, indices: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        experts = self.tracer.layers[name].num_experts
        unit = np.full(len(places), -1, np.int64)
        weights = np.full((len(places), experts), np.nan, np.float32)
        if decisions is not None:
            items = self.tracer.items(name, places).numpy()
            known = items >= 0
            unit[known] = _units(decisions, indices)[items[known]]
            weights[known] = decisions.weights.numpy()[items[known]]
        return unit, weights

    def _links(
        self,
        number: int,
        owner: np.ndarray,
        unit: np.ndarray,
        level: np.ndarray,
        weights: np.ndarray,
    ) -> None:
        """Every object counts 1, in equal parts for the places behind it that are known."""
        known = unit >= 0
        owner, unit, level, weights = (x[known] for x in (owner, unit, level, weights))
        keys = np.stack([owner, unit, level], axis=1).astype(np.int64)
        merged, first, places = np.unique(keys, axis=0, return_index=True, return_counts=True)
        places = places.astype(np.float64)
        _, which = np.unique(merged[:, 0], return_inverse=True)
        total = np.bincount(which, weights=places)
        self._append(
            **{
                f'{number}/link_object': merged[:, 0],
                f'{number}/link_unit': merged[:, 1],
                f'{number}/link_level': merged[:, 2].astype(np.int32),
                f'{number}/link_share': places / total[which] if len(merged) else places,
                f'{number}/link_weights': weights[first],
            }
        )

    # Classifiers ---------------------------------------------------------------------------------

    def _classifications(self, indices: list[int], results: list) -> None:
        first = self._rows['objects']
        self._rows['objects'] += len(indices)
        scores = torch.stack([r.pred_score for r in results]).float().cpu()
        prediction = scores.argmax(1)
        images = np.array(indices, np.int32)
        shapes = [
            (result.metainfo.get('ori_shape') or self.data.image_size(index))[:2]
            for index, result in zip(indices, results, strict=True)
        ]
        labels = np.array([self.data.label(index) for index in indices], np.int32)
        self._append(
            image=images,
            size=np.array(shapes, np.int32),
            label=labels,
            prediction=prediction.numpy().astype(np.int32),
            score=scores.amax(1).numpy(),
        )
        if self.data.clusters is not None:
            clusters = [self.data.cluster(index) for index in indices]
            self._append(cluster=np.array(clusters, np.int32))
        for number, name in enumerate(self.tracer.layers):
            decisions = self.tracer.decisions(name, len(indices))
            kept = self._decisions(number, decisions, indices, results)
            if decisions is None:
                continue
            image = decisions.image.numpy()[kept]
            self._links(
                number, first + image, _units(decisions, indices)[kept],
                np.full(len(kept), -1), decisions.weights.numpy()[kept],
            )  # fmt: skip

    # Decisions -----------------------------------------------------------------------------------

    def _decisions(
        self, number: int, decisions: Decisions | None, indices: list[int], results: list
    ) -> np.ndarray:
        """Keep the decisions of one layer; returns which of them, int64 (kept,)."""
        if decisions is None:
            return np.zeros(0, np.int64)
        image = decisions.image.numpy()
        kept = np.arange(len(image))
        counts = np.bincount(image, minlength=len(indices))
        if counts.max(initial=0) > MAX_DECISIONS:
            chosen = []
            for i, index in enumerate(indices):
                mine = kept[image == i]
                if len(mine) > MAX_DECISIONS:
                    rng = np.random.default_rng([index, number])
                    mine = np.sort(rng.choice(mine, MAX_DECISIONS, replace=False))
                chosen.append(mine)
            kept = np.concatenate(chosen)
        self._append(
            **{
                f'{number}/dec_image': np.array(indices, np.int32)[image[kept]],
                f'{number}/dec_unit': _units(decisions, indices)[kept],
                f'{number}/dec_level': decisions.level.numpy()[kept].astype(np.int32),
                f'{number}/dec_centre': _on_images(decisions, results)[kept],
                f'{number}/dec_weights': decisions.weights.numpy()[kept],
            }
        )
        return kept


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


def _units(decisions: Decisions, indices: list[int]) -> np.ndarray:
    image = np.array(indices, np.int64)[decisions.image.numpy()]
    return (image << _ITEM_BITS) | decisions.code.numpy()
