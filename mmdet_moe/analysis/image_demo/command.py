"""``tools/image_demo.py``: which expert found what in single images."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import nn

from mmdet_moe.analysis.attribution import Decisions, Tracer
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.image_demo.drawing import (
    UNKNOWN,
    Mark,
    RoutedMap,
    draw_marks,
    draw_routing,
    page_style,
)
from mmdet_moe.analysis.image_demo.looks import draw_looks, find_looks
from mmdet_moe.analysis.image_demo.pipeline import (
    ImagePipeline,
    LoadedImage,
    Placement,
    dataset_of_tests,
)
from mmdet_moe.analysis.models import load_model
from mmdet_moe.analysis.saliency import check_captum
from mmdet_moe.cli import fail, load_config
from mmdet_moe.drawing import to_bytes
from mmdet_moe.engine.options import add_cfg_options
from mmdet_moe.engine.preflight import check_checkpoint
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer

#: Files that a folder is searched for.
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
_LONGEST_NAME = 32
_NAMED_EXPERTS = 4
_INTERRUPTED = 130


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Draw what a trained MoE model finds in images, and which expert found it: '
        'each box has the colour of its main expert, and a label with class and score, the '
        "expert's number and its weight."
    )
    parser.add_argument(
        'images', nargs='+', type=Path, metavar='IMAGE', help='image files, or folders of them'
    )
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='checkpoint file')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('image_demo'),
        metavar='DIR',
        help='folder of the pictures (image_demo)',
    )
    parser.add_argument(
        '--layer',
        action='append',
        metavar='NAME',
        help='the layer whose experts to show, may be repeated (default: all layers of the '
        'head, or of the whole model if there are none, with a picture each)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='S',
        help='draw no detections with a lower score (0.3)',
    )
    parser.add_argument(
        '--overlay',
        action='store_true',
        help='draw the routing as well: every part of the image in the colour of its main expert',
    )
    parser.add_argument(
        '--cam',
        action='store_true',
        help='draw as well where its main expert sees each of the best detections, or the class of '
        'the image: a class activation map (needs captum)',
    )
    parser.add_argument('--device', help='cpu, cuda, cuda:1, … (default: a GPU if there is one)')
    add_cfg_options(parser)
    # Options may stand between the images, the config and the checkpoint.
    return parser.parse_intermixed_args(argv)


def run_image_demo(argv: Sequence[str] | None = None) -> None:
    """Run ``tools/image_demo.py``.

    Args:
        argv: arguments; those of the process if None.

    Raises:
        SystemExit: with status 2 after a mistake in the config, the images or the command line.
    """
    args = parse(argv)
    try:
        for path in draw_images(args):
            print(path, flush=True)
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    except Exception as error:
        fail(error, running=False)


def draw_images(args: argparse.Namespace) -> Iterator[Path]:
    """Draw everything.

    Args:
        args: As :func:`parse` gives them.

    Yields:
        The files, as they are written.

    Raises:
        ConfigError: For a mistake in the config, the images or the command line.
    """
    if not 0 <= args.score_thr < 1:
        raise ConfigError(f'--score-thr={args.score_thr} must lie in 0..1, 1 excluded')
    if args.cam:
        check_captum('--cam')
    images = find_images(args.images)
    cfg = load_config(args.config, args.cfg_options)
    check_checkpoint(args.checkpoint, 'checkpoint')
    model, meta = load_model(cfg, args.checkpoint, args.device)
    demo = ImageDemo(model, cfg, meta, args.layer, args.score_thr)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: '{args.out}' cannot be made a folder: {error.strerror}; choose another one"
        ) from error
    with demo.tracer:
        for path, name in zip(images, distinct_names(images), strict=True):
            with page_style():
                for suffix, figure in demo.draw(path, args.overlay, args.cam):
                    # Not with_suffix, for the sake of dots in names.
                    target = args.out / f'{name}_{suffix}.png'
                    yield write_file(target, to_bytes(figure, 'png'))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the images of the folders named.

    Raises:
        ConfigError: If there is no such file, or no image in a folder.
    """
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise ConfigError(
                    f"the folder '{path}' holds no image ({', '.join(SUFFIXES)}); give one that "
                    'does, or the files themselves'
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(
                f"there is no image '{path}'; the order is IMAGE... CONFIG CHECKPOINT"
            )
    return found


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file's pictures: its own without suffix, numbered where that is taken."""
    taken = {path.stem.casefold() for path in paths}
    used: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem, 2
        while name.casefold() in used or (name != path.stem and name.casefold() in taken):
            name, number = f'{path.stem}_{number}', number + 1
        used.add(name.casefold())
        names.append(name)
    return names


class ImageDemo:
    """A model, and how its results are drawn.

    Args:
        model: In evaluation mode, on its device.
        cfg: Its config.
        meta: What its checkpoint says of itself.
        layers: Names of the layers to show; None for those of the head.
        score_thr: Detections with a lower score are left out.

    Attributes:
        tracer: To be active while :meth:`draw` is used.

    Raises:
        ConfigError: If the model has no layer of experts, or none of such a name.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: Config,
        meta: dict,
        layers: Sequence[str] | None,
        score_thr: float,
    ) -> None:
        self.model = model
        self.tracer = Tracer(model)
        self.layers = _chosen(list(self.tracer.layers), layers)
        self.classes = _classes(cfg, meta)
        self.score_thr = score_thr
        self._without_map: set[str] = set()
        mean = getattr(model.data_preprocessor, 'mean', None)
        self.pipeline = ImagePipeline(cfg, 3 if mean is None else mean.numel())

    def draw(self, path: Path, overlay: bool, cam: bool = False) -> Iterator[tuple[str, Figure]]:
        """Everything about one image.

        Args:
            path: The file.
            overlay: Whether to draw the routing, too.
            cam: Whether to draw where the experts look, too.

        Yields:
            End of the file's name, figure.

        Raises:
            ConfigError: If the image cannot be read, or it is not known where the routing belongs.
        """
        image = self.pipeline(path)
        data = self.model.data_preprocessor(pseudo_collate([image.data]), False)
        (result,) = self.tracer.predict(data, preprocessed=True)
        height, width = data['inputs'].shape[-2:]
        for name in self.layers:
            decisions = self.tracer.decisions(name, 1)
            yield name, self._marks(path.name, image, name, decisions, result)
            if overlay:
                figure = self._routing(path.name, image, name, decisions, (width, height))
                if figure is not None:
                    yield f'{name}_routing', figure
                elif decisions is not None:
                    self._note_without_map(f'no overlay of {name}')
        if not cam:
            return
        looks = {
            name: find_looks(self.tracer, name, result, self.score_thr, self._class)
            for name in self.layers
        }
        for name, of_layer in looks.items():  # which run the model again: the last thing to do
            title = f'{path.name}: where the main experts e look, and their weights'
            if of_layer:
                yield (
                    f'{name}_cam',
                    draw_looks(self.model, data, self.tracer, name, of_layer, title),
                )
            elif self.tracer.layers[name].granularity == 'token':
                self._note_without_map(f'no class activation maps of {name}')

    def _note_without_map(self, what: str) -> None:
        if what not in self._without_map:
            self._without_map.add(what)
            print(f'note: {what}, whose decisions cover no part of a map', file=sys.stderr)

    # Found things --------------------------------------------------------------------------------

    def _marks(
        self, file: str, image: LoadedImage, name: str, decisions: Decisions | None, result: Any
    ) -> Figure:
        layer = self.tracer.layers[name]
        if self.tracer.is_detector:
            marks = self._detections(name, decisions, result.pred_instances)
            number = {0: 'no detection', 1: '1 detection'}.get(
                len(marks), f'{len(marks)} detections'
            )
            said = f'{number} with a score of at least {self.score_thr:g} (class and score | '
            said += 'main expert e and its weight)'
            things = 'detections'
        else:
            marks = [self._classification(image, decisions, result)]
            said = 'predicted class and its score | main expert e and its weight'
            things = 'images'
        title = f'{file}: {said}\n{self._heading(name, decisions)}'
        return draw_marks(image.pixels, marks, title, layer.num_experts, things)

    def _heading(self, name: str, decisions: Decisions | None) -> str:
        layer = self.tracer.layers[name]
        is_per_roi = name.startswith('roi_head.')
        unit = 'RoI' if is_per_roi else layer.granularity
        if unit == 'image' and decisions is not None and len(decisions.maps) > 1:
            unit = 'image and pyramid level'
        chosen = f'{layer.top_k} of' if isinstance(layer, MoELayer) else 'coefficients of'
        heading = f'{name}: one decision per {unit}, {chosen} {layer.num_experts} experts'
        if decisions is None:
            heading += '; not used for this image'
        elif len(decisions.weights) == 1 and not is_per_roi:
            heading += f', here {mixture(decisions.weights[0].numpy())}'
        return heading

    def _detections(self, name: str, decisions: Decisions | None, found: Any) -> list[Mark]:
        places = self.tracer.detection_places(0, found)
        items = self.tracer.items(name, places)
        scores = found.scores.cpu()
        boxes, labels = found.bboxes.cpu().numpy(), found.labels.cpu()
        shown = (scores >= self.score_thr).nonzero().flatten()
        marks = []
        for i in shown[scores[shown].argsort(descending=True, stable=True)].tolist():
            known = decisions is not None and items[i] >= 0
            weights = decisions.weights[items[i]].numpy() if known else None
            text = f'{self._class(int(labels[i]))} {scores[i]:.2f}'
            marks.append(_mark(boxes[i], text, weights))
        return marks

    def _classification(self, image: LoadedImage, decisions: Decisions | None, result: Any) -> Mark:
        scores = getattr(result, 'pred_score', None)
        if scores is None:
            raise ConfigError(
                f'the model ({type(self.model).__name__}) predicts no scores of classes; use a '
                'classifier of MMPretrain or a detector of MMDetection'
            )
        label = int(scores.argmax())
        height, width = image.pixels.shape[:2]
        weights = None if decisions is None else decisions.weights.mean(0).numpy()
        text = f'{self._class(label)} {float(scores[label]):.2f}'
        return _mark((0, 0, width, height), text, weights)

    def _class(self, label: int) -> str:
        name = str(self.classes[label]) if label < len(self.classes) else str(label)
        return name if len(name) <= _LONGEST_NAME else f'{name[: _LONGEST_NAME - 1]}…'

    # Routing -------------------------------------------------------------------------------------

    def _routing(
        self,
        file: str,
        image: LoadedImage,
        name: str,
        decisions: Decisions | None,
        padded: tuple[int, int],
    ) -> Figure | None:
        if decisions is None or name.startswith('roi_head.') or decisions.maps[0].borders() is None:
            return None
        if image.placement is None:
            raise ConfigError(
                f'--overlay: the test pipeline holds {image.obstacle}, after which it is not known '
                'where the routing lies on the image; use Resize, ResizeEdge, CenterCrop and Pad'
            )
        maps = routed_maps(decisions, image.placement, padded)
        title = f'{file}: main expert e of every cell and its weight (opacity)'
        title += f'\n{self._heading(name, decisions)}'
        seen = [image.placement.seen(axis) for axis in (0, 1)]
        seen = (seen[0][0], seen[1][0], seen[0][1], seen[1][1])
        return draw_routing(image.pixels, maps, title, seen)


def routed_maps(
    decisions: Decisions, placement: Placement, padded: tuple[int, int]
) -> list[RoutedMap]:
    """The decisions of one image, placed on it.

    Args:
        decisions: Of a batch of this image alone.
        placement: Where the network's input lies on the image.
        padded: Width and height of the network's input with padding, px.
    """
    maps = []
    for i, items in enumerate(decisions.maps):
        columns, rows = (border.double().numpy() for border in items.borders())
        weights = decisions.weights[decisions.level == i].numpy()
        weights = weights.reshape(len(rows) - 1, len(columns) - 1, -1)
        name = ''
        if len(decisions.maps) > 1:
            what = (
                mixture(weights[0, 0])
                if len(items) == 1
                else f'{len(rows) - 1}×{len(columns) - 1} cells'
            )
            name = f'level {i}: {what}'
        maps.append(
            RoutedMap(
                name,
                placement.on_image(columns * padded[0], 0),
                placement.on_image(rows * padded[1], 1),
                weights,
            )
        )
    return maps


def mixture(weights: np.ndarray) -> str:
    """The chosen experts, the heaviest first: ``'e2 0.81, e0 0.19'``.

    Args:
        weights: (E,).
    """
    order = [e for e in np.argsort(-weights, kind='stable') if weights[e] > 0]
    named = ', '.join(f'e{e} {weights[e]:.2f}' for e in order[:_NAMED_EXPERTS])
    return named + (', …' if len(order) > _NAMED_EXPERTS else '')


def _mark(box: Sequence[float], text: str, weights: np.ndarray | None) -> Mark:
    box = tuple(float(x) for x in box)
    if weights is None:
        return Mark(box, f'{text} | e?', UNKNOWN)
    main = int(weights.argmax())
    return Mark(box, f'{text} | e{main} {weights[main]:.2f}', main)


def _chosen(names: list[str], wanted: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return [name for name in names if name.split('.')[0].endswith('head')] or names
    for name in wanted:
        if name not in names:
            raise ConfigError(
                f"--layer: there is no layer of experts '{name}'; choose {_either(names)}"
            )
    return list(dict.fromkeys(wanted))


def _either(names: list[str]) -> str:
    return ' or '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _classes(cfg: Config, meta: dict) -> Sequence[str]:
    """Names as trained, or as the config says; nothing where neither tells."""
    given = meta.get('dataset_meta') or {}
    if not isinstance(given, dict):
        given = {}
    configured = dataset_of_tests(cfg).get('metainfo') or {}
    classes = given.get('classes') or given.get('CLASSES') or configured.get('classes') or ()
    return () if isinstance(classes, str) else classes
