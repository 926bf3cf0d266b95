"""Records what the layers of experts decide, and finds what stands behind a model's outputs."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdet_moe.analysis.attribution.families import origins_of
from mmdet_moe.analysis.attribution.places import PLACE_FIELD, UNKNOWN, Origins, Places
from mmdet_moe.analysis.controls import RandomRouters
from mmdet_moe.analysis.models import task_of
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.expert_layer import ExpertLayer, Observer, find_expert_layers
from mmdet_moe.moe.items import Items, Pixels, Tokens
from mmdet_moe.moe.routing import Routing


@dataclass
class Decisions:
    """The decisions of one layer for one batch.

    Attributes:
        routing: As the router made it; of several calls all of them, one after the other.
        maps: The items of each map that was routed.
        weights: float32 (T, E), each row divided by its sum.
        image: int64 (T,), index of the image in the batch.
        code: int64 (T,), the number of the item among those of its image.
        level: int64 (T,), the pyramid level, or the index of the map; -1 where unknown.
        centre: float32 (T, 2), relative x and y; NaN where one decision covers the whole map.
        first: Which of the routing's decisions is the first one of these.
    """

    routing: Routing
    maps: list[Items]
    weights: Tensor
    image: Tensor
    code: Tensor
    level: Tensor
    centre: Tensor
    first: int = 0


class Tracer:
    """Records the decisions of all layers of experts, and finds those behind the outputs.

    Use as a context manager around the model's predictions; afterwards the model is as before.

    Args:
        model: A detector of MMDetection or a classifier of MMPretrain, in evaluation mode.

    Raises:
        ConfigError: If the model has no layer of experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, ExpertLayer] = find_expert_layers(model)
        if not self.layers:
            raise ConfigError(
                f'the model ({type(model).__name__}) has neither an MoE nor a μMoE layer, so there '
                'are no experts to look at; give the config of a model that has one (such as '
                "bbox_head=dict(type='mmdet_moe.MoERetinaHead', ...))"
            )
        self._origins = origins_of(model)
        self._maps_of_level: dict[str, Tensor] | None = None
        self._fed_by: dict[str, int] = {}  # the backbone's map that a layer of tokens feeds
        self._backbone_sizes: list[tuple[int, int]] = []
        self._calls: dict[str, list[tuple[Routing, list[Items]]]] = {}
        self._detections: list[int] = []  # of each image of the batch
        self._stack: ExitStack | None = None
        #: By layer, what sees its inputs beside it.
        self.controls: dict[str, RandomRouters] = {}

    @property
    def is_detector(self) -> bool:
        """Whether the model predicts boxes."""
        return task_of(self.model) == 'detection'

    @property
    def knows_origins(self) -> bool:
        """Whether detections carry their level and place; False for heads unlike those known."""
        return type(self._origins) is not Origins

    @property
    def num_levels(self) -> int | None:
        """Pyramid levels that detections come from; None of a classifier, or where unknown."""
        return self._origins.num_levels

    @property
    def order(self) -> list[str]:
        """The layers that took part in the latest batch, in the order of their first calls."""
        return [name for name in self._calls if name in self.layers]

    def __enter__(self) -> 'Tracer':
        self._stack = ExitStack()
        for name, layer in self.layers.items():
            self._stack.callback(layer.observe(self._keep(name)).remove)
            if name in self.controls:
                self._stack.callback(self.controls[name].attach().remove)
        if self.is_detector:
            handle = self.model.backbone.register_forward_hook(self._keep_sizes)
            self._stack.callback(handle.remove)
        self._stack.enter_context(self._origins.carried())
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def _keep(self, name: str) -> Observer:
        def keep(routing: Routing, items: list[Items]) -> None:
            self._calls.setdefault(name, []).append((routing, items))

        return keep

    def _keep_sizes(self, _: nn.Module, __: tuple, output: Any) -> None:
        self._backbone_sizes = [tuple(level.shape[-2:]) for level in _tensors(output)]

    @torch.no_grad()
    def predict(self, batch: dict, preprocessed: bool = False) -> list:
        """The model's predictions for one batch, with their origins.

        Args:
            batch: As the data loader gives it.
            preprocessed: Whether the model's data preprocessor has seen it already.
        """
        data = batch if preprocessed else self.model.data_preprocessor(batch, False)
        if self._maps_of_level is None:
            self._maps_of_level = self._find_maps(data)
        self._calls, self._origins.sources = {}, None
        for control in self.controls.values():
            control.forget()
        results = self.model(**data, mode='predict')
        if self.is_detector:
            self._detections = [len(result.pred_instances) for result in results]
        return results

    def _find_maps(self, data: dict) -> dict[str, Tensor]:
        """For each layer: the map (or call) that each pyramid level depends on, or -1.

        The features are asked for the layers before the head, the head's outputs for its own.
        """
        if not self.is_detector:
            return {}
        outputs: dict[str, list[Tensor]] = {}

        def keep(name: str) -> Callable:
            def hook(_: nn.Module, __: tuple, output: Any) -> None:
                outputs.setdefault(name, []).extend(_tensors(output))

            return hook

        def behind(levels: list[Tensor], name: str) -> Tensor:
            return torch.tensor(
                [_map_behind(level, i, outputs[name]) for i, level in enumerate(levels)]
            )

        with ExitStack() as stack, torch.enable_grad():
            for name, module in {**self.layers, 'backbone': self.model.backbone}.items():
                stack.callback(module.register_forward_hook(keep(name)).remove)
            image = data['inputs'][:1].detach().clone().requires_grad_()
            features = self.model.extract_feat(image)
            backbone = outputs.pop('backbone')
            found = {name: behind(features, name) for name in outputs}
            for name, (tokens, *_) in outputs.items():
                if self.layers[name].granularity == 'token' and not self._is_in_attention(name):
                    fed = [i for i, m in enumerate(backbone) if _map_behind(m, 0, [tokens]) == 0]
                    self._fed_by[name] = fed[0] if fed else UNKNOWN
            outputs.clear()
            features = [level.detach().requires_grad_() for level in features]
            levels = self._origins.outputs(features, data['data_samples'][:1])
            if self._origins.has_queries:
                (boxes,) = levels
                found.update(
                    {name: torch.tensor([_last_behind(boxes, outputs[name])]) for name in outputs}
                )
            else:
                found.update({name: behind(levels, name) for name in outputs})
            return found

    def has_fixed_items(self, name: str) -> bool:
        """Whether a layer decides for places of the images, and not for RoIs, queries or detections
        that the model has found itself.
        """
        if self._origins.has_queries:
            return name.startswith(('backbone.', 'neck.', 'encoder.'))
        return not name.startswith('roi_head.')

    def _is_in_attention(self, name: str) -> bool:
        """Whether the tokens of a layer can be in another order, as in shifted windows."""
        segments = name.split('.')
        owners = [self.model.get_submodule('.'.join(segments[:i])) for i in range(len(segments))]
        return any(word in type(m).__name__ for m in owners for word in ('Attention', 'MSA'))

    def _routed(self, name: str) -> tuple[Routing, list[Items]]:
        """The layer's calls for the latest batch as one; those of a shared head level by level."""
        calls = self._calls[name]
        routing = Routing.cat([routing for routing, _ in calls])
        return routing, [items for _, maps in calls for items in maps]

    def _owners(self, name: str) -> tuple[str, Places, int] | None:
        """Of a layer that decides for RoIs, queries or detections: which, they, and its call."""
        if self._origins.sources is None:
            return None
        routing, maps = self._routed(name)
        # What the boxes hang on is the last of several calls for the same queries.
        used = int((self._maps_of_level or {}).get(name, torch.zeros(1))[-1])
        part = max(used, 0)
        owner = self._origins.owner(
            name, part, maps[part], routing.items_per_level[part], sum(self._detections)
        )
        if owner == 'detection':
            places = Places.cat([Places.unknown(i, n) for i, n in enumerate(self._detections)])
            return owner, places, part
        return None if owner is None else (owner, self._origins.sources, used)

    def _grids(self, name: str, num_images: int) -> list['_Grid']:
        """Where the items of a layer of maps are."""
        routing, maps = self._routed(name)
        counts = list(routing.items_per_level)
        if counts != [num_images * len(items) for items in maps]:
            raise ConfigError(
                f'layer "{name}" decides on {routing.num_images} inputs where the batch has '
                f'{num_images} images, and which input belongs to which image is not known for '
                f'{type(self.model).__name__}, so it cannot be analysed'
            )
        if len(maps) == 1 and isinstance(maps[0], Tokens):
            tokens = len(maps[0])
            sizes = self._token_sizes(name, tokens)
            cells = [Pixels((num_images, *size)) for size in sizes]
            firsts = [sum(map(len, cells[:i])) for i in range(len(cells))]
            if cells:
                return [_Grid(c, i, tokens, i) for c, i in zip(cells, firsts, strict=True)]
        return [
            _Grid(items, sum(counts[:i]), len(items), sum(counts[:i]) // max(num_images, 1))
            for i, items in enumerate(maps)
        ]

    def _token_sizes(self, name: str, tokens: int) -> list[tuple[int, int]]:
        sizes = self._origins.token_sizes(name, tokens)
        if sizes is None and self._fed_by.get(name, UNKNOWN) >= 0:
            sizes = [self._backbone_sizes[self._fed_by[name]]]
        known = sizes is not None and sum(height * width for height, width in sizes) == tokens
        return sizes if known else []

    def decisions(self, name: str, num_images: int) -> Decisions | None:
        """What a layer decided for the latest batch; None if it was not run.

        Args:
            name: The layer.
            num_images: Images in the batch.

        Raises:
            ConfigError: If it is not known which decision belongs to which image.
        """
        if name not in self._calls:
            return None
        routing, maps = self._routed(name)
        weights = routing.dense_weights().float().cpu()
        weights = weights / weights.sum(1, keepdim=True)
        owners = self._owners(name)
        if owners is not None:
            _, places, part = owners
            part = max(part, 0)
            start = sum(routing.items_per_level[:part])
            weights = weights[start : start + routing.items_per_level[part]]
            each = len(weights) // max(len(places), 1)
            image = places.image.repeat_interleave(each)
            first = torch.searchsorted(image, torch.arange(num_images))
            return Decisions(
                routing, [maps[part]], weights, image, torch.arange(len(image)) - first[image],
                places.level.repeat_interleave(each), torch.full((len(image), 2), torch.nan),
                start,
            )  # fmt: skip
        image, code, level = (torch.zeros(len(weights), dtype=torch.long) for _ in range(3))
        centre = torch.full((len(weights), 2), torch.nan)
        grids = self._grids(name, num_images)
        for i, grid in enumerate(grids):
            rows = grid.rows(torch.arange(num_images)[:, None], torch.arange(len(grid.items)))
            image[rows] = torch.arange(num_images)[:, None]
            code[rows] = grid.code + torch.arange(len(grid.items))
            level[rows] = i
            if len(grid.items) > 1:
                centre[rows] = grid.items.centres()
        return Decisions(
            routing, [grid.items for grid in grids], weights, image, code, level, centre
        )

    def leave_out_unknown(self, num_images: int) -> dict[str, str]:
        """Forget the layers whose decisions for the latest batch belong to no image that is known.

        Args:
            num_images: Images in the batch.

        Returns:
            Their names, and the reasons.

        Raises:
            ConfigError: If no layer would be left.
        """
        reasons: dict[str, str] = {}
        for name in self.layers:
            try:
                self.decisions(name, num_images)
            except ConfigError as error:
                reasons[name] = str(error)
                if len(reasons) == len(self.layers):
                    raise
        for name in reasons:
            del self.layers[name]
        return reasons

    def items(self, name: str, places: Places) -> Tensor:
        """The decisions behind n outputs of the latest batch.

        Returns:
            int64 (n,), indices of the layer's T decisions; -1 where the layer took no part, or
            where its part is unknown.
        """
        unknown = torch.full_like(places.image, UNKNOWN)
        if name not in self._calls:
            return unknown
        owners = self._owners(name)
        if owners is not None:
            owner, owned, part = owners
            # Which patch of an RoI made the box is not known: all of them did.
            one_each = part >= 0 and self._routed(name)[0].items_per_level[part] == len(owned)
            return getattr(places, owner).clone() if one_each else unknown
        if not self._detections:
            return unknown
        grids = self._grids(name, len(self._detections))
        index = self._map_index(name, places)
        found = unknown
        for i, grid in enumerate(grids):
            local = grid.items.locate(places.x.nan_to_num(), places.y.nan_to_num())
            if len(grid.items) > 1:
                local = torch.where(places.x.isnan(), UNKNOWN, local)
            rows = grid.rows(places.image, local)
            found = torch.where((index == i) & (local >= 0), rows, found)
        return found

    def _map_index(self, name: str, places: Places) -> Tensor:
        """Which of a layer's maps stands behind each place; -1 where none, or where unknown."""
        tokens = len(self._routed(name)[1][0])
        if self._origins.token_sizes(name, tokens) is not None:
            return places.level  # the token of that level and cell, or none
        of_level = (self._maps_of_level or {}).get(name)
        if of_level is None or len(of_level) == 0:
            return torch.full_like(places.level, UNKNOWN)
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
            places = Places.unknown(image, len(instances))
        else:
            places = Places.unpack(image, packed)
        places.detection = torch.arange(len(places)) + sum(self._detections[:image])
        return places

    def object_places(
        self, image: int, meta: dict, boxes: Tensor, labels: Tensor | None = None
    ) -> tuple[Places, Tensor]:
        """The origins that training would hold responsible for an image's objects.

        For an anchor head the anchors assigned to them, for an RoI head the assigned RoIs, for a
        transformer the queries matched to them.

        Args:
            image: Its index in the batch.
            meta: Its ``metainfo``.
            boxes: float32 (n, 4), xyxy in px of the original image.
            labels: int64 (n,), their classes, without which no query can be matched to them.

        Returns:
            The places, and int64 (places,): the object of each. An object can have none.
        """
        return self._origins.of_objects(image, meta, boxes, labels)


@dataclass
class _Grid:
    """Where the items of one map are among all of a layer: image by image."""

    items: Items
    first: int  # the row of the first item of the first image
    step: int  # from an image to the next one
    code: int  # the number of the first item among those of its image

    def rows(self, image: Tensor, local: Tensor) -> Tensor:
        return self.first + image * self.step + local


def _tensors(output: Any) -> list[Tensor]:
    return [part for part in tree_leaves(output) if isinstance(part, Tensor)]


def _map_behind(level: Tensor, index: int, maps: list[Tensor]) -> int:
    used = [i for i, gradient in enumerate(_gradients(level, maps)) if gradient is not None]
    if not used:
        return UNKNOWN
    return index if index in used else used[-1]


def _last_behind(boxes: Tensor, calls: list[Tensor]) -> int:
    # What all layers of a decoder predict is stacked: the others' gradients are 0, not missing.
    used = [i for i, g in enumerate(_gradients(boxes, calls)) if g is not None and g.any()]
    return used[-1] if used else UNKNOWN


def _gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(output.sum(), inputs, allow_unused=True, retain_graph=True)
