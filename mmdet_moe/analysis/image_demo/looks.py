"""Where experts look in one image: Grad-CAM pictures of the things that were found in it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.analysis.attribution.places import to_network
from mmdet_moe.analysis.image_demo.drawing import Heat, draw_heat
from mmdet_moe.analysis.saliency import Target, expert_cam, has_maps

#: Panels of a picture: detections with the highest scores, or experts with the most weight.
MAX_LOOKS = 6
_WHAT = {
    'logit': 'Grad-CAM of the logit of the predicted class',
    'score': 'HiResCAM of the score of the detection',
    'box': 'absolute HiResCAM of width + height of the box',
}


@dataclass(frozen=True)
class Look:
    """One thing to look at.

    Attributes:
        text: Class and score, expert and weight.
        target: What is differentiated.
        box: x0, y0, x1, y1 in px of the network's input; None of a classifier's image.
    """

    text: str
    target: Target
    box: tuple[float, float, float, float] | None


def find_looks(
    tracer: Tracer, name: str, result: Any, score_thr: float, class_name: Callable[[int], str]
) -> list[Look]:
    """What to look at in the latest image, which was a batch of its own.

    Of a detector the main expert behind each of the best detections, of a classifier the experts
    with the most weight, for the predicted class.

    Args:
        tracer: Active; it has predicted the image.
        name: The layer.
        result: The image's prediction.
        score_thr: Least score of a detection.
        class_name: The name of a label.

    Returns:
        At most :data:`MAX_LOOKS`; none if the layer has no map of the image.
    """
    layer, decisions = tracer.layers[name], tracer.decisions(name, 1)
    if not has_maps(name, layer, decisions):
        return []
    if not tracer.is_detector:
        scores, weights = result.pred_score, decisions.weights.mean(0)
        label = int(scores.argmax())
        order = weights.argsort(descending=True, stable=True)[:MAX_LOOKS].tolist()
        text = f'{class_name(label)} {float(scores[label]):.2f}'
        return [
            Look(f'{text} | e{e} {weights[e]:.2f}', Target(label, e), None)
            for e in order
            if weights[e] > 0
        ]
    found = result.pred_instances
    items = tracer.items(name, tracer.detection_places(0, found))
    scores = found.scores.cpu()
    boxes = to_network(found.bboxes, result.metainfo).cpu().tolist()
    looks = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if scores[i] < score_thr or len(looks) == MAX_LOOKS:
            break
        if (item := int(items[i])) < 0:
            continue
        expert = int(decisions.weights[item].argmax())
        text = f'{class_name(int(found.labels[i]))} {scores[i]:.2f}'
        text += f' | e{expert} {decisions.weights[item, expert]:.2f}'
        if len(decisions.maps) > 1:
            text += f' | level {int(decisions.level[item])}'
        looks.append(Look(text, Target(i, expert, int(decisions.level[item])), tuple(boxes[i])))
    return looks


def draw_looks(
    model: nn.Module, data: dict, tracer: Tracer, name: str, looks: list[Look], title: str
) -> Figure:
    """Run the model once or twice for each look, and draw them side by side.

    Args:
        model: In evaluation mode.
        data: What its data preprocessor gives for the image.
        tracer: Of the model.
        name: The layer.
        looks: From :func:`find_looks`, before another image was predicted.
        title: First line.
    """
    layer, heats, kinds = tracer.layers[name], [], []
    height, width = data['inputs'].shape[-2:]
    for look in looks:
        values, what = expert_cam(model, data, layer, look.target)
        kinds.append(what)
        text = look.text if values.any() else f'{look.text} (no gradient)'
        heats.append(Heat(text, values, (width, height), look.target.expert, look.box))
    said = ', '.join(_WHAT[kind] for kind in dict.fromkeys(kinds))
    title += (
        f"\n{name}: {said} over the map that the layer is given, through one expert's output times "
        'its weight alone; each panel from 0 (clear) to its maximum (bright)'
    )
    return draw_heat(network_picture(data), heats, title, layer.num_experts)


def network_picture(data: dict) -> np.ndarray:
    """The network's input as a grey picture, without padding: uint8 (H, W, 3)."""
    image = data['inputs'][0].detach().float().mean(0).cpu().numpy()
    meta = data['data_samples'][0].metainfo
    if 'batch_input_shape' in meta:  # a detector's, which pads on the right and at the bottom
        height, width = meta['img_shape'][:2]
        image = image[:height, :width]
    low, high = image.min(), image.max()
    grey = (255 * (image - low) / max(high - low, 1e-12)).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)
