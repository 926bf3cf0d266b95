"""The analysis of one model on one data set: the passes over the images.

1. The statistics pass predicts every image once and records detections, objects and decisions.
2. The interventions predict every image again with changed decisions, features shared where no
   changed layer comes before them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from mmengine.runner import Runner
from torch import nn

from mmdet_moe.analysis.attribution import Tracer, replaced
from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.interventions import (
    ALL,
    Intervention,
    applied,
    experts_remembered,
    interventions_on,
)
from mmdet_moe.analysis.recorder import Recorder, boxes_of
from mmdet_moe.analysis.records.contents import (
    BoxRecords,
    ClassifierRecords,
    DetectorRecords,
    concatenated,
)
from mmdet_moe.analysis.records.files import RecordFiles

#: Raise it whenever the records of the same analysis would have other contents.
RECORD_FORMAT = 3
#: Images in one file of records: what an interruption costs at most.
IMAGES_PER_FILE = 64
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
        left_out: Layers whose decisions belong to no image that is known, with the reasons.
        records: What the statistics pass left, see
            :mod:`~mmdet_moe.analysis.records.contents`.
        changed: What the interventions left: of each, in the order of ``interventions``, the boxes
            or (of a classifier, int32) the predicted classes.

    Raises:
        ConfigError: If the model has no MoE layer, or none that can be analysed, or the folder
            belongs to another analysis.
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
        self.left_out = self._leave_out(left_out, plan)
        content = json.dumps({'plan': plan, 'left_out': self.left_out}).encode()
        plan = {**plan, 'layers': list(self.layers), 'images': len(data)}
        of_pass, of_intervention = (
            (DetectorRecords, BoxRecords) if self.is_detector else (ClassifierRecords, np.ndarray)
        )
        self.records = RecordFiles(of_pass, folder / 'statistics', plan, overwrite)
        self.interventions = interventions_on(self.layers)
        plan['interventions'] = [asdict(intervention) for intervention in self.interventions]
        self.changed = RecordFiles(list[of_intervention], folder / 'interventions', plan, overwrite)
        write_file(left_out, content)  # the folder is that of this analysis

    def _leave_out(self, path: Path, plan: dict) -> dict[str, str]:
        """Take out layers whose decisions belong to no known image; told by one batch."""
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get('plan') == plan:
            for name in kept['left_out']:
                del self.layers[name]
            return kept['left_out']
        with self.tracer:
            results = self.tracer.predict(next(self._batches(0, num_workers=0)))
        return self.tracer.leave_out_unknown(len(results))

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
            for first, end, batches in self._chunks(self.records, progress):
                for indices, batch in batches:
                    recorder.add(indices, self.tracer.predict(batch))
                    progress(len(indices))
                self.records.write(first, end, recorder.take())

    @torch.no_grad()
    def intervene(self, progress: Progress = lambda images: None) -> None:
        """Predict every image with every intervention, from where it stopped."""
        if not self.interventions:
            return
        for first, end, batches in self._chunks(self.changed, progress):
            parts = []
            for indices, batch in batches:
                parts.append(self._changed(indices, batch))
                progress(len(indices))
            self.changed.write(first, end, concatenated(parts))

    def _changed(self, indices: list[int], batch: dict) -> list[BoxRecords | np.ndarray]:
        """The predictions for one batch, with each intervention."""
        data, found = self.model.data_preprocessor(batch, False), []
        features = cache(partial(self.model.extract_feat, data['inputs']))
        with experts_remembered(self.model, self.layers):
            for number, intervention in enumerate(self.interventions):
                shared = nullcontext()
                if self._is_in_head(intervention):
                    shared = replaced(self.model, 'extract_feat', lambda _: features())
                with applied(intervention, self.layers, (number, indices[0])), shared:
                    found.append(self._predictions(indices, self.model(**data, mode='predict')))
        return found

    def _is_in_head(self, intervention: Intervention) -> bool:
        """Whether no changed layer stands before the features."""
        changed = [name for name in self.layers if intervention.layer in (name, ALL)]
        return self.is_detector and all(name.split('.')[0].endswith('head') for name in changed)

    def _predictions(self, indices: list[int], results: list) -> BoxRecords | np.ndarray:
        if not self.is_detector:
            scores = torch.stack([result.pred_score for result in results])
            return scores.argmax(1).cpu().numpy().astype(np.int32)
        pairs = zip(indices, results, strict=True)
        return concatenated([boxes_of(index, result.pred_instances) for index, result in pairs])

    def _chunks(
        self, records: RecordFiles, progress: Progress
    ) -> Iterator[tuple[int, int, Iterator[tuple[list[int], dict]]]]:
        """What is still to do: (first image, end, batches) of each file of records."""
        done, total = records.num_images, len(self.data)
        progress(done)
        if done == total:
            return
        batches = self._batches(done)
        size = self.data.loader_cfg.get('batch_size', 1)
        per_file = max(1, IMAGES_PER_FILE // size) * size
        for first in range(done, total, per_file):
            end = min(first + per_file, total)
            starts = range(first, end, size)
            yield (
                first,
                end,
                ((list(range(start, min(start + size, end))), next(batches)) for start in starts),
            )

    def _batches(self, first: int, **options: int) -> Iterator[dict]:
        """The batches from an image on."""
        order = range(first, len(self.data))
        config = {**self.data.loader_cfg, 'dataset': self.data.dataset, 'sampler': order, **options}
        if options:
            config['persistent_workers'] = False
        return iter(Runner.build_dataloader(config))
