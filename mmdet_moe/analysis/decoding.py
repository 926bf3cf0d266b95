"""The end of an exported detector: from the maps of its head to boxes, scores and labels.

It is the head's own ``predict_by_feat``, with its priors and its coder, up to NMS. Three things in
it keep a graph from standing for other images and sizes, and are replaced for the time of a call:
the choice of the best candidates, whose number depends on the scores; the container of the results,
which counts them; and the clipping, which wants a size that is a number.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torchvision
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_moe.analysis.attribution.dense import PriorOrigins, YOLOXOrigins
from mmdet_moe.analysis.attribution.places import implements, replaced
from mmdet_moe.analysis.deployment import TOLERANCE, Network
from mmdet_moe.errors import ConfigError

#: The outputs, in this order: (n, 4) x1 y1 x2 y2 in pixels of the input, (n,), (n,) int64.
OUTPUTS = ['boxes', 'scores', 'labels']
_NMS = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}


class Detector(Network):
    """A detector of one stage up to its boxes, for one image.

    Args:
        model: The detector.

    Raises:
        ConfigError: For what does not decode as the toolbox's heads usually do, and for another NMS
            than the plain one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        _check(model)

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """As :data:`OUTPUTS`; ``images`` is one, (1, C, H, W)."""
        return detections(self.model.bbox_head, super().outputs(images), images.shape[2:])

    def names(self, outputs: Any) -> list[str]:
        """Of boxes, scores and labels."""
        return OUTPUTS

    def expected(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What the toolbox itself predicts."""
        sample = DetDataSample(metainfo={'img_shape': tuple(inputs.shape[2:])})
        features = self.model.extract_feat(self.prepared(inputs))
        (found,) = self.model.bbox_head.predict(features, [sample], rescale=False)
        return get_box_tensor(found.bboxes), found.scores, found.labels

    def differences(self, expected: Sequence[Tensor], found: Sequence[Tensor]) -> Iterator[float]:
        """One number; see :func:`difference`."""
        yield difference(self.model.bbox_head, expected, found, TOLERANCE)

    def about(self) -> dict[str, Any]:
        """What the outputs are, and how the boxes were chosen."""
        return {
            'outputs': 'boxes (n, 4) float32: x1 y1 x2 y2 in pixels of the input, filling included;'
            ' scores (n,) float32, falling; labels (n,) int64: numbers of classes',
            'test_cfg': dict(self.model.bbox_head.test_cfg),
        }


def detections(head: nn.Module, outputs: tuple, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """What a head detects in one image, in a form that exports.

    Args:
        head: That of a detector as :class:`Detector` takes it.
        outputs: What it gives for an image.
        size: Height and width of the image that the network was given.

    Returns:
        As :data:`OUTPUTS`, by falling score: of every class what its NMS left, all of it what
        ``model.predict`` gives for the same image.
    """
    cfg = head.test_cfg.copy()
    # YOLOX looks at neither.
    usual = implements(head, '_bbox_post_process', BaseDenseHead)
    least_side, most = cfg.pop('min_bbox_size', -1), cfg.get('max_per_img')
    with ExitStack() as stack:
        for module in {sys.modules[kind.__module__] for kind in type(head).__mro__}:
            for name, value in (('filter_scores_and_topk', _best), ('InstanceData', _Results)):
                if hasattr(module, name):
                    stack.enter_context(replaced(module, name, value))
        coder = getattr(head, 'bbox_coder', None)
        if hasattr(coder, 'clip_border'):
            stack.enter_context(replaced(coder, 'decode', _decoder(coder)))
        meta = {'img_shape': size}
        (found,) = head.predict_by_feat(*outputs, batch_img_metas=[meta], cfg=cfg, with_nms=False)
    boxes, scores, labels = get_box_tensor(found.bboxes), found.scores, found.labels
    kept = scores > 0  # see _best
    if usual and least_side >= 0:
        kept = kept & (boxes[:, 2:] - boxes[:, :2] > least_side).all(1)
    boxes, scores, labels = (values[kept.nonzero()[:, 0]] for values in (boxes, scores, labels))
    apart = boxes
    if not cfg.nms.get('class_agnostic', False):
        # Each class has a place of its own; by mmcv's formula, and also where there is no box.
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
        apart = boxes + (labels.to(boxes) * (largest + 1))[:, None]
    kept = torchvision.ops.nms(apart, scores, float(cfg.nms['iou_threshold']))
    if usual and most is not None:
        kept = kept[:most]
    return boxes[kept], scores[kept], labels[kept]


def difference(
    head: nn.Module, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float
) -> float:
    """How much two lists of detections differ at most, relative where numbers are larger than 1.

    A detection is compared with the nearest one of its class in the other list. Those whose score
    is as low as that of the last that may stay are not: rounding decides which of them do.

    Args:
        head: Its ``test_cfg`` says which may stay.
        expected: As :data:`OUTPUTS`.
        found: As ``expected``.
        tolerance: Scores closer than this are taken for equal.

    Returns:
        Infinity if a detection has no partner of its class.
    """
    cut = head.test_cfg.get('score_thr', 0)
    most = head.test_cfg.get('max_per_img')
    for boxes, scores, _ in (expected, found):
        if len(boxes) == most:
            cut = max(cut, scores.min().item())
    sides = [(torch.cat([b, s[:, None]], 1), s, labels) for b, s, labels in (expected, found)]
    largest = 0.0
    for (rows, scores, labels), (others, _, other_labels) in (sides, sides[::-1]):
        compared = scores > cut + tolerance
        if not compared.any():
            continue
        if not len(others):
            return float('inf')
        rows, labels = rows[compared][:, None], labels[compared][:, None]
        relative = ((others - rows).abs() / rows.abs().clamp(min=1)).amax(-1)
        nearest = relative.masked_fill(labels != other_labels, float('inf')).amin(1)
        largest = max(
            largest, nearest.nan_to_num(nan=float('inf'), posinf=float('inf')).max().item()
        )
    return largest


def _check(model: nn.Module) -> None:
    if not (PriorOrigins.fits(model) or YOLOXOrigins.fits(model)):
        head = getattr(model, 'bbox_head', None)
        decoder = f', with its {type(head).__name__},' if head is not None else ''
        raise ConfigError(
            '--boxes is for detectors of one stage that decode as RetinaNet, FCOS, ATSS, GFL, '
            f'TOOD, YOLOX, RTMDet and SSD do, which {type(model).__name__}{decoder} does not; '
            'export it without --boxes'
        )
    nms = dict((model.bbox_head.test_cfg or {}).get('nms') or {})
    if nms.get('type', 'nms') != 'nms' or 'iou_threshold' not in nms or set(nms) - _NMS:
        raise ConfigError(
            f'--boxes knows the plain NMS, not model.test_cfg.nms={nms}; set it to '
            "dict(type='nms', iou_threshold=0.5), or export without --boxes"
        )


def _best(scores: Tensor, score_thr: float, topk: int, results: dict) -> tuple:
    """MMDetection's ``filter_scores_and_topk``, whose results are as many for every image.

    A score that is too low is 0, which no score above the threshold is.
    """
    number = scores.shape[0] * scores.shape[1]
    if topk > 0:
        number = torch.sym_min(topk, number)
    flat = torch.where(scores > score_thr, scores, 0).flatten()
    best, index = flat.topk(number)
    prior, label = index // scores.shape[1], index % scores.shape[1]
    return best, label, prior, {name: values[prior] for name, values in results.items()}


class _Results(InstanceData):
    """Does not compare the lengths of what it is given: counting would fix them in the graph."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in ('_metainfo_fields', '_data_fields'):
            self._data_fields.add(name)


def _decoder(coder: Any) -> Any:
    """A coder's ``decode``, which clips with tensors."""
    decode = coder.decode

    def clipped(priors: Tensor, predicted: Tensor, max_shape: Any = None) -> Tensor:
        boxes = get_box_tensor(decode(priors, predicted))
        if max_shape is None or not coder.clip_border:
            return boxes
        height, width = (torch.scalar_tensor(side, dtype=boxes.dtype) for side in max_shape[:2])
        return torch.minimum(boxes.clamp(min=0), torch.stack([width, height] * 2))

    return clipped
