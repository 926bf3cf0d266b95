"""Which decision of each MoE layer stands behind an output of a model. Nothing is guessed.

A detection is made by one prior of one pyramid level (or by one RoI). While a :class:`Tracer` is
active, the heads keep that origin with every candidate, and it passes through score thresholds and
NMS as the boxes do. Which decision of a layer covers an origin then follows from the layer's place:

- in the dense head: the decision of that level, image and place (of the patch or pixel there);
- in the RoI head: the decision of that RoI;
- in the backbone or the neck: the decision at that place of the feature map that feeds that level,
  found out once by asking autograd which level depends on which map.

A classifier's image has one place, and its weights are the mean over the image's decisions.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_moe.analysis.origins import PLACE_FIELD, UNKNOWN, Origins, Places, origins_of, pack
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, find_moe_layers
from mmdet_moe.moe.items import Items
from mmdet_moe.moe.routing import Routing


@dataclass
class Decisions:
    """The decisions of one layer for one batch.

    Attributes:
        routing: As the router made it.
        maps: The items of each map that was routed.
        weights: float32 (T, E), each row divided by its sum.
        image: int64 (T,), index of the image in the batch.
        code: int64 (T,), the number of the item among those of its image.
        level: int64 (T,), the pyramid level, or the index of the map.
        centre: float32 (T, 2), relative x and y; NaN where one decision covers the whole map.
    """

    routing: Routing
    maps: list[Items]
    weights: Tensor
    image: Tensor
    code: Tensor
    level: Tensor
    centre: Tensor


class Tracer:
    """Records the decisions of all MoE layers, and finds those behind the outputs.

    Use as a context manager around the model's predictions; afterwards the model is as before.

    Args:
        model: A detector of MMDetection or a classifier of MMPretrain, in evaluation mode.

    Raises:
        ConfigError: If the model has no MoE layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, MoELayer] = find_moe_layers(model)
        if not self.layers:
            raise ConfigError(
                f'the model ({type(model).__name__}) has no MoE layer, so there are no experts to '
                "look at; give the config of an MoE model (such as bbox_head=dict(type='mmdet_moe."
                "MoERetinaHead', ...))"
            )
        self._origins = origins_of(model)
        self._maps_of_level: dict[str, Tensor] | None = None
        self._routed: dict[str, tuple[Routing, list[Items]]] = {}
        self._stack: ExitStack | None = None

    @property
    def is_detector(self) -> bool:
        """Whether the model predicts boxes."""
        return hasattr(self.model, 'bbox_head') or hasattr(self.model, 'roi_head')

    @property
    def knows_origins(self) -> bool:
        """Whether detections carry their level and place; False for heads unlike those known."""
        return type(self._origins) is not Origins

    @property
    def num_levels(self) -> int | None:
        """Pyramid levels that detections come from; None for a classifier."""
        return self._origins.num_levels

    def __enter__(self) -> 'Tracer':
        self._stack = ExitStack()
        for name, layer in self.layers.items():
            self._stack.enter_context(_hook(layer.router, self._keep(name)))
        self._stack.enter_context(self._origins.carried())
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _keep(self, name: str) -> Callable:
        def keep(_: nn.Module, inputs: tuple, routing: Routing) -> None:
            self._routed[name] = (routing, list(inputs[1]))

        return keep

    @torch.no_grad()
    def predict(self, batch: dict, preprocessed: bool = False) -> list:
        """The model's predictions for one batch, with their origins.

        Args:
            batch: As the data loader gives it.
            preprocessed: Whether the model's data preprocessor has seen it already.
        """
        data = batch if preprocessed else self.model.data_preprocessor(batch, False)
        if self._maps_of_level is None:
            self._maps_of_level = self._find_maps(data['inputs'][:1])
        self._routed, self._origins.rois = {}, None
        return self.model(**data, mode='predict')

    def _find_maps(self, inputs: Tensor) -> dict[str, Tensor]:
        """For the layers before the head: the map that each pyramid level depends on, or -1."""
        if not self.is_detector:
            return {}
        outputs: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Callable:
            def hook(_: nn.Module, __: tuple, output: Any) -> None:
                outputs[name] = [output] if isinstance(output, Tensor) else list(output)

            return hook

        with ExitStack() as stack, torch.enable_grad():
            for name, layer in self.layers.items():
                stack.enter_context(_hook(layer, keep(name)))
            levels = self.model.extract_feat(inputs.detach().clone().requires_grad_())
            return {
                name: torch.tensor([_map_behind(level, i, maps) for i, level in enumerate(levels)])
                for name, maps in outputs.items()
            }

    def decisions(self, name: str, num_images: int) -> Decisions | None:
        """What a layer decided for the latest batch; None if it was not run.

        Args:
            name: The layer.
            num_images: Images in the batch.
        """
        if name not in self._routed:
            return None
        routing, maps = self._routed[name]
        weights = routing.dense_weights().float().cpu()
        weights = weights / weights.sum(1, keepdim=True)
        if self._is_per_roi(name):
            rois = self._origins.rois
            image = rois.image
            first = torch.searchsorted(image, torch.arange(num_images))
            return Decisions(
                routing, maps, weights, image, torch.arange(len(image)) - first[image],
                rois.level, torch.full((len(image), 2), torch.nan),
            )  # fmt: skip
        if routing.num_images != num_images:
            raise ConfigError(
                f'MoE layer "{name}" decides on {routing.num_images} inputs where the batch has '
                f'{num_images} images, and which input belongs to which image is not known for '
                f'{type(self.model).__name__}, so it cannot be analysed'
            )
        image, code, level, centre, base = [], [], [], [], 0
        for i, items in enumerate(maps):
            count = len(items)
            image.append(torch.arange(num_images).repeat_interleave(count))
            code.append(torch.arange(base, base + count).repeat(num_images))
            level.append(torch.full((num_images * count,), i))
            middle = items.centres() if count > 1 else torch.full((1, 2), torch.nan)
            centre.append(middle.repeat(num_images, 1))
            base += count
        return Decisions(
            routing, maps, weights, *(torch.cat(part) for part in (image, code, level, centre))
        )

    def _is_per_roi(self, name: str) -> bool:
        rois = self._origins.rois
        return (
            name.startswith('roi_head.')
            and rois is not None
            and self._routed[name][0].num_items == len(rois)
        )

    def items(self, name: str, places: Places) -> Tensor:
        """The decisions behind n outputs of the latest batch.

        Returns:
            int64 (n,), indices of the layer's T decisions; -1 where the layer took no part, or
            where its part is unknown.
        """
        unknown = torch.full_like(places.image, UNKNOWN)
        if name not in self._routed:
            return unknown
        if name.startswith('roi_head.'):
            return places.roi.clone() if self._is_per_roi(name) else unknown
        routing, maps = self._routed[name]
        index = self._map_index(name, places, len(maps))
        found, offset = unknown, 0
        for i, items in enumerate(maps):
            local = items.locate(places.x, places.y)
            item = offset + places.image * len(items) + local
            found = torch.where((index == i) & (local >= 0), item, found)
            offset += routing.items_per_level[i]
        return found

    def _map_index(self, name: str, places: Places, num_maps: int) -> Tensor:
        of_level = (self._maps_of_level or {}).get(name)
        if of_level is None:
            if not name.startswith('bbox_head.'):
                return torch.full_like(places.level, UNKNOWN)
            of_level = torch.arange(num_maps)
        known = (places.level >= 0) & (places.level < len(of_level))
        index = of_level[places.level.clamp(0, len(of_level) - 1)]
        # Without a level: only if all levels depend on the same map.
        common = int(of_level[0]) if bool((of_level == of_level[0]).all()) else UNKNOWN
        return torch.where(known, index, torch.full_like(index, common))

    def detection_places(self, image: int, instances: InstanceData) -> Places:
        """The origins of one image's detections.

        Args:
            image: Its index in the batch.
            instances: Its ``pred_instances``, as :meth:`predict` returned them.
        """
        packed = instances.get(PLACE_FIELD)
        if packed is None:
            packed = pack(*([torch.full((len(instances),), float(UNKNOWN))] * 4))
        return Places.unpack(image, packed)

    def object_places(self, image: int, meta: dict, boxes: Tensor) -> tuple[Places, Tensor]:
        """The origins that training would hold responsible for an image's objects.

        For an anchor head the anchors assigned to them, for an RoI head the assigned RoIs.

        Args:
            image: Its index in the batch.
            meta: Its ``metainfo``.
            boxes: float32 (n, 4), xyxy in px of the original image.

        Returns:
            The places, and int64 (places,): the object of each. An object can have none.
        """
        return self._origins.of_objects(image, meta, boxes)


@contextmanager
def _hook(module: nn.Module, function: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


def _map_behind(level: Tensor, index: int, maps: list[Tensor]) -> int:
    gradients = torch.autograd.grad(level.sum(), maps, allow_unused=True, retain_graph=True)
    used = [i for i, gradient in enumerate(gradients) if gradient is not None]
    if not used:
        return UNKNOWN
    return index if index in used else used[-1]
