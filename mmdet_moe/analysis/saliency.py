"""Where in its input an expert sees an object: Grad-CAM of what the expert alone contributes.

The score of a detection, or the logit of a class, is differentiated with respect to the map A (C,
H, W) that the layer of experts is given, along one path only: through what one expert adds to the
layer's output, its output times its weight. The other experts, what stands beside them (shared
experts, a shortcut), the router's weights and everything outside the layer are constants. With that
gradient G

- of a classifier's image: Grad-CAM (arXiv 1610.02391, equations 1 and 2),
  ``ReLU(sum_c mean_hw(G_c) A_c)``;
- of a detection: HiResCAM (arXiv 2011.08891, equation 4), ``ReLU(sum_c G_c A_c)``. The mean over
  the map, which a global pooling behind it justifies, would light up all other objects that look
  alike; without it only what the detection hangs on does.

Layers that decide for images, patches or pixels of maps can be looked at; tokens, queries and RoIs
have no map of the image. Needs captum, ``pip install 'mmdet_moe[cam]'``.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils._pytree import tree_map_only

from mmdet_moe.analysis.attribution import Decisions, replaced
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.dispatcher import Dispatcher, unpack
from mmdet_moe.moe.expert_layer import ExpertLayer
from mmdet_moe.moe.mumoe import MuMoE
from mmdet_moe.moe.routing import Routing


@dataclass(frozen=True)
class Target:
    """What is differentiated.

    Attributes:
        result: Number of the detection among those of the image, or of the class.
        expert: Whose contribution.
        map: Which of the maps that the layer is given, in the order of its calls.
    """

    result: int
    expert: int
    map: int = 0


def check_captum(option: str) -> None:
    """Refuse an option that needs captum.

    Raises:
        ConfigError: If it is not installed.
    """
    if find_spec('captum') is None:
        raise ConfigError(f"{option} needs captum, which is missing: pip install 'mmdet_moe[cam]'")


def has_maps(name: str, layer: ExpertLayer, decisions: Decisions | None) -> bool:
    """Whether a layer decides for parts of feature maps of the image.

    Args:
        name: The layer's.
        layer: The layer.
        decisions: What it decided; None if it took no part.
    """
    return (
        decisions is not None
        and layer.granularity != 'token'
        and not name.startswith('roi_head.')
        and all(items.borders() is not None for items in decisions.maps)
    )


def expert_cam(
    model: nn.Module, data: dict, layer: ExpertLayer, target: Target
) -> tuple[np.ndarray, str]:
    """Where one expert sees one detection, or the class of an image.

    Of a detection whose score does not hang on the layer (one that makes the boxes, say) the width
    plus the height of its box is differentiated instead, and the absolute value taken.

    Args:
        model: In evaluation mode, and not traced: it is run once or twice more.
        data: What its data preprocessor gives for one image.
        layer: One for which :func:`has_maps`.
        target: What to look at.

    Returns:
        float32 (H, W) of the map, not negative, and what was differentiated: ``'logit'``,
        ``'score'`` or ``'box'``. All 0 if nothing hangs on the expert's contribution, or the score
        is so certain that its gradient vanishes.
    """
    from captum.attr import LayerGradCam, LayerGradientXActivation

    probe = nn.Identity()

    def logit(inputs: Tensor) -> Tensor:
        return model(inputs, mode='tensor')[:, target.result]

    def found(inputs: Tensor) -> Any:
        # Predictions are written into the samples, which are the caller's.
        samples = [sample.clone() for sample in data['data_samples']]
        (result,) = model(inputs, samples, mode='predict')
        return result.pred_instances[target.result : target.result + 1]

    def size(inputs: Tensor) -> Tensor:
        detection = found(inputs)
        box = detection.bboxes
        # Boxes do not hang on layers for classes, and a gradient needs a way to the layer.
        return (box[:, 2:] - box[:, :2]).sum(1) + 0 * detection.scores

    def cam_of(method: type, scalar: Callable[[Tensor], Tensor]) -> Tensor:
        with _one_path(layer, target, probe), _differentiable(), torch.enable_grad():
            inputs = data['inputs'].detach().requires_grad_()
            return method(scalar, probe).attribute(inputs).sum(1)[0].detach()

    if not (hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')):
        what, cam = 'logit', cam_of(LayerGradCam, logit)
    else:
        what, cam = 'score', cam_of(LayerGradientXActivation, lambda x: found(x).scores)
        if not cam.any():
            what, cam = 'box', cam_of(LayerGradientXActivation, size).abs()
    return relu(cam).float().cpu().numpy(), what


@contextmanager
def _differentiable() -> Iterator[None]:
    """Dense heads detach what they predict from, for the sake of their use as proposals."""
    heads = sys.modules.get('mmdet.models.dense_heads.base_dense_head')
    if heads is None:  # so there is no detector
        yield
        return
    select = heads.select_single_mlvl

    def attached(maps: list[Tensor], image: int, detach: bool = True) -> list[Tensor]:
        return select(maps, image, detach=False)

    with replaced(heads, 'select_single_mlvl', attached):
        yield


@contextmanager
def _one_path(layer: ExpertLayer, target: Target, probe: nn.Module) -> Iterator[None]:
    """One map goes into the layer through the probe, and has gradients through one expert alone."""
    seen = 0

    def enter(_: nn.Module, args: tuple) -> tuple:
        nonlocal seen
        x, *others = args
        maps = [x] if isinstance(x, Tensor) else list(x)
        here, seen = target.map - seen, seen + len(maps)
        if 0 <= here < len(maps):
            # A leaf, for what comes before the layer is none of its business; and a copy behind
            # the probe, because the layer may change its input in place.
            maps[here] = probe(maps[here].detach().requires_grad_()).clone()
        return (maps[0] if isinstance(x, Tensor) else maps, *others)

    beside = [*(getattr(layer, 'shared', None) or ()), getattr(layer, 'shortcut', None)]
    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(enter).remove)
        for module in filter(None, beside):
            stack.callback(module.register_forward_hook(lambda _, __, y: _constant(y)).remove)
        if isinstance(layer, MoELayer):
            stack.callback(layer.router.register_forward_hook(_constant_weights).remove)
        name, change = ('mix', _mix) if isinstance(layer, MuMoE) else ('run_experts', _run_experts)
        change = partial(change, layer, getattr(layer, name), target.expert)
        stack.enter_context(replaced(layer, name, change))
        yield


def _run_experts(
    layer: MoELayer, usual: Callable, expert: int, x_T: Tensor, dispatcher: Dispatcher, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """Stands in for ``MoELayer.run_experts``."""
    ids, weights = dispatcher.expert_ids, dispatcher.weights

    def part(chosen: Tensor) -> Any:
        return usual(x_T, Dispatcher(ids, weights * chosen, layer.num_experts), *args, **kwargs)

    y, rebuild = unpack(part(ids == expert))
    return rebuild(y + unpack(part(ids != expert))[0].detach())


def _mix(
    layer: MuMoE, usual: Callable, expert: int, x: Tensor, coefficients: tuple[Tensor, ...]
) -> Tensor:
    """Stands in for ``MuMoE.mix``: what the expert adds is the difference that zeroing it makes."""
    coefficients = tuple(a.detach() for a in coefficients)
    others = layer.mix_without(x, coefficients, expert)
    return usual(x, coefficients) - others + others.detach()


def _constant_weights(_: nn.Module, __: tuple, routing: Routing) -> Routing:
    gates = None if routing.gates is None else routing.gates.detach()
    return replace(routing, weights=routing.weights.detach(), gates=gates)


def _constant(output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, output)
