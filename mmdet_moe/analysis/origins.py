"""Where in the network the outputs of a head come from: the level and cell, or the RoI."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

#: Field of ``pred_instances``: float64 (n, 4), see :class:`Places`.
PLACE_FIELD = 'moe_places'
UNKNOWN = -1


@dataclass
class Places:
    """Where in the network n outputs come from.

    Attributes:
        image: int64 (n,), index in the batch.
        level: int64 (n,), pyramid level; -1 where unknown.
        x: float64 (n,), from 0 to 1 over the width of the padded network input.
        y: float64 (n,), the same over its height.
        roi: int64 (n,), index of the RoI in the batch; -1 without.
    """

    image: Tensor
    level: Tensor
    x: Tensor
    y: Tensor
    roi: Tensor

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def unpack(cls, image: int, packed: Tensor) -> 'Places':
        """From the field of one image's instances, (n, 4): level, x, y, RoI."""
        level, x, y, roi = packed.double().cpu().unbind(1)
        return cls(torch.full_like(level, image).long(), level.long(), x, y, roi.long())

    @classmethod
    def cat(cls, parts: Sequence['Places']) -> 'Places':
        """One after the other."""
        names = ('image', 'level', 'x', 'y', 'roi')
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is another thing for a while."""
    had_own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def pack(level: Tensor, x: Tensor, y: Tensor, roi: Tensor) -> Tensor:
    return torch.stack([part.double() for part in (level, x, y, roi)], dim=1)


def _to_network(boxes: Tensor, meta: dict) -> Tensor:
    scale = boxes.new_tensor(list(meta['scale_factor']) * 2)
    return boxes * scale


class Origins:
    """A head whose detections do not tell where they come from, or a classifier."""

    num_levels: int | None = None
    rois: Places | None = None

    @contextmanager
    def carried(self) -> Iterator[None]:
        yield

    def of_objects(self, image: int, meta: dict, boxes: Tensor) -> tuple[Places, Tensor]:
        # Where the middle of the object is; layers that need a level take no part.
        height, width = meta['batch_input_shape']
        boxes = _to_network(boxes, meta)
        unknown = torch.full((len(boxes),), float(UNKNOWN))
        x, y = boxes[:, 0::2].mean(1) / width, boxes[:, 1::2].mean(1) / height
        places = Places.unpack(image, pack(unknown, x, y, unknown))
        return places, torch.arange(len(boxes))


class PriorOrigins(Origins):
    """Of heads that predict for every prior of every pyramid level (RetinaNet, FCOS, …)."""

    def __init__(self, head: nn.Module) -> None:
        from mmdet.models.task_modules import MaxIoUAssigner
        from mmdet.models.task_modules.prior_generators import AnchorGenerator

        self.head = head
        self.num_levels = head.prior_generator.num_levels
        self._has_boxes = isinstance(head.prior_generator, AnchorGenerator)
        self._assigns = self._has_boxes and isinstance(
            getattr(head, 'assigner', None), MaxIoUAssigner
        )
        self._sizes: list[tuple[int, int]] = []
        self._inside: tuple[tuple, Tensor, Tensor] | None = None

    @contextmanager
    def carried(self) -> Iterator[None]:
        single = self.head._predict_by_feat_single
        with replaced(self.head, '_predict_by_feat_single', self._level_by_level(single)):
            yield

    def _level_by_level(self, single: Callable) -> Callable:
        """``_predict_by_feat_single`` that keeps the origin of each candidate until after NMS."""
        head, finish = self.head, self.head._bbox_post_process

        def predict(
            cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors, *args, **kwargs
        ) -> InstanceData:
            self._sizes = [tuple(scores.shape[-2:]) for scores in cls_score_list]
            arguments: dict = {}
            candidates = []
            decode = head.bbox_coder.decode

            def keep_candidates(results: InstanceData, **rest) -> InstanceData:
                arguments.update(rest)
                return results

            for level in range(len(cls_score_list)):
                seen: list[Tensor] = []

                def keep_priors(priors: Tensor, *rest, seen=seen, **named) -> Tensor:
                    seen.append(priors)
                    return decode(priors, *rest, **named)

                here = slice(level, level + 1)
                with (
                    replaced(head, '_bbox_post_process', keep_candidates),
                    replaced(head.bbox_coder, 'decode', keep_priors),
                ):
                    found = single(
                        cls_score_list[here], bbox_pred_list[here], score_factor_list[here],
                        mlvl_priors[here], *args, **kwargs,
                    )  # fmt: skip
                found.set_field(self._places(level, torch.cat(seen)), PLACE_FIELD)
                candidates.append(found)
            return finish(InstanceData.cat(candidates), **arguments)

        return predict

    def _places(self, level: int, priors: Tensor) -> Tensor:
        """float64 (n, 4) of the cells that priors of one level belong to."""
        stride = self.head.prior_generator.strides[level]
        stride_x, stride_y = (stride, stride) if isinstance(stride, int) else stride
        height, width = self._sizes[level]
        centre = (priors[:, :2] + priors[:, 2:4]) / 2 if self._has_boxes else priors[:, :2]
        # The middle of a cell, whether the head counts from its corner or from its middle.
        column = (centre[:, 0].double() / stride_x + 1e-3).floor()
        row = (centre[:, 1].double() / stride_y + 1e-3).floor()
        levels = torch.full_like(column, level)
        return pack(
            levels, (column + 0.5) / width, (row + 0.5) / height, torch.full_like(levels, UNKNOWN)
        )

    def _priors_inside(self, meta: dict, device: torch.device) -> tuple[Tensor, Tensor]:
        """The anchors that training assigns, (n, 4), and the level of each, (n,)."""
        from mmdet.models.task_modules.prior_generators import anchor_inside_flags

        # The images of a batch, and often of a data set, have the same ones.
        key = (self._sizes, meta['pad_shape'], meta['img_shape'])
        if self._inside is None or self._inside[0] != key:
            head = self.head
            anchors, valid = head.get_anchors(self._sizes, [meta], device=device)
            inside = [
                anchor_inside_flags(a, v, meta['img_shape'][:2], head.train_cfg['allowed_border'])
                for a, v in zip(anchors[0], valid[0], strict=True)
            ]
            priors = [a[i] for a, i in zip(anchors[0], inside, strict=True)]
            of_level = [torch.full((len(p),), level) for level, p in enumerate(priors)]
            self._inside = (key, torch.cat(priors), torch.cat(of_level))
        return self._inside[1:]

    def of_objects(self, image: int, meta: dict, boxes: Tensor) -> tuple[Places, Tensor]:
        if not self._assigns:
            return super().of_objects(image, meta, boxes)
        head = self.head
        device = next(head.parameters()).device
        boxes = _to_network(boxes, meta).to(device)
        priors, of_level = self._priors_inside(meta, device)
        labels = torch.zeros(len(boxes), dtype=torch.long, device=device)
        assigned = head.assigner.assign(
            InstanceData(priors=priors), InstanceData(bboxes=boxes, labels=labels)
        ).gt_inds.cpu()
        chosen = (assigned > 0).nonzero().flatten()
        taken, levels = priors[chosen.to(device)].cpu(), of_level[chosen]
        packed = [self._places(level, taken[levels == level]) for level in range(self.num_levels)]
        # Priors are ordered by level, so the parts are in the order of `chosen`.
        return Places.unpack(image, torch.cat(packed)), assigned[chosen] - 1


class RoIOrigins(Origins):
    """Of a standard RoI head with one box head (Faster R-CNN)."""

    def __init__(self, roi_head: nn.Module) -> None:
        self.roi_head = roi_head
        self.num_levels = roi_head.bbox_roi_extractor.num_inputs
        self._boxes: Tensor | None = None  # of all RoIs of the batch, network px

    @contextmanager
    def carried(self) -> Iterator[None]:
        head = self.roi_head.bbox_head
        offset = 0
        predict, single = head.predict_by_feat, head._predict_by_feat_single
        nothing = torch.zeros(0)

        def predict_by_feat(rois, cls_scores, bbox_preds, batch_img_metas, **kwargs):
            nonlocal offset
            offset = 0
            every = torch.cat(list(rois))
            self._boxes = every[:, 1:].cpu()
            level = self._levels(every)
            self.rois = Places(
                every[:, 0].long().cpu(), level, *self._middle(self._boxes, batch_img_metas[0]),
                torch.arange(len(every)),
            )  # fmt: skip
            return predict(rois, cls_scores, bbox_preds, batch_img_metas, **kwargs)

        def predict_single(
            roi, cls_score, bbox_pred, img_meta, rescale=False, rcnn_test_cfg=None
        ) -> InstanceData:
            nonlocal offset
            start, offset = offset, offset + len(roi)
            given = dict(
                roi=roi, cls_score=cls_score, bbox_pred=bbox_pred, img_meta=img_meta,
                rescale=rescale,
            )  # fmt: skip
            if rcnn_test_cfg is None or len(roi) == 0:
                results = single(**given, rcnn_test_cfg=rcnn_test_cfg)
                if rcnn_test_cfg is not None:
                    results.set_field(pack(*[nothing] * 4), PLACE_FIELD)
                return results
            raw = single(**given, rcnn_test_cfg=None)
            results, index = _suppress(raw, rcnn_test_cfg)
            index = index.cpu() + start
            level = self.rois.level[index]
            x, y = self.rois.x[index], self.rois.y[index]
            results.set_field(pack(level, x, y, index).to(results.bboxes.device), PLACE_FIELD)
            return results

        self.rois = None
        with (
            replaced(head, 'predict_by_feat', predict_by_feat),
            replaced(head, '_predict_by_feat_single', predict_single),
        ):
            yield

    def _levels(self, rois: Tensor) -> Tensor:
        extractor = self.roi_head.bbox_roi_extractor
        if not hasattr(extractor, 'map_roi_levels'):
            return torch.full((len(rois),), UNKNOWN)
        return extractor.map_roi_levels(rois, self.num_levels).cpu()

    @staticmethod
    def _middle(boxes: Tensor, meta: dict) -> tuple[Tensor, Tensor]:
        height, width = meta['batch_input_shape']
        boxes = boxes.double()
        return boxes[:, 0::2].mean(1) / width, boxes[:, 1::2].mean(1) / height

    def of_objects(self, image: int, meta: dict, boxes: Tensor) -> tuple[Places, Tensor]:
        from mmdet.models.task_modules import MaxIoUAssigner

        empty = Places.unpack(image, torch.zeros(0, 4))
        if self.rois is None:  # no proposal in the whole batch
            return empty, torch.zeros(0, dtype=torch.long)
        mine = (self.rois.image == image).nonzero().flatten()
        assigner = getattr(self.roi_head, 'bbox_assigner', None)
        if assigner is None:
            assigner = MaxIoUAssigner(0.5, 0.5, match_low_quality=False)
        assigned = assigner.assign(
            InstanceData(priors=self._boxes[mine]),
            InstanceData(
                bboxes=_to_network(boxes, meta), labels=torch.zeros(len(boxes), dtype=torch.long)
            ),
        ).gt_inds
        chosen = (assigned > 0).nonzero().flatten()
        index = mine[chosen]
        rois = self.rois
        places = Places(rois.image[index], rois.level[index], rois.x[index], rois.y[index], index)
        return places, assigned[chosen] - 1


def _suppress(raw: InstanceData, cfg: dict) -> tuple[InstanceData, Tensor]:
    """NMS as the box head does it, and the RoI (n,) that every detection comes from."""
    from mmdet.models.layers import multiclass_nms

    num_classes = raw.scores.shape[1] - 1
    # (n, 4) boxes that all classes share, or (n, classes · 4).
    box_dim = (
        raw.bboxes.shape[1] if raw.bboxes.shape[1] <= 5 else raw.bboxes.shape[1] // num_classes
    )
    dets, labels, index = multiclass_nms(
        raw.bboxes, raw.scores, cfg.score_thr, cfg.nms, cfg.max_per_img, box_dim=box_dim,
        return_inds=True,
    )  # fmt: skip
    results = InstanceData(bboxes=dets[:, :-1], scores=dets[:, -1], labels=labels)
    return results, index // num_classes


def origins_of(model: nn.Module) -> Origins:
    if hasattr(model, 'roi_head'):
        from mmdet.models.roi_heads import StandardRoIHead
        from mmdet.models.roi_heads.bbox_heads import BBoxHead

        head = getattr(model.roi_head, 'bbox_head', None)
        if (
            type(model.roi_head).predict_bbox is StandardRoIHead.predict_bbox
            and isinstance(head, BBoxHead)
            and type(head)._predict_by_feat_single is BBoxHead._predict_by_feat_single
        ):
            return RoIOrigins(model.roi_head)
    elif hasattr(model, 'bbox_head'):
        from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

        head = model.bbox_head
        # Heads with a way of their own (GFL) may count the levels that they are given.
        if all(
            getattr(type(head), name, None) is getattr(BaseDenseHead, name)
            for name in ('predict_by_feat', '_predict_by_feat_single')
        ):
            return PriorOrigins(head)
    return Origins()
