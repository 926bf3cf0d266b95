"""``tools/merge_experts.py``: a dense model out of one with experts."""

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.measuring import images_of, load_trained, predict
from mmdet_moe.analysis.models import build_model
from mmdet_moe.analysis.surgery.dense import dense_config
from mmdet_moe.analysis.surgery.outputs import (
    add_output_options,
    check_output,
    compare,
    write_model,
)
from mmdet_moe.analysis.surgery.usage import observed
from mmdet_moe.checks import check_integer, check_number
from mmdet_moe.cli import load_config
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, MuMoE, find_expert_layers
from mmdet_moe.moe.dispatcher import unpack
from mmdet_moe.moe.surgery.merging import dense_prefix, merged_entries
from mmdet_moe.moe.surgery.siblings import Chain
from mmdet_moe.progress import progress_bar

#: Options of --how distill alone, and what they are by default.
_DISTILLING = {'iterations': 500, 'lr': 1e-4, 'seed': 0}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Put one dense layer in the place of the experts of each layer; show what that '
        'does to the metric, and write the dense checkpoint and its config.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--how',
        required=True,
        metavar='average|expert=I|distill',
        help="average: the mean of the experts' weights; expert=I: expert I of every layer; "
        'distill: trained to give what the experts give together, on images of the training set '
        'without their labels',
    )
    parser.add_argument(
        '--weights',
        choices=('uniform', 'load'),
        default='uniform',
        help='what each expert counts in the average: the same, or the items that it '
        'gets (uniform)',
    )
    parser.add_argument('--iterations', type=int, metavar='N', help='of --how distill (500)')
    parser.add_argument('--lr', type=float, help='of --how distill, with Adam (1e-4)')
    parser.add_argument(
        '--seed', type=int, help='of --how distill, for the order of the images (0)'
    )
    parser.add_argument(
        '--dense-config',
        metavar='FILE',
        help='config of the dense model (default: CONFIG without its experts)',
    )
    add_output_options(parser)
    return parser.parse_args(argv)


def merge_checkpoint(args: argparse.Namespace) -> tuple[dict, dict]:
    """Merge the experts of a model, measure it, and write it.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        The metrics before and after, see :func:`~mmdet_moe.analysis.measuring.metrics_of`.

    Raises:
        ConfigError: For a mistake in the config, the data or the command line, and if the merged
            layers are not those of the dense model.
    """
    expert = _check(args)
    cfg, model, meta = load_trained(args)
    layers = _layers_of(model, expert)
    dense_cfg = load_config(args.dense_config) if args.dense_config else dense_config(cfg)
    dense = build_model(dense_cfg).to(next(model.parameters()).device).eval()
    data = images_of(args, cfg, meta)
    images = AnalysisData(cfg, 'train') if args.how == 'distill' else None
    shares = {name: [1.0] * layer.num_experts for name, layer in layers.items()}
    # First, for they complain.
    _put(dense, model, layers, shares, args.dense_config)
    students = {}
    if images is not None:
        students = {name: _student(dense, layer, name) for name, layer in layers.items()}
    found, usage = observed(model, data, layers)
    if args.weights == 'load':
        shares = {name: usage[name]['load'] for name in layers}
    elif expert is not None:
        shares = {name: _only(expert, layer.num_experts) for name, layer in layers.items()}
    _put(dense, model, layers, shares, args.dense_config)
    if images is not None:
        distill(model, students, layers, images, args.iterations, args.lr, args.seed)
    before, after, text = compare(data, found, predict(dense, data, 'merged'))
    how = args.how if expert is not None else f'{args.how}, weights={args.weights}'
    names = ', '.join(f'"{name}"' for name in layers)
    note = f'merge_experts: dense layers in place of the experts of {names}, how={how}'
    if images is not None:
        note += f', iterations={args.iterations}, lr={args.lr:g}, seed={args.seed}'
    write_model(args.out, dense_cfg, dense, meta, [note])
    print('', text, sep='\n')
    print(f'\nDense model: {args.out}')
    return before, after


def _check(args: argparse.Namespace) -> int | None:
    """Which expert alone is to be left, if one."""
    check_output(args, args.config, args.checkpoint, args.dense_config or args.config)
    kind, _, number = args.how.partition('=')
    if args.how not in ('average', 'distill') and not (kind == 'expert' and number.isdigit()):
        raise ConfigError(
            f"--how {args.how}: it must be 'average', 'expert=I' with the number of an expert, or "
            "'distill'"
        )
    if number and args.weights != 'uniform':
        raise ConfigError(f'--weights {args.weights}: --how {args.how} has nothing to weigh')
    for name, default in _DISTILLING.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.how != 'distill':
            raise ConfigError(f'--{name} is for --how distill; --how {args.how} trains nothing')
    check_integer('merge_experts', '--iterations', args.iterations, 1)
    check_number('merge_experts', '--lr', args.lr, above=0)
    return int(number) if number else None


def _layers_of(model: nn.Module, expert: int | None) -> dict[str, MoELayer]:
    layers = find_expert_layers(model)
    if not layers:
        raise ConfigError('the model has no experts to merge')
    for name, layer in layers.items():
        if isinstance(layer, MuMoE):
            raise ConfigError(
                f'layer "{name}" is a μMoE, whose experts have no weights of their own to merge; '
                'only models with sparse experts alone become dense'
            )
        if layer.shortcut is not None:
            raise ConfigError(
                f'layer "{name}" adds a shortcut to its experts (residual=True), which the dense '
                'layer has not; it cannot become one'
            )
        if expert is not None and expert >= layer.num_experts:
            raise ConfigError(
                f'--how expert={expert}: layer "{name}" has {layer.num_experts} experts, counted '
                'from 0'
            )
    return layers


def _only(expert: int, num_experts: int) -> list[float]:
    return [float(e == expert) for e in range(num_experts)]


def _put(
    dense: nn.Module,
    model: nn.Module,
    layers: dict[str, MoELayer],
    shares: dict[str, list[float]],
    given: str | None,
) -> None:
    """Load all weights of a model into the dense one, of its experts the weighted mean."""
    inside = tuple(f'{name}.' for name in layers)
    state = {n: v for n, v in model.state_dict().items() if not n.startswith(inside)}
    for name, layer in layers.items():
        prefix = dense_prefix(layer, name)
        entries = merged_entries(layer, shares[name])
        state |= {prefix + entry: value for entry, value in entries.items()}
    wanted = dense.state_dict()
    fix = (
        f"'{given}' is not the config of its dense model"
        if given
        else 'give the config of its dense model, --dense-config'
    )
    for name in wanted.keys() ^ state.keys():
        raise ConfigError(f"the model and the dense one do not have '{name}' in common; {fix}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ConfigError(
                f"merged experts have '{name}' of the shape {tuple(value.shape)}, the dense model "
                f'of {tuple(wanted[name].shape)}; experts that are not as wide as the dense layer '
                'cannot take its place'
            )
    dense.load_state_dict(state)


# Distillation ------------------------------------------------------------------------------------


def distill(
    model: nn.Module,
    students: dict[str, nn.Module],
    layers: dict[str, MoELayer],
    images: AnalysisData,
    iterations: int,
    lr: float,
    seed: int = 0,
) -> None:
    """Train dense layers to give what the experts give together for the same input.

    The loss of a layer is its mean squared error relative to the variance of what the experts give,
    so that no labels are needed, nor anything of the task. Each layer starts as it is, or as one of
    the experts, whichever comes closest on the first batch. Statistics of batch normalisation stay.

    Args:
        model: With the experts; left as it was.
        students: The dense layers, by the names of those whose places they take; they are changed.
        layers: Those of ``model``, by name.
        images: What is shown.
        iterations: How many batches.
        lr: Of Adam, falling to 0 as a cosine.
        seed: For the order of the images.
    """
    calls: dict[str, list[tuple]] = {name: [] for name in layers}
    batches = _shuffled(images, iterations, seed)
    with ExitStack() as stack:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(partial(_note, calls[name]), with_kwargs=True)
            stack.callback(hook.remove)
        _show(model, next(batches), calls)
        for name, layer in layers.items():
            _start_nearest(students[name], layer, calls[name])
        parameters = [p for s in students.values() for p in s.parameters()]
        optimizer = torch.optim.Adam(parameters, lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        bar = progress_bar(range(iterations), desc='distilling', unit=' batches')
        for iteration in bar:
            if iteration > 0:
                _show(model, next(batches), calls)
            losses = [_loss(students[name], calls[name]) for name in layers if calls[name]]
            if not losses:
                continue
            optimizer.zero_grad()
            total = sum(losses)
            total.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(error=f'{total.item() / len(losses):.4f}', refresh=False)


def _student(dense: nn.Module, layer: MoELayer, name: str) -> nn.Module:
    """What stands in the dense model where the layer stands, as one module."""
    if not layer.siblings:
        student = dense.get_submodule(name)
    else:
        parent = dense.get_submodule(name.rpartition('.')[0])
        student = Chain({s: getattr(parent, s) for s in layer.siblings}, name).eval()
    if isinstance(student, nn.ModuleList):
        raise ConfigError(
            f'--how distill: in the place of layer "{name}" the dense model has a list of layers, '
            'and only its code knows how they are run; use --how average or expert=I'
        )
    return student.requires_grad_(True)


def _shuffled(images: AnalysisData, batches: int, seed: int) -> Iterator[dict]:
    generator = torch.Generator().manual_seed(seed)
    number = batches * images.loader_cfg.get('batch_size', 1)
    rounds = -(-number // len(images))
    order = [torch.randperm(len(images), generator=generator) for _ in range(rounds)]
    return images.batches(torch.cat(order)[:number].tolist())


def _note(calls: list[tuple], _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Remember what a layer was given, and what it made of it."""
    x, *others = args
    single = isinstance(x, Tensor)
    for one, y in zip([x] if single else x, [output] if single else output, strict=True):
        # The model may change it in place afterwards.
        kept = tree_map(
            lambda t: t.clone() if isinstance(t, Tensor) else t, (one, others, kwargs, unpack(y)[0])
        )
        calls.append(kept)


@torch.no_grad()
def _show(model: nn.Module, batch: dict, calls: dict[str, list[tuple]]) -> None:
    for of_layer in calls.values():
        of_layer.clear()
    model.test_step(batch)


def _loss(student: nn.Module, calls: list[tuple]) -> Tensor:
    """The mean over the calls of the error relative to the variance of what was wanted."""
    losses = []
    for x, others, kwargs, wanted in calls:
        y = unpack(student(x.clone(), *others, **kwargs))[0]
        losses.append(F.mse_loss(y, wanted) / wanted.var(correction=0).clamp(min=1e-12))
    return sum(losses) / len(losses)


@torch.no_grad()
def _start_nearest(student: nn.Module, layer: MoELayer, calls: list[tuple]) -> None:
    """Start with the weights, its own or those of one expert, that come closest."""
    if not calls:
        return
    own = student.state_dict()
    starts = [merged_entries(layer, _only(e, layer.num_experts)) for e in range(layer.num_experts)]
    starts.append(copy.deepcopy(own))
    errors = []
    for start in starts:
        student.load_state_dict(start)
        errors.append(float(_loss(student, calls)))
    student.load_state_dict(starts[errors.index(min(errors))])
