"""Heads that predict for every prior of every pyramid level."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead, TOODHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules import MaxIoUAssigner
from mmdet.models.task_modules.prior_generators import AnchorGenerator, anchor_inside_flags
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_moe.analysis.attribution.places import (
    PLACE_FIELD,
    UNKNOWN,
    Origins,
    Places,
    Remembering,
    implements,
    replaced,
    to_network,
)


class PriorOrigins(Origins):
    """Of heads with MMDetection's usual decoding: RetinaNet, FCOS, ATSS, GFL, TOOD, RTMDet, SSD."""

    def __init__(self, model: nn.Module) -> None:
        self.head = model.bbox_head
        self.num_levels = self.head.prior_generator.num_levels
        self._assigns = isinstance(self.head.prior_generator, AnchorGenerator) and isinstance(
            getattr(self.head, 'assigner', None), MaxIoUAssigner
        )
        self._sizes: list[tuple[int, int]] = []
        self._inside: tuple[tuple, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        head = getattr(model, 'bbox_head', None)
        return (
            implements(head, 'predict_by_feat', BaseDenseHead)
            and implements(head, '_predict_by_feat_single', BaseDenseHead, GFLHead, TOODHead)
            and implements(head, '_bbox_post_process', BaseDenseHead)
        )

    @contextmanager
    def carried(self) -> Iterator[None]:
        single = self.head._predict_by_feat_single

        def predict(cls_score_list, bbox_pred_list, score_factor_list, mlvl_priors, *args, **named):
            self._sizes = [tuple(scores.shape[-2:]) for scores in cls_score_list]
            priors = [Remembering(level) for level in mlvl_priors]

            def origins() -> Tensor:
                taken = [prior.taken for prior in priors]
                counts = torch.tensor([len(t) for t in taken])
                level = torch.arange(len(taken)).repeat_interleave(counts)
                return self._places(level, torch.cat(taken).cpu())

            with self._told(origins):
                return single(
                    cls_score_list, bbox_pred_list, score_factor_list, priors, *args, **named
                )

        with replaced(self.head, '_predict_by_feat_single', predict):
            yield

    def _told(self, origins: Callable[[], Tensor]) -> Any:
        """The candidates that go through NMS have their origins with them."""
        finish = self.head._bbox_post_process

        def post_process(results: InstanceData, **rest: Any) -> InstanceData:
            results.set_field(origins().to(results.bboxes.device), PLACE_FIELD)
            return finish(results=results, **rest)

        return replaced(self.head, '_bbox_post_process', post_process)

    def outputs(self, features: list[Tensor], samples: list) -> list[Tensor]:
        kinds = [kind for kind in self.head(features) if kind is not None]
        return [sum(part.sum() for part in level) for level in zip(*kinds, strict=True)]

    def _places(self, level: Tensor, priors: Tensor) -> Tensor:
        """(n, 4) of the cells that priors belong to, given by their number in the level."""
        height, width = torch.tensor(self._sizes)[level].unbind(1)
        cell = priors // torch.tensor(self.head.prior_generator.num_base_priors)[level]
        x, y = (cell % width + 0.5).double() / width, (cell // width + 0.5).double() / height
        return Places.pack(level, x, y, torch.full_like(level, UNKNOWN))

    def _priors_inside(self, meta: dict, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The anchors that training assigns, (n, 4), their levels, and their numbers there."""
        # The images of a batch, and often of a data set, have the same ones.
        key = (self._sizes, meta['pad_shape'], meta['img_shape'])
        if self._inside is None or self._inside[0] != key:
            head = self.head
            anchors, valid = head.get_anchors(self._sizes, [meta], device=device)
            border = head.train_cfg['allowed_border']
            inside = [
                anchor_inside_flags(a, v, meta['img_shape'][:2], border).nonzero().flatten()
                for a, v in zip(anchors[0], valid[0], strict=True)
            ]
            priors = torch.cat([a[i] for a, i in zip(anchors[0], inside, strict=True)])
            of_level = [torch.full((len(i),), level) for level, i in enumerate(inside)]
            self._inside = (key, priors, torch.cat(of_level), torch.cat(inside).cpu())
        return self._inside[1:]

    def of_objects(
        self, image: int, meta: dict, boxes: Tensor, labels: Tensor | None = None
    ) -> tuple[Places, Tensor]:
        if not self._assigns:
            return super().of_objects(image, meta, boxes)
        device = next(self.head.parameters()).device
        boxes = to_network(boxes, meta).to(device)
        priors, of_level, number = self._priors_inside(meta, device)
        labels = torch.zeros(len(boxes), dtype=torch.long, device=device)
        assigned = self.head.assigner.assign(
            InstanceData(priors=priors), InstanceData(bboxes=boxes, labels=labels)
        ).gt_inds.cpu()
        chosen = (assigned > 0).nonzero().flatten()
        packed = self._places(of_level[chosen], number[chosen])
        return Places.unpack(image, packed), assigned[chosen] - 1


class YOLOXOrigins(PriorOrigins):
    """Of YOLOX, which selects from the priors of all levels at once."""

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        names = ('predict_by_feat', '_bbox_decode', '_bbox_post_process')
        return all(implements(getattr(model, 'bbox_head', None), n, YOLOXHead) for n in names)

    @contextmanager
    def carried(self) -> Iterator[None]:
        predict, decode = self.head.predict_by_feat, self.head._bbox_decode
        images: list[Remembering] = []

        def predict_by_feat(cls_scores, *args, **named):
            self._sizes = [tuple(scores.shape[-2:]) for scores in cls_scores]
            return predict(cls_scores, *args, **named)

        def bbox_decode(priors: Tensor, bbox_preds: Tensor) -> list[Remembering]:
            images[:] = [Remembering(boxes) for boxes in decode(priors, bbox_preds)]
            return list(images)

        def origins() -> Tensor:
            taken = images.pop(0).taken.cpu()
            counts = [height * width for height, width in self._sizes]
            level = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[taken]
            number = torch.cat([torch.arange(count) for count in counts])[taken]
            return self._places(level, number)

        with (
            replaced(self.head, 'predict_by_feat', predict_by_feat),
            replaced(self.head, '_bbox_decode', bbox_decode),
            self._told(origins),
        ):
            yield
