"""Transformers, which predict for every query."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.dense_heads import DeformableDETRHead, DETRHead
from mmdet.models.detectors import DETR, DINO, DeformableDETR
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmdet_moe.analysis.attribution.places import (
    PLACE_FIELD,
    UNKNOWN,
    Origins,
    Places,
    Remembering,
    implements,
    middle,
    replaced,
    to_network,
)
from mmdet_moe.moe.items import Items, Tokens


class QueryOrigins(Origins):
    """Of DETR, Deformable DETR, DINO and detectors with the decoding of one of them.

    With proposals (two stages) a query comes from the token of the encoder whose score selected it:
    a cell of a level. Without, a query is learnt and comes from no token: its level is unknown and
    its place is the middle of its box.
    """

    has_queries = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._has_proposals = implements(model, 'pre_decoder', DeformableDETR, DINO) and (
            model.as_two_stage
        )
        self.num_levels = model.num_feature_levels if self._has_proposals else None
        self._sizes: list[tuple[int, int]] = []
        self._proposals: Tensor | None = None  # int64 (images, queries), numbers of tokens
        self._predicted: dict[int, tuple[Tensor, Tensor]] = {}  # logits and boxes of each image

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        head = getattr(model, 'bbox_head', None)
        return (
            implements(model, 'pre_transformer', DETR, DeformableDETR)
            and implements(head, 'predict_by_feat', DETRHead, DeformableDETRHead)
            and implements(head, '_predict_by_feat_single', DETRHead)
        )

    @contextmanager
    def carried(self) -> Iterator[None]:
        model, head = self.model, self.model.bbox_head
        pre_transformer, pre_decoder = model.pre_transformer, model.pre_decoder
        predict_by_feat, single = head.predict_by_feat, head._predict_by_feat_single
        images: list[Places] = []

        def keep_sizes(features, *args, **named):
            # DETR's tokens are the cells of the last map, the others' those of all of them.
            of_all = implements(model, 'pre_transformer', DeformableDETR)
            sizes = [tuple(level.shape[-2:]) for level in features]
            self._sizes = sizes if of_all else sizes[-1:]
            return pre_transformer(features, *args, **named)

        def keep_proposals(memory, *args, **named):
            if not self._has_proposals:
                return pre_decoder(memory, *args, **named)
            with _Selected(memory.shape[:2]) as selected:
                outputs = pre_decoder(memory, *args, **named)
            self._proposals = selected.indices.cpu()
            return outputs

        def predict(*args, **named):
            images.clear()
            results = predict_by_feat(*args, **named)
            self.sources = Places.cat(images)
            return results

        def predict_single(cls_score, bbox_pred, img_meta, *args, **named) -> InstanceData:
            rows = Remembering(bbox_pred)
            results = single(cls_score, rows, img_meta, *args, **named)
            packed = self._places(len(images), bbox_pred.cpu(), img_meta)
            self._predicted[len(images)] = (cls_score, bbox_pred)
            images.append(Places.unpack(len(images), packed))
            packed = packed[rows.taken.cpu()].to(results.bboxes.device)
            results.set_field(packed, PLACE_FIELD)
            return results

        with (
            replaced(model, 'pre_transformer', keep_sizes),
            replaced(model, 'pre_decoder', keep_proposals),
            replaced(head, 'predict_by_feat', predict),
            replaced(head, '_predict_by_feat_single', predict_single),
        ):
            yield

    def _places(self, image: int, boxes: Tensor, meta: dict) -> Tensor:
        """(queries, 4) of one image; boxes are cx, cy, w, h relative to it without padding."""
        source = torch.arange(len(boxes)) + image * len(boxes)
        if not self._has_proposals:
            height, width = meta['img_shape'][:2]
            centre = boxes[:, :2].repeat(1, 2) * boxes.new_tensor([width, height] * 2)
            return Places.pack(torch.full_like(source, UNKNOWN), *middle(centre, meta), source)
        token, level = self._proposals[image], torch.zeros_like(source)
        x, y = torch.zeros_like(source).double(), torch.zeros_like(source).double()
        first = 0
        for i, (height, width) in enumerate(self._sizes):
            cell = token - first
            here = (cell >= 0) & (cell < height * width)
            level[here] = i
            x[here] = (cell[here] % width + 0.5).double() / width
            y[here] = (cell[here] // width + 0.5).double() / height
            first += height * width
        return Places.pack(level, x, y, source)

    def outputs(self, features: list[Tensor], samples: list) -> list[Tensor]:
        kinds = self.model.bbox_head(**self.model.forward_transformer(features, samples))
        return [sum(layers[-1].sum() for layers in kinds)]

    def owner(self, name: str, part: int, items: Items, count: int, detections: int) -> str | None:
        if not isinstance(items, Tokens) or name.startswith(('backbone.', 'neck.', 'encoder.')):
            return None
        images = int(self.sources.image[-1]) + 1
        # Of as many tokens as queries it is not known which of them they are.
        is_query = count == len(self.sources) != images * self._num_tokens
        return 'source' if is_query else None

    def token_sizes(self, name: str, tokens: int) -> list[tuple[int, int]] | None:
        if name.startswith(('backbone.', 'neck.')) or tokens != self._num_tokens:
            return None
        is_memory = name.startswith('encoder.') or tokens != self.model.num_queries
        return self._sizes if is_memory else None

    def of_objects(
        self, image: int, meta: dict, boxes: Tensor, labels: Tensor | None = None
    ) -> tuple[Places, Tensor]:
        assigner = getattr(self.model.bbox_head, 'assigner', None)
        if assigner is None or labels is None:
            return super().of_objects(image, meta, boxes)
        scores, predicted = self._predicted[image]
        height, width = meta['img_shape'][:2]
        predicted = bbox_cxcywh_to_xyxy(predicted) * predicted.new_tensor([width, height] * 2)
        matched = assigner.assign(
            InstanceData(scores=scores, bboxes=predicted),
            InstanceData(
                bboxes=to_network(boxes, meta).to(predicted), labels=labels.long().to(scores.device)
            ),
            img_meta=meta,
        ).gt_inds.cpu()
        queries = (matched > 0).nonzero().flatten()
        mine = (self.sources.image == image).nonzero().flatten()
        return self.sources[mine[queries]], matched[queries] - 1

    @property
    def _num_tokens(self) -> int:
        return sum(height * width for height, width in self._sizes)


class _Selected(TorchFunctionMode):
    """Remembers which tokens ``torch.topk`` selects from the scores of all of them."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.indices: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.topk and args[0].shape == self.shape:
            self.indices = result[1]
        return result
