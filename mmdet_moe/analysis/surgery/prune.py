"""``tools/prune_experts.py``: a model without the experts that hardly anything depends on."""

import argparse
import copy
from collections.abc import Iterable, Mapping, Sequence

from mmengine.config import Config
from torch import nn

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.interventions import Intervention, applied
from mmdet_moe.analysis.measuring import (
    images_of,
    load_trained,
    main_metric,
    measure,
    metrics_of,
    predict,
)
from mmdet_moe.analysis.models import build_model
from mmdet_moe.analysis.records.contents import BoxRecords
from mmdet_moe.analysis.surgery.fields import (
    Place,
    add_layer_option,
    layers_by_field,
    node_at,
)
from mmdet_moe.analysis.surgery.outputs import (
    add_output_options,
    check_output,
    compare,
    write_model,
)
from mmdet_moe.analysis.surgery.usage import USAGE, observed
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import BiasBalancing, MoELayer, find_moe_layers
from mmdet_moe.moe.surgery.fewer import keep_experts
from mmdet_moe.moe.surgery.report import in_columns

CRITERIA = (*USAGE, 'effect')


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Remove experts from a trained model, without training; show what that does '
        'to the metric, and write the smaller checkpoint and its config.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--by',
        choices=CRITERIA,
        required=True,
        help='load: the share of the items that an expert gets; importance: the share of the '
        'weights; effect: what the metric (AP or accuracy) loses without it, which predicts all '
        'images once for every expert',
    )
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument('--keep', type=int, metavar='N', help='keep the N best experts of a layer')
    group.add_argument(
        '--threshold',
        type=float,
        metavar='X',
        help='remove the experts with X or less: --by load --threshold 0 removes those that no '
        'image needs',
    )
    add_layer_option(parser)
    add_output_options(parser)
    return parser.parse_args(argv)


def prune_checkpoint(args: argparse.Namespace) -> tuple[dict, dict]:
    """Prune a model, measure it, and write it.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        The metrics before and after, see :func:`~mmdet_moe.analysis.measuring.metrics_of`.

    Raises:
        ConfigError: For a mistake in the config, the data or the command line, and if no expert, or
            fewer than k of a layer, would be left.
    """
    check_output(args, args.config, args.checkpoint)
    cfg, model, meta = load_trained(args)
    groups = layers_by_field(cfg, model, args.layer)
    layers = {name: layer for group in groups.values() for name, layer in group.items()}
    if args.keep is not None:
        for name, layer in layers.items():
            _check_left(name, layer, args.keep)
            if args.keep >= layer.num_experts:
                raise ConfigError(
                    f'--keep {args.keep}: layer "{name}" has {layer.num_experts} experts; keep '
                    'fewer, or name other layers with --layer'
                )
        _check_parts(cfg, groups, args.keep)
    data = images_of(args, cfg, meta)
    found, usage = observed(model, data, layers)
    values = {name: usage[name][args.by] for name in layers if args.by != 'effect'}
    if args.by == 'effect':
        values = _effects(model, data, layers, found)
    kept = {}
    for place, group in groups.items():
        kept |= _kept(args, group, values)
        _check_parts(cfg, [place], len(kept[next(iter(group))]))
    if all(len(kept[name]) == layer.num_experts for name, layer in layers.items()):
        raise ConfigError(
            f'--threshold {args.threshold:g}: every expert has more {args.by}, so that nothing '
            f'would be removed; the least has {min(map(min, values.values())):g}'
        )
    smaller_cfg = copy.deepcopy(cfg)
    for place, group in groups.items():
        node_at(smaller_cfg, place)['num_experts'] = len(kept[next(iter(group))])
    smaller = without_experts(model, kept, build_model(smaller_cfg))
    before, after, text = compare(data, found, predict(smaller, data, 'pruned'))
    changed = {n: layer for n, layer in layers.items() if len(kept[n]) < layer.num_experts}
    notes = [
        f'prune_experts: layer "{name}" has kept the experts {_numbers(kept[name])} of '
        f'{layer.num_experts}, by {args.by} on {len(data)} images ({args.split})'
        for name, layer in changed.items()
    ]
    write_model(args.out, smaller_cfg, smaller, meta, notes)
    print('', _table(layers, usage, values, kept), '', text, *_remarks(cfg, changed), sep='\n')
    print(f'\nPruned model: {args.out}')
    return before, after


def without_experts(
    model: nn.Module, kept: Mapping[str, Sequence[int]], smaller: nn.Module
) -> nn.Module:
    """Give a model whose layers have fewer experts the weights of a trained one.

    Args:
        model: The trained model.
        kept: Indices, ascending, of the experts that are left, by layer.
        smaller: The model of the config with fewer experts; it is changed.

    Returns:
        ``smaller``, on the other model's device, for evaluation.

    Raises:
        ConfigError: If the models differ in more than their experts.
    """
    smaller.to(next(model.parameters()).device).eval()
    layers = find_moe_layers(model), find_moe_layers(smaller)
    for name, experts in kept.items():
        keep_experts(layers[0][name], experts, layers[1][name])
    inside = tuple(f'{name}.' for name in kept)
    state = {n: v for n, v in smaller.state_dict().items() if n.startswith(inside)}
    state |= {n: v for n, v in model.state_dict().items() if not n.startswith(inside)}
    smaller.load_state_dict(state)
    return smaller


def _check_left(name: str, layer: MoELayer, number: int) -> None:
    if number < layer.top_k:
        raise ConfigError(
            f'layer "{name}" chooses top_k={layer.top_k} experts for each item and would be left '
            f'with {number} of {layer.num_experts}; keep more'
        )


def _check_parts(cfg: Config, places: Iterable[Place], number: int) -> None:
    for place in places:
        if number % (parts := node_at(cfg, place).get('expert_parallel', 1)):
            field = '.'.join(map(str, ('model', *place, 'expert_parallel')))
            raise ConfigError(
                f'{field}={parts} does not divide the {number} experts that would be left; keep '
                f'another number, or add --cfg-options {field}=1'
            )


def _effects(
    model: nn.Module, data: AnalysisData, layers: dict[str, MoELayer], found: BoxRecords
) -> dict[str, list[float]]:
    """What the metric loses without each expert, the others being chosen instead."""
    metric, before = main_metric(metrics_of(found, data))
    if before is None:
        raise ConfigError(f'--by effect: there is no {metric} on these images; choose others')
    effects: dict[str, list[float]] = {}
    for name, layer in layers.items():
        effects[name] = []
        for e in range(layer.num_experts):
            with applied(Intervention(name, 'without', e), layers):
                after = measure(model, data, f'{name} without expert {e}')
            effects[name].append(before - main_metric(after)[1])
    return effects


def _kept(
    args: argparse.Namespace, group: dict[str, MoELayer], values: dict[str, list[float]]
) -> dict[str, list[int]]:
    """The experts that stay, by layer, the same number in all of a group."""
    number = args.keep
    if number is None:
        above = {name: sum(v > args.threshold for v in values[name]) for name in group}
        # What is above the threshold stays everywhere.
        name = max(above, key=above.__getitem__)
        number = above[name]
        _check_left(name, group[name], number)
    return {
        name: sorted(sorted(range(len(values[name])), key=lambda e: -values[name][e])[:number])
        for name in group
    }


def _remarks(cfg: Config, layers: dict[str, MoELayer]) -> list[str]:
    remarks = []
    for name, layer in layers.items():
        router = layer.router
        if router.softmax == 'over_all' or isinstance(router.constraint, BiasBalancing):
            remarks.append(
                f'The router of "{name}" goes by the softmax over all experts, which those that '
                'are left now have for themselves: also without experts that nobody chose the '
                'outputs change.'
            )
    if 'DatasetLoss' in str(cfg.get('custom_hooks')):
        remarks.append(
            'DatasetLoss, in custom_hooks, knows the experts by their numbers, which are others '
            'now: look at its sources before you train on.'
        )
    return ['', *remarks] if remarks else []


def _table(
    layers: dict[str, MoELayer],
    usage: dict[str, dict[str, list[float]]],
    values: dict[str, list[float]],
    kept: dict[str, list[int]],
) -> str:
    lines = [('layer', 'expert', *CRITERIA, '')]
    for name, layer in layers.items():
        for e in range(layer.num_experts):
            load, importance = (f'{usage[name][key][e]:.4f}' for key in USAGE)
            effect = '-' if values[name] in usage[name].values() else f'{values[name][e]:+.4f}'
            fate = 'kept' if e in kept[name] else 'removed'
            lines.append((name, str(e), load, importance, effect, fate))
    return in_columns(lines)


def _numbers(experts: Sequence[int]) -> str:
    return ', '.join(map(str, experts))
