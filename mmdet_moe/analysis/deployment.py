"""``tools/export_onnx.py``: a trained model as an ONNX file, checked against itself."""

import argparse
import inspect
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from mmdet_moe.analysis.data import SPLITS, AnalysisData, drawn
from mmdet_moe.analysis.models import load_model, task_of
from mmdet_moe.cli import check_folder, fail, load_config, set_loader_defaults
from mmdet_moe.engine.explain import in_one_line
from mmdet_moe.engine.options import add_cfg_options
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import Routing, find_moe_layers
from mmdet_moe.version import __version__

#: The largest difference of two numbers, relative where they are larger than 1.
TOLERANCE = 1e-4
_INSTALL = "pip install 'mmdet_moe[onnx]'"
_BOXES_PER_SIDE = 3  # of the regions that a second stage is checked with


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Write a trained model to an ONNX file, with every expert in it, and check it '
        'against PyTorch on images of the data set. It takes pixels (0 to 255) in the order of the '
        "config's loader and gives what the network gives: class scores of a classifier, the maps "
        'of the head of a detector, or its boxes. Exit status 1: the file computes something else.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE.onnx')
    parser.add_argument('--overwrite', action='store_true', help='replace what is there')
    parser.add_argument(
        '--dynamic', action='store_true', help='batches and images of any size, not of one'
    )
    parser.add_argument(
        '--boxes',
        action='store_true',
        help='a detector of one stage ends in boxes, scores and labels, after the NMS of the '
        'config, for one image at a time',
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="of the images (that of the first, filled up to the model's pad_size_divisor)",
    )
    parser.add_argument(
        '--verify',
        type=int,
        default=20,
        metavar='N',
        help='so many images, drawn at random, to check with (20); 0, with --size, needs none',
    )
    parser.add_argument(
        '--time', action='store_true', help='also compare the CPU time with that of PyTorch'
    )
    parser.add_argument('--split', choices=SPLITS, default='val', help='which images (val)')
    add_cfg_options(parser)
    return parser.parse_args(argv)


def run_export(argv: Sequence[str] | None = None) -> None:
    """Run ``tools/export_onnx.py``.

    Args:
        argv: arguments; those of the process if None.

    Raises:
        SystemExit: with status 1 if what was written computes something else than the model, and 2
            after a mistake in the config, the data or the command line.
    """
    try:
        equal = export_model(parse(argv))
    except Exception as error:
        fail(error, running=False)
    if not equal:
        raise SystemExit(1)


class Exported(nn.Module):
    """What one file computes: from one tensor to several."""

    def expected(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What the file has to give."""
        return self(inputs)

    def differences(self, expected: Sequence[Tensor], found: Sequence[Tensor]) -> Iterator[float]:
        """How far each output is off at most, relative where it is larger than 1."""
        for y, z in zip(expected, found, strict=True):
            if z.shape != y.shape:
                yield float('inf')
            else:
                relative = (z - y).abs() / y.abs().clamp(min=1)
                yield relative.nan_to_num(nan=float('inf')).max().item()

    def about(self) -> dict[str, Any]:
        """What the file's metadata say beside what all say."""
        return {}


class Network(Exported):
    """What a runtime needs of a model: from pixels to the outputs of its network, as a flat tuple.

    Args:
        model: A classifier, or a detector of one stage. Of one with two: up to its proposals.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W), float32, 0 to 255, in the channel order of the config's loader."""
        return tuple(tree_leaves(self.outputs(images)))

    def outputs(self, images: Tensor) -> Any:
        """The outputs in the structure that the model gives them."""
        images = self.prepared(images)
        if not hasattr(self.model, 'roi_head'):
            return self.model(images, mode='tensor')
        features = tuple(self.model.extract_feat(images))
        return features, *self.model.rpn_head(features)

    def prepared(self, images: Tensor) -> Tensor:
        """Normalised, and in the order of channels that the model wants."""
        before = self.model.data_preprocessor
        if swaps_channels(before):
            images = images.flip(1)
        if getattr(before, '_enable_normalize', False):
            images = (images - before.mean) / before.std
        return images

    def names(self, outputs: Any) -> list[str]:
        """What each of the outputs is called: after the arguments of what decodes them."""
        head = getattr(self.model, 'bbox_head', getattr(self.model, 'rpn_head', None))
        if isinstance(outputs, Tensor):
            return ['scores']
        known = list(inspect.signature(head.predict_by_feat).parameters) if head else []
        if hasattr(self.model, 'roi_head'):
            known = ['features', *(f'rpn_{name}' for name in known)]
        if not isinstance(outputs, tuple) or len(outputs) > len(known):
            return [f'output_{i}' for i in range(len(tree_leaves(outputs)))]
        names = []
        for name, part in zip(known, outputs, strict=False):
            leaves = tree_leaves(part)
            single = isinstance(part, Tensor)
            names += [name] if single else [f'{name}_{i}' for i in range(len(leaves))]
        return names


class SecondStage(Exported):
    """The box head of a detector of two stages, from the features of regions to their outputs.

    Args:
        model: The detector.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.head = model.roi_head.bbox_head
        self.shared = getattr(model.roi_head, 'shared_head', None) or nn.Identity()

    def forward(self, regions: Tensor) -> tuple[Tensor, ...]:
        """(R, C, h, w), as the detector's RoI extractor gives them."""
        return tuple(leaf for leaf in self.head(self.shared(regions)) if leaf is not None)


def swaps_channels(preprocessor: nn.Module) -> bool:
    """Whether a data preprocessor of either toolbox reverses the order of the channels."""
    return bool(
        getattr(preprocessor, '_channel_conversion', False)
        or getattr(preprocessor, 'to_rgb', False)
    )


@dataclass
class Part:
    """One file: a network, and how to feed it.

    Attributes:
        network: From one tensor to several.
        path: The file.
        input: Name of the input.
        outputs: Names of the outputs.
        dims: Which dimensions of the input are free, by their names.
        inputs: From images to what this part is given.
    """

    network: Exported
    path: Path
    input: str
    outputs: list[str]
    dims: dict[int, str]
    inputs: Callable[[Tensor], Tensor]


def export_model(args: argparse.Namespace) -> bool:
    """Write a model, and check what was written.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        Whether onnxruntime computes what PyTorch does; True if nothing is verified.

    Raises:
        ConfigError: For a mistake in the config, the data or the command line, and for a model that
            cannot be exported.
    """
    _check(args)
    cfg = load_config(args.config, args.cfg_options)
    needs_images = args.verify > 0 or args.size is None
    if needs_images:
        check_config(cfg, args.split, args.checkpoint)
        set_loader_defaults(cfg)
    model, meta = load_model(cfg, args.checkpoint, 'cpu')
    images: list[Tensor] = []
    if needs_images:
        data = AnalysisData(cfg, args.split)
        first, *images = _images(data, [0, *drawn(len(data), args.verify)])
    size = tuple(args.size or _filled_up(first.shape[1:], model.data_preprocessor))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # As many channels as the loader gives or, without any image, as are normalised.
        mean = getattr(model.data_preprocessor, 'mean', None)
        channels = len(first) if needs_images else 3 if mean is None else mean.numel()
        example = torch.zeros(1, channels, *size)
        parts = _parts(model, args, example)
        for part in parts:
            _write(part, part.inputs(example), _about(part.network, model, meta, args, size))
            print(f'{part.path}: {part.input} -> {", ".join(part.outputs)}')
        batches = list(_batches(images, size, parts[0].dims))
        equal = _verify(model, parts, batches) if batches else True
        if args.time and batches:
            print(_times(parts, batches))
    return equal


def _check(args: argparse.Namespace) -> None:
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if not _is_there(name)]
    if missing:
        raise ConfigError(f'an export needs {", ".join(missing)}, which is missing: {_INSTALL}')
    if args.verify < 0:
        raise ConfigError(f'--verify={args.verify} must be at least 0')
    if args.time and args.verify == 0:
        raise ConfigError('--time needs images to compute; set --verify to at least 1')
    if args.size and min(args.size) < 1:
        raise ConfigError(f'--size={args.size} must be two numbers of at least 1')
    if args.out.suffix != '.onnx':
        raise ConfigError(f"--out must end in .onnx, got '{args.out}'")
    check_folder(args.out.absolute().parent, '--out')
    _check_new(args.out, args.overwrite)


def _check_new(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"--out: '{path}' exists; choose another name, or use --overwrite")


def _is_there(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def _filled_up(size: Sequence[int], preprocessor: nn.Module) -> list[int]:
    """A size as the model's own batches have it."""
    divisor = getattr(preprocessor, 'pad_size_divisor', 1)
    return [-(-length // divisor) * divisor for length in size]


def _images(data: AnalysisData, chosen: list[int]) -> Iterator[Tensor]:
    """Each of these images as the pipeline of the tests leaves it, (C, H, W) float32."""
    for batch in data.batches(chosen):
        for image in batch['inputs']:
            yield image.float()


def _network(model: nn.Module, boxes: bool) -> Network:
    if not boxes:
        return Network(model)
    if task_of(model) != 'detection':
        raise ConfigError(f'--boxes is for detectors, and {type(model).__name__} is none; omit it')
    from mmdet_moe.analysis.decoding import Detector  # needs MMDetection

    return Detector(model)


def _parts(model: nn.Module, args: argparse.Namespace, example: Tensor) -> list[Part]:
    network = _network(model, args.boxes).eval()
    try:
        outputs = network.outputs(example)
    except Exception as error:
        size = tuple(example.shape[2:])
        raise ConfigError(
            f'{type(model).__name__} cannot compute images of the size {size} alone, without data '
            f'samples ({in_one_line(error)[:200]}), as an exported file does; choose another '
            '--size, or export its modules with torch.onnx.export'
        ) from error
    names = network.names(outputs)
    free = {0: 'batch', 2: 'height', 3: 'width'} if args.dynamic else {}
    if args.boxes:  # as many boxes as an image has cannot be stacked
        free.pop(0, None)
    parts = [Part(network, args.out, 'images', names, free, lambda images: images)]
    if not hasattr(model, 'roi_head'):
        return parts
    head, extractor = model.roi_head.bbox_head, model.roi_head.bbox_roi_extractor
    if isinstance(head, nn.ModuleList):
        raise ConfigError(
            f'{type(model).__name__} has several box heads one after the other, which the export '
            'does not know; export the network in parts with torch.onnx.export'
        )

    def regions(images: Tensor) -> Tensor:
        features = network.outputs(images)[0]
        return extractor(features[: extractor.num_inputs], _boxes(images))

    path = args.out.with_name(f'{args.out.stem}_regions.onnx')
    _check_new(path, args.overwrite)
    named = [
        n for n, w in (('cls_score', head.with_cls), ('bbox_pred', head.with_reg)) if w
    ]  # as the head's predict_by_feat calls them
    parts.append(Part(SecondStage(model).eval(), path, 'regions', named, {0: 'regions'}, regions))
    return parts


def _boxes(images: Tensor) -> Tensor:
    """Regions of every image, (R, 5): its index, and a grid of boxes of several sizes."""
    height, width = images.shape[2:]
    steps = range(_BOXES_PER_SIDE)
    boxes = [
        (n, width * j / 4, height * i / 4, width * (j + i + 1) / 5, height * (i + j + 1) / 5)
        for n in range(len(images)) for i in steps for j in steps
    ]  # fmt: skip
    return torch.tensor(boxes, dtype=torch.float32)


def _write(part: Part, example: Tensor, about: dict[str, str]) -> None:
    dims = dict.fromkeys(part.dims, torch.export.Dim.DYNAMIC)
    if 0 in part.dims:  # a dimension of size 1 would be taken for a fixed one
        example = torch.cat([example, example])
    try:
        program = torch.onnx.export(
            part.network,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[part.input],
            output_names=part.outputs,
            dynamic_shapes=(dims,) if dims else None,
        )
    except Exception as error:
        hint = ' without --dynamic' if dims else ''
        cause = error.__cause__ or error
        raise ConfigError(
            f'{type(part.network).__name__} cannot be exported ({in_one_line(cause)[:300]}); try '
            f'it{hint or " in parts with torch.onnx.export"}'
        ) from error
    program.model.metadata_props.update(about)
    part.path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(part.path), external_data=False)


def _about(
    network: Exported,
    model: nn.Module,
    meta: dict,
    args: argparse.Namespace,
    size: tuple[int, int],
) -> dict[str, str]:
    """What a user of the file has to know, as ONNX keeps it: texts by name."""
    before = model.data_preprocessor
    numbers = {
        name: [float(f'{value:.6g}') for value in getattr(before, name).flatten()]
        for name in ('mean', 'std')
        if hasattr(before, name)
    }
    order = 'as the loader of the config gives them (BGR, unless it says otherwise)'
    about = {
        'input': f'float32, 0 to 255, channels {order}; the graph normalises and reorders them',
        'in_the_graph': {**numbers, 'swap_channels': swaps_channels(before)},
        'pad_size_divisor': getattr(before, 'pad_size_divisor', 1),
        'size': 'any' if args.dynamic else list(size),
        'classes': (meta.get('dataset_meta') or {}).get('classes'),
        'config': Path(args.config).name,
        'mmdet_moe': __version__,
        **network.about(),
    }
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in about.items()}


def _batches(images: list[Tensor], size: tuple[int, int], free: dict[int, str]) -> Iterator[Tensor]:
    """The images as the file takes them: cut, or filled up with 0, to its size.

    If its dimensions are free, every second one is of another size, in a batch of two.
    """
    for i, image in enumerate(images):
        height, width = size
        batch = [image]
        if free and i % 2 == 0:  # the first too, as it may be the only one
            height, width = max(height - 32, 32), max(width - 64, 32)
            batch = [image, images[i - 1]] if 0 in free else batch
        filled = [_canvas(image, height, width) for image in batch]
        yield torch.stack(filled)


def _canvas(image: Tensor, height: int, width: int) -> Tensor:
    image = image[:, :height, :width]
    right, below = width - image.shape[2], height - image.shape[1]
    return F.pad(image, (0, right, 0, below), value=0.0)


def _runtime(part: Part, threads: int = 0) -> Callable[[Tensor], list[Tensor]]:
    """The file, as a function; by default with a thread for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(
        str(part.path), options, providers=['CPUExecutionProvider']
    )
    return lambda x: [
        torch.from_numpy(np.asarray(y)) for y in session.run(None, {part.input: x.numpy()})
    ]


def _verify(model: nn.Module, parts: list[Part], batches: list[Tensor]) -> bool:
    """Compare the files with the model, whose layers evaluate the chosen experts alone."""
    used: dict[str, Tensor] = {}
    observed = [
        layer.observe(partial(_note, used, name)) for name, layer in find_moe_layers(model).items()
    ]
    largest, worst = 0.0, ''
    for part in parts:
        run = _runtime(part)
        for batch in batches:
            inputs = part.inputs(batch)
            differences = part.network.differences(part.network.expected(inputs), run(inputs))
            for name, difference in zip(part.outputs, differences, strict=False):
                if difference >= largest:
                    largest, worst = difference, name
    for handle in observed:
        handle.remove()
    equal = largest <= TOLERANCE
    experts = ', '.join(f'{name} {mask.sum()} of {len(mask)}' for name, mask in used.items())
    print(
        f'onnxruntime {"equals" if equal else "DIFFERS FROM"} PyTorch on {len(batches)} images: '
        f'largest difference {largest:.1e} ({worst}), allowed {TOLERANCE:.0e}; experts that the '
        f'images chose: {experts or "all, in proportion"}'
    )
    return equal


def _note(used: dict[str, Tensor], name: str, routing: Routing, _: Any) -> None:
    chosen = routing.load() > 0
    used[name] = used.get(name, chosen) | chosen


def _times(parts: list[Part], batches: list[Tensor]) -> str:
    """CPU time for an image, on one thread, of the files and of PyTorch in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lines = []
        for part in parts:
            run = _runtime(part, threads=1)
            seconds: dict[str, list[float]] = {'PyTorch': [], 'onnxruntime': []}
            for batch in batches:
                inputs = part.inputs(batch)
                for name, compute in (('PyTorch', part.network.expected), ('onnxruntime', run)):
                    compute(inputs)
                    start = time.process_time()
                    compute(inputs)
                    seconds[name].append((time.process_time() - start) / len(batch))
            torch_, onnx = (1e3 * statistics.median(s) for s in seconds.values())
            lines.append(
                f'{part.path.name}, CPU time for an image, one thread, median of {len(batches)}: '
                f'PyTorch (chosen experts) {torch_:.1f} ms, onnxruntime (all experts) {onnx:.1f} '
                f'ms, {onnx / torch_:.2f} times; load of the machine {os.getloadavg()[0]:.1f}'
            )
    finally:
        torch.set_num_threads(threads)
    return '\n'.join(lines)
