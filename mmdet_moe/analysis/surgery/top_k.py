"""``tools/set_top_k.py``: a model that chooses another number of experts for each item."""

import argparse
import copy
from collections.abc import Mapping, Sequence

from mmengine.config import Config
from torch import nn

from mmdet_moe.analysis.measuring import images_of, load_trained, predict
from mmdet_moe.analysis.models import build_model
from mmdet_moe.analysis.surgery.fields import Place, add_layer_option, layers_by_field, node_at
from mmdet_moe.analysis.surgery.outputs import (
    add_output_options,
    check_output,
    compare,
    write_model,
)
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.surgery.fewer import set_top_k


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Let a trained model choose another number of experts for each item, without '
        'training; show what that does to the metric, and write the checkpoint and its config.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--top-k', type=int, required=True, metavar='K', help='experts for each decision'
    )
    add_layer_option(parser)
    add_output_options(parser)
    return parser.parse_args(argv)


def change_top_k(args: argparse.Namespace) -> tuple[dict, dict]:
    """Give a model another k, measure it, and write it.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        The metrics before and after, see :func:`~mmdet_moe.analysis.measuring.metrics_of`.

    Raises:
        ConfigError: For a mistake in the config, the data or the command line; if a layer has fewer
            experts, or all have that k already; and if the config cannot say it.
    """
    check_output(args, args.config, args.checkpoint)
    cfg, model, meta = load_trained(args)
    groups = layers_by_field(cfg, model, args.layer)
    layers = {name: layer for group in groups.values() for name, layer in group.items()}
    usual = set_top_k(model, dict.fromkeys(layers, args.top_k))  # complains before any long work
    set_top_k(model, usual)
    changed = {name: k for name, k in usual.items() if k != args.top_k}
    if not changed:
        raise ConfigError(
            f'--top-k {args.top_k}: every layer ({", ".join(layers)}) has it already; give another '
            'number'
        )
    other_cfg = copy.deepcopy(cfg)
    for place, group in groups.items():
        _set(other_cfg, place, group, args.top_k)
    other = _with_weights_of(model, other_cfg)
    data = images_of(args, cfg, meta)
    found = predict(model, data, 'as it was'), predict(other, data, f'top_k={args.top_k}')
    before, after, text = compare(data, *found)
    notes = [
        f'set_top_k: layer "{name}" chooses {args.top_k} of {layers[name].num_experts} experts '
        f'instead of {k}'
        for name, k in changed.items()
    ]
    write_model(args.out, other_cfg, other, meta, notes)
    print('', *notes, '', text, sep='\n')
    print(f'\nModel with another k: {args.out}')
    return before, after


def _set(cfg: Config, place: Place, layers: Mapping[str, MoELayer], top_k: int) -> None:
    """Write k into a config, and what would go by it: the order of softmax and choice, the width.

    The config's ``'over_chosen'`` is refused for k = 1, of which no router learns;
    ``'straight_through'`` has the same weights, and goes on learning.
    """
    node = node_at(cfg, place)
    first, *others = layers.values()
    router = node.get('router')
    if router is None and 'experts' in place:  # that of all entries
        last = len(place) - 1 - place[::-1].index('experts')
        router = node_at(cfg, place[:last]).get('router')
    softmax = first.router.softmax
    if top_k == 1 and softmax == 'over_chosen':
        softmax = 'straight_through'
    node.update(top_k=top_k, router={**(router or {}), 'softmax': softmax})
    if node.get('width') == 'equal':
        if any(layer.width != first.width for layer in others):
            raise ConfigError(
                f"width='equal' of {', '.join(layers)} is not one number, which it has to be "
                'with another top_k; give each an entry of its own in experts'
            )
        node['width'] = first.width


def _with_weights_of(model: nn.Module, cfg: Config) -> nn.Module:
    """The model of a config with the weights of one that differs in the k of its layers."""
    other = build_model(cfg).to(next(model.parameters()).device).eval()
    state, wanted = model.state_dict(), other.state_dict()
    for name in sorted(state.keys() | wanted.keys()):
        shapes = [tuple(each[name].shape) if name in each else None for each in (state, wanted)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"'{name}' of the shape {shapes[0]} would be {shapes[1]} with another top_k, for "
                'the config leaves the router or the width of the experts to a class that goes by '
                'top_k; say them there as the trained model has them'
            )
    other.load_state_dict(state)
    return other
