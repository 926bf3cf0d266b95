"""What the routers are given, as points for TensorBoard's projector.

One embedding for each layer: a point is what one decision is based on (the features that the router
pools over the image, patch or pixel, or the vector of a token), with its main expert, its weight,
the number of its map (the pyramid level, in a head), its image, and a small picture of what it
covers. ``tensorboard --logdir DIR`` shows them, as PCA, UMAP or t-SNE, coloured by expert.
"""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from mmdet_moe.analysis.attribution import replaced
from mmdet_moe.analysis.data import drawn
from mmdet_moe.analysis.image_demo.looks import network_picture
from mmdet_moe.analysis.study import Study
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.expert_layer import ExpertLayer
from mmdet_moe.moe.items import Items
from mmdet_moe.moe.mumoe import MuMoE
from mmdet_moe.moe.routing import Routing

#: Points of a layer, more than which a browser cannot turn; of images, drawn at random.
MAX_POINTS, MAX_IMAGES = 5000, 1000
_SIDE = 32  # of a picture, px
_CONFIG, _POINTS = 'projector_config.pbtxt', 'tensors.tsv'  # TensorBoard's names
_HEADER = ['expert', 'weight', 'map', 'image']


def check_projector(folder: Path) -> None:
    """Refuse what would fail after the work.

    Raises:
        ConfigError: Without TensorBoard, or if the folder holds anything but an earlier export.
    """
    if find_spec('tensorboard') is None:
        raise ConfigError(
            '--projector needs TensorBoard, which is missing: pip install tensorboard'
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _CONFIG).exists():
        raise ConfigError(
            f"--projector: '{folder}' holds something else than points for the projector; choose a "
            'new folder'
        )


@torch.no_grad()
def write_projector(study: Study, folder: Path) -> None:
    """Run the model on some images, and write the points of all layers, in place of earlier ones.

    Args:
        study: Its model and data.
        folder: Where to; see :func:`check_projector`.
    """
    from torch.utils.tensorboard import SummaryWriter

    data, images = study.data, drawn(len(study.data), MAX_IMAGES)
    is_labelled, rng = not study.is_detector, np.random.default_rng(0)
    points: dict[str, list] = {name: [] for name in study.layers}
    for index, batch in zip(images, data.batches(images, batch_size=1, num_workers=0), strict=True):
        inputs = study.model.data_preprocessor(batch, False)
        given: dict[str, list[tuple[Tensor, Routing, list[Items]]]] = {}
        with ExitStack() as stack:
            for name, layer in study.layers.items():
                _watch(stack, layer, given.setdefault(name, []).append)
            study.model(**inputs, mode='predict')
        picture, padded = network_picture(inputs), inputs['inputs'].shape[-2:]
        extra = [data.classes[data.label(index)]] if is_labelled else []
        for name, calls in given.items():
            of_image, first = [], 0
            for vectors, routing, items in calls:
                of_image += _points(vectors, routing, items, first, picture, padded)
                first += len(items)
            most = -(-MAX_POINTS // len(images))
            chosen = np.sort(rng.permutation(len(of_image))[:most])
            for vector, told, cell in (of_image[i] for i in chosen):
                points[name].append((vector, [*told, str(data.chosen[index]), *extra], cell))
    # First of all, for :func:`check_projector`: if this is interrupted, the next call goes on.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).write_bytes(b'')
    for path in folder.glob(f'*/*/{_POINTS}'):
        shutil.rmtree(path.parent)
    for path in folder.glob('events.out.tfevents.*'):
        path.unlink()
    header = [*_HEADER, 'class'] if is_labelled else _HEADER
    with SummaryWriter(str(folder)) as writer:
        for name, of_layer in points.items():
            if not of_layer:
                continue
            vectors, told, pictures = zip(*of_layer, strict=True)
            writer.add_embedding(
                torch.stack(vectors),
                metadata=list(told),
                label_img=torch.from_numpy(np.stack(pictures)).float() / 255,
                tag=name.replace('/', '_'),
                metadata_header=header,
            )


def _watch(stack: ExitStack, layer: ExpertLayer, tell: Callable[[tuple], Any]) -> None:
    """Tell of each call of a layer: the vectors (T, C) that it decides by, and the decisions."""
    if isinstance(layer, MuMoE):
        rows: list[Tensor] = []
        usual = layer.gate.logits

        def logits(x: Tensor) -> Any:
            rows.append(x)
            return usual(x)

        stack.enter_context(replaced(layer.gate, 'logits', logits))
        handle = layer.observe(lambda routing, items: tell((rows.pop(), routing, items)))
        stack.callback(handle.remove)
        return

    def after(_: nn.Module, given: tuple, routing: Routing) -> None:
        maps, items = given[:2]
        pooled = [of_map.pool(m) for m, of_map in zip(maps, items, strict=True)]
        tell((torch.cat(pooled), routing, list(items)))

    stack.callback(layer.router.register_forward_hook(after).remove)


def _points(
    vectors: Tensor,
    routing: Routing,
    items: list[Items],
    first: int,
    picture: np.ndarray,
    padded: tuple[int, int],
) -> list[tuple[Tensor, list[str], np.ndarray]]:
    """Vector, what is told, and picture (3, side, side) of each decision of a call.

    The maps are of the picture with the padding around it, as high and wide as ``padded``.
    """
    vectors = vectors.float().cpu()
    weights = routing.dense_weights().float().cpu()
    weights = weights / weights.sum(1, keepdim=True)
    top, main = weights.max(1)
    found, row = [], 0
    for number, (of_map, rows) in enumerate(zip(items, routing.items_per_level, strict=True)):
        cells = _cells(of_map, rows, picture, padded)
        for i in range(rows):
            told = [f'e{int(main[row])}', f'{float(top[row]):.3f}', str(first + number)]
            found.append((vectors[row], told, cells[i % len(cells)]))
            row += 1
    return found


def _cells(
    items: Items, rows: int, picture: np.ndarray, padded: tuple[int, int]
) -> list[np.ndarray]:
    """What each item covers; the whole picture where that is not known."""
    borders = items.borders()
    if borders is None or len(items) != rows:
        return [_thumbnail(picture)]
    x, y = (
        np.clip(b.numpy() * whole, 0, seen)
        for b, whole, seen in zip(borders, padded[::-1], picture.shape[1::-1], strict=True)
    )
    return [
        _thumbnail(picture[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))])
        for top, bottom in pairwise(y)
        for left, right in pairwise(x)
    ]


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    if not picture.size:
        return np.zeros((3, _SIDE, _SIDE), np.uint8)
    small = cv2.resize(picture, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    return small.transpose(2, 0, 1)
