"""The analysis of one model on one data set: the passes over the images.

1. The statistics pass predicts every image once and records detections, objects and decisions.
2. The interventions predict every image again with changed decisions, features shared where no
   changed layer comes before them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_moe.analysis.attribution import Tracer, replaced
from mmdet_moe.analysis.controls import RandomRouters
from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.interventions import (
    ALL,
    MANY_EXPERTS,
    Intervention,
    applied,
    experts_remembered,
    interventions_on,
    versions,
)
from mmdet_moe.analysis.recorder import Recorder, predictions_of
from mmdet_moe.analysis.records.contents import (
    BoxRecords,
    ChangedClassRecords,
    ClassifierRecords,
    DetectorRecords,
    concatenated,
)
from mmdet_moe.analysis.records.files import RecordFiles
from mmdet_moe.analysis.statistics.similarity import expert_similarity

#: Raise it whenever the records of the same analysis would have other contents.
RECORD_FORMAT = 7
#: Images in one file of records: what an interruption costs at most.
IMAGES_PER_FILE = 64
# Enough to tell a layer's items from images; they are predicted once more with all others.
_FIRST_IMAGES = 2
Progress = Callable[[int], None]


class Study:
    """Model, data and records of one analysis.

    Args:
        model: In evaluation mode, on its device.
        data: The data set.
        folder: Where the records go.
        plan: What identifies this analysis, see :class:`RecordFiles`.
        score_thr: Detections below it count for AP alone.
        overwrite: Replace the records of another analysis.

    Attributes:
        plan: What identifies the analysis, its layers and images included.
        left_out: Layers whose decisions belong to no image that is known, with the reasons.
        order: Names of the layers in the order in which the model runs them.
        records: What the statistics pass left, see
            :mod:`~mmdet_moe.analysis.records.contents`.

    Raises:
        ConfigError: If the model has no layer of experts, or none that can be analysed, or the
            folder belongs to another analysis.
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
        plan = {**plan, 'format': RECORD_FORMAT}
        left_out = folder / 'left_out.json'
        self.left_out, self.order = self._leave_out(left_out, plan)
        known = {'plan': plan, 'left_out': self.left_out, 'order': self.order}
        content = json.dumps(known).encode()
        images = len(data) if data.is_whole else data.chosen
        plan = {**plan, 'layers': list(self.layers), 'images': images}
        kind = DetectorRecords if self.is_detector else ClassifierRecords
        self.records = RecordFiles(kind, folder / 'statistics', plan, overwrite)
        self.plan, self._folder, self._overwrite = plan, folder, overwrite
        write_file(left_out, content)  # the folder is that of this analysis

    def _leave_out(self, path: Path, plan: dict) -> tuple[dict[str, str], list[str]]:
        """Take out layers whose decisions belong to no known image, and the order of the others;
        told by the first images.
        """
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get('plan') == plan and 'order' in kept:
            for name in kept['left_out']:
                del self.layers[name]
            return kept['left_out'], kept['order']
        size = min(_FIRST_IMAGES, self.data.loader_cfg.get('batch_size', 1))
        with self.tracer:
            batch = next(self.data.batches(batch_size=size, num_workers=0))
            results = self.tracer.predict(batch)
        left_out = self.tracer.leave_out_unknown(len(results))
        order = self.tracer.order
        # A head of masks is not run for images in which nothing is found.
        return left_out, [*order, *(name for name in self.layers if name not in order)]

    @property
    def is_detector(self) -> bool:
        """Whether the model predicts boxes."""
        return self.tracer.is_detector

    @cached_property
    def controls(self) -> dict[str, RandomRouters]:
        """By layer: routers with random weights, the same ones in every run."""
        drawn = {name: RandomRouters.of(layer, name) for name, layer in self.layers.items()}
        return {name: routers for name, routers in drawn.items() if routers is not None}

    @cached_property
    def interventions(self) -> list[Intervention]:
        """All that are made; to be asked for after the statistics pass, which tells who is zeroed.

        Of a layer with more than :data:`~mmdet_moe.analysis.interventions.MANY_EXPERTS` experts all
        are zeroed where only the head of a classifier has to be run for each, and else so many:
        those with the most weight.
        """
        many = {
            name: number
            for number, (name, layer) in enumerate(self.layers.items())
            if layer.num_experts > MANY_EXPERTS and (self.is_detector or not _is_in_head(name))
        }
        weight = dict.fromkeys(many, 0)
        for part in self.records if many else ():
            for name, number in many.items():
                weight[name] += np.nansum(part.layers[number].decisions.weights, 0, np.float64)
        most = {name: np.argsort(-np.array(w), kind='stable') for name, w in weight.items()}
        zeroed = {name: sorted(order[:MANY_EXPERTS].tolist()) for name, order in most.items()}
        return interventions_on(self.layers, zeroed)

    @cached_property
    def changed(self) -> RecordFiles[list[BoxRecords] | ChangedClassRecords]:
        """What the interventions left: the boxes with each of :attr:`interventions`, or classes."""
        kind = list[BoxRecords] if self.is_detector else ChangedClassRecords
        made = [asdict(intervention) for intervention in self.interventions]
        plan = {**self.plan, 'interventions': made}
        return RecordFiles(kind, self._folder / 'interventions', plan, self._overwrite)

    # Passes --------------------------------------------------------------------------------------

    def record(self, progress: Progress = lambda images: None) -> None:
        """The statistics pass, from where it stopped.

        Args:
            progress: Told the number of images that are done, after each batch.
        """
        recorder = Recorder(self.tracer, self.data)
        self.tracer.controls = self.controls
        with self.tracer:
            for first, batches in self._chunks(self.records, progress):
                try:
                    for indices, batch in batches:
                        recorder.add(indices, self.tracer.predict(batch))
                        progress(len(indices))
                finally:  # an image that cannot be read costs none of those before it
                    if recorder.num_images:
                        end = first + recorder.num_images
                        self.records.write(first, end, recorder.take())

    @torch.no_grad()
    def intervene(self, progress: Progress = lambda images: None) -> None:
        """Predict every image with every intervention, from where it stopped."""
        if not self.interventions:
            return
        for first, batches in self._chunks(self.changed, progress):
            done = []
            try:
                for indices, batch in batches:
                    done.append((indices[-1] + 1, self._changed(indices, batch)))
                    progress(len(indices))
            finally:
                if done:
                    ends, parts = zip(*done, strict=True)
                    self.changed.write(first, ends[-1], concatenated(parts))

    def compare_experts(self) -> dict[str, dict]:
        """How alike the experts of each layer are, unless an earlier run has found out."""
        path = self._folder / 'similarity.json'
        try:
            kept = json.loads(path.read_bytes())
        except (OSError, ValueError):  # not there yet, or damaged
            kept = None
        if not isinstance(kept, dict) or kept.get('plan') != self.plan:
            found = expert_similarity(self.model, self.layers, self.data)
            kept = {'plan': self.plan, 'layers': found}
            write_file(path, json.dumps(kept).encode())
        return kept['layers']

    def _changed(self, indices: list[int], batch: dict) -> list[BoxRecords] | ChangedClassRecords:
        """The predictions for one batch, with each intervention."""
        data, found = self.model.data_preprocessor(batch, False), []
        features = _Features(self.model, data['inputs'])
        with experts_remembered(self.model, self.layers):
            for number, intervention in enumerate(self.interventions):
                changed = [name for name in self.layers if intervention.layer in (name, ALL)]
                shared = nullcontext()
                # No changed layer stands before the features.
                if all(map(_is_in_head, changed)):
                    shared = replaced(self.model, 'extract_feat', features)
                with applied(intervention, self.layers, (number, indices[0])), shared:
                    found.append(predictions_of(indices, self.model(**data, mode='predict')))
        return found if self.is_detector else ChangedClassRecords(np.stack(found, axis=1))

    def _chunks(
        self, records: RecordFiles, progress: Progress
    ) -> Iterator[tuple[int, Iterator[tuple[list[int], dict]]]]:
        """What is still to do: (first image, batches) of each file of records."""
        done, total = records.num_images, len(self.data)
        progress(done)
        if done == total:
            return
        batches = self.data.batches(range(done, total))
        size = self.data.loader_cfg.get('batch_size', 1)
        per_file = max(1, IMAGES_PER_FILE // size) * size
        for first in range(done, total, per_file):
            end = min(first + per_file, total)
            starts = range(first, end, size)
            yield (
                first,
                ((list(range(start, min(start + size, end))), next(batches)) for start in starts),
            )


def _is_in_head(layer: str) -> bool:
    """Whether a layer of that name stands behind what ``extract_feat`` gives."""
    return layer.split('.')[0].endswith('head')


class _Features:
    """Stands in for a model's ``extract_feat``: what it gives for one input is computed once."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._compute = model.extract_feat
        self._inputs = inputs
        self._known, self._versions = None, []

    def __call__(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        if inputs is not self._inputs or args or kwargs:  # another stage, which may hold experts
            return self._compute(inputs, *args, **kwargs)
        # The head may have changed in place what it was given.
        if self._known is None or versions(self._known) != self._versions:
            self._known = self._compute(inputs)
            self._versions = versions(self._known)
        return self._known
