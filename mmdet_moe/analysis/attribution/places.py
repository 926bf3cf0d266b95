"""Where in the network the outputs of a head come from: the level and cell, the RoI, the query."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from mmdet_moe.moe.items import Items

#: Field of ``pred_instances``: float64 (n, 4), see :meth:`Places.pack`.
PLACE_FIELD = 'moe_places'
UNKNOWN = -1
#: ``with replaced(owner, name, value)``: ``owner.name`` is another thing for a while.
replaced = patch.object


@dataclass
class Places:
    """Where in the network n outputs come from.

    Attributes:
        image: int64 (n,), index in the batch.
        level: int64 (n,), pyramid level; -1 where unknown.
        x: float64 (n,), from 0 to 1 over the width of the padded network input: the middle of the
            cell, of the RoI, or of the box of a query that no token proposed; NaN where unknown.
        y: float64 (n,), the same over its height.
        source: int64 (n,), index in the batch of the RoI or of the query; -1 without.
        detection: int64 (n,), index among the detections of the batch; -1 of what is none.
    """

    image: Tensor
    level: Tensor
    x: Tensor
    y: Tensor
    source: Tensor
    detection: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Tensor) -> 'Places':
        return Places(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def pack(level: Tensor, x: Tensor, y: Tensor, source: Tensor) -> Tensor:
        """float64 (n, 4): what travels with an image's instances."""
        return torch.stack([part.double() for part in (level, x, y, source)], dim=1)

    @classmethod
    def unpack(cls, image: int, packed: Tensor) -> 'Places':
        """From the field of one image's instances."""
        level, x, y, source = packed.double().cpu().unbind(1)
        unknown = torch.full_like(level, UNKNOWN).long()
        images = torch.full_like(unknown, image)
        return cls(images, level.long(), x, y, source.long(), unknown)

    @classmethod
    def unknown(cls, image: int, count: int) -> 'Places':
        """Of outputs that do not tell."""
        nothing = torch.full((count,), float(UNKNOWN))
        nowhere = torch.full((count,), torch.nan)
        return cls.unpack(image, cls.pack(nothing, nowhere, nowhere, nothing))

    @classmethod
    def cat(cls, parts: Sequence['Places']) -> 'Places':
        """One after the other."""
        return cls(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls))
        )


class Remembering:
    """Stands in for the rows that a head selects from, and remembers which ones it took."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.taken: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Any:
        self.taken = index.nonzero().flatten() if index.dtype == torch.bool else index
        return self.rows[index]


def to_network(boxes: Tensor, meta: dict) -> Tensor:
    """Boxes (n, 4) in px of the original image to px of the network's input."""
    return boxes * boxes.new_tensor(list(meta['scale_factor']) * 2)


def middle(boxes: Tensor, meta: dict) -> tuple[Tensor, Tensor]:
    """Relative x and y, float64 (n,), of the middle of boxes in px of the network's input."""
    height, width = meta['batch_input_shape']
    boxes = boxes.double()
    return boxes[:, 0::2].mean(1) / width, boxes[:, 1::2].mean(1) / height


class Origins:
    """A head whose detections do not tell where they come from, or a classifier.

    Attributes:
        num_levels: Pyramid levels that detections come from; None where no level is known.
        has_queries: Whether detections are made by queries.
        sources: All RoIs or queries of the latest batch, in the order of their features.
    """

    has_queries = False
    num_levels: int | None = None
    sources: Places | None = None

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Within it the model's detections have the field :data:`PLACE_FIELD`."""
        yield

    def outputs(self, features: list[Tensor], samples: list) -> list[Tensor]:
        """For autograd: what the head makes on each level, a scalar; of queries, all the boxes."""
        return []

    def owner(self, name: str, part: int, items: Items, count: int, detections: int) -> str | None:
        """What a layer decides for: a ``'source'``, a ``'detection'``, or None for places of a map.

        Args:
            name: The layer.
            part: Number of the call or map.
            items: As the layer divided its input.
            count: How many items of this call the whole batch has.
            detections: How many there are in the batch.
        """
        return None

    def token_sizes(self, name: str, tokens: int) -> list[tuple[int, int]] | None:
        """Height and width of the levels whose cells are the tokens of an image, one by one."""
        return None

    def of_objects(
        self, image: int, meta: dict, boxes: Tensor, labels: Tensor | None = None
    ) -> tuple[Places, Tensor]:
        """See :meth:`Tracer.object_places`."""
        # Where the middle of the object is; layers that need a level take no part.
        places = Places.unknown(image, len(boxes))
        places.x, places.y = middle(to_network(boxes, meta), meta)
        return places, torch.arange(len(boxes))


def implements(head: nn.Module, name: str, *classes: type) -> bool:
    """Whether a method of a module is the one of one of these classes."""
    return getattr(type(head), name, None) in [getattr(owner, name) for owner in classes]
