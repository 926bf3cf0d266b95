"""Heads that predict for every RoI."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.task_modules import MaxIoUAssigner
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_moe.analysis.attribution.places import (
    PLACE_FIELD,
    UNKNOWN,
    Origins,
    Places,
    implements,
    middle,
    replaced,
    to_network,
)
from mmdet_moe.moe.items import Items


def _last(stages: nn.Module) -> nn.Module:
    return stages[-1] if isinstance(stages, (nn.ModuleList, list)) else stages


class RoIOrigins(Origins):
    """Of Faster, Mask and Cascade R-CNN.

    The RoIs of a cascade keep their order from stage to stage; where they are, and on which level,
    is that of the last stage, which makes the boxes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.roi_head = model.roi_head
        self.bbox_head = _last(model.roi_head.bbox_head)
        self.extractor = _last(model.roi_head.bbox_roi_extractor)
        self.num_levels = self.extractor.num_inputs
        self._boxes: Tensor | None = None  # of all RoIs of the batch, network px

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        roi_head = getattr(model, 'roi_head', None)
        if not implements(roi_head, 'predict_bbox', StandardRoIHead, CascadeRoIHead):
            return False
        head = _last(roi_head.bbox_head)
        names = ('predict_by_feat', '_predict_by_feat_single')
        return all(implements(head, name, BBoxHead) for name in names)

    @contextmanager
    def carried(self) -> Iterator[None]:
        head, module = self.bbox_head, sys.modules[BBoxHead.__module__]
        predict, single = head.predict_by_feat, head._predict_by_feat_single
        suppress, offset = module.multiclass_nms, 0

        def predict_by_feat(rois, cls_scores, bbox_preds, batch_img_metas, **named):
            nonlocal offset
            offset = 0
            every = torch.cat(list(rois))
            self._boxes = every[:, 1:].cpu()
            x, y = middle(self._boxes, batch_img_metas[0])
            unknown = torch.full((len(every),), UNKNOWN)
            self.sources = Places(
                every[:, 0].long().cpu(), self._levels(every), x, y, torch.arange(len(every)),
                unknown,
            )  # fmt: skip
            return predict(rois, cls_scores, bbox_preds, batch_img_metas, **named)

        def predict_single(roi, *args, **named) -> InstanceData:
            nonlocal offset
            taken = torch.zeros(0, dtype=torch.long)

            def multiclass_nms(boxes, scores, *rest, **options):
                nonlocal taken
                *found, kept = suppress(boxes, scores, *rest, return_inds=True, **options)
                taken = (kept // (scores.shape[1] - 1)).cpu() + offset
                return tuple(found)

            with replaced(module, 'multiclass_nms', multiclass_nms):
                results = single(roi, *args, **named)
            offset += len(roi)
            if 'labels' in results:  # not the raw scores for test-time augmentation
                p = self.sources[taken]
                packed = Places.pack(p.level, p.x, p.y, p.source)
                results.set_field(packed.to(results.bboxes.device), PLACE_FIELD)
            return results

        with (
            replaced(head, 'predict_by_feat', predict_by_feat),
            replaced(head, '_predict_by_feat_single', predict_single),
        ):
            yield

    def owner(self, name: str, part: int, items: Items, count: int, detections: int) -> str | None:
        # A layer that serves the masks as well is called for the boxes first.
        if part > 0 or not name.startswith('roi_head.'):
            return None
        if name.startswith('roi_head.mask_head.'):
            return 'detection' if count == detections * len(items) else None
        return 'source' if count == len(self.sources) * len(items) else None

    def _levels(self, rois: Tensor) -> Tensor:
        if not hasattr(self.extractor, 'map_roi_levels'):
            return torch.full((len(rois),), UNKNOWN)
        return self.extractor.map_roi_levels(rois, self.num_levels).cpu()

    def of_objects(
        self, image: int, meta: dict, boxes: Tensor, labels: Tensor | None = None
    ) -> tuple[Places, Tensor]:
        if self.sources is None:  # no proposal in the whole batch
            return Places.unknown(image, 0), torch.zeros(0, dtype=torch.long)
        mine = (self.sources.image == image).nonzero().flatten()
        assigner = getattr(self.roi_head, 'bbox_assigner', None)
        if not assigner:
            assigner = MaxIoUAssigner(0.5, 0.5, match_low_quality=False)
        assigned = (
            _last(assigner)
            .assign(
                InstanceData(priors=self._boxes[mine]),
                InstanceData(
                    bboxes=to_network(boxes, meta), labels=torch.zeros(len(boxes), dtype=torch.long)
                ),
            )
            .gt_inds
        )
        chosen = (assigned > 0).nonzero().flatten()
        return self.sources[mine[chosen]], assigned[chosen] - 1
