"""``tools/upcycle.py``: a model with experts out of a trained dense one."""

import argparse
from collections.abc import Sequence

import torch

from mmdet_moe.analysis.measuring import images_of, predict, read_config
from mmdet_moe.analysis.models import build_model, load_model
from mmdet_moe.analysis.surgery.outputs import (
    add_output_options,
    check_output,
    compare,
    write_model,
)
from mmdet_moe.cli import load_config
from mmdet_moe.engine.tested_checkpoint import check_weights
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import find_moe_layers


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Make experts of the layers of a trained dense model: each expert starts as a '
        'copy, and the routers untrained. Show what that does to the metric, and write the '
        'checkpoint with experts and its config.'
    )
    parser.add_argument('dense_config', help='config file of the dense model')
    parser.add_argument('dense_checkpoint', help='its checkpoint file')
    parser.add_argument(
        'moe_config', help='config file of the model with experts, whose images are predicted'
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='for the initial weights of the routers (0)'
    )
    add_output_options(parser)
    return parser.parse_args(argv)


def upcycle_checkpoint(args: argparse.Namespace) -> tuple[dict, dict]:
    """Upcycle a dense model, measure both, and write the new one.

    Args:
        args: As :func:`parse` gives them; ``cfg_options`` are for the config with experts.

    Returns:
        The metrics of the dense model and of the one with experts, see
        :func:`~mmdet_moe.analysis.measuring.metrics_of`.

    Raises:
        ConfigError: For a mistake in the configs, the data or the command line, and if the dense
            weights are not all that the model with experts needs, but for its routers.
    """
    check_output(args, args.dense_config, args.dense_checkpoint, args.moe_config)
    cfg = read_config(args, args.moe_config, args.dense_checkpoint)
    dense_cfg = load_config(args.dense_config)
    dense, meta = load_model(dense_cfg, args.dense_checkpoint, args.device)
    data = images_of(args, cfg, meta)
    torch.manual_seed(args.seed)
    model = build_model(cfg)
    there = find_moe_layers(dense)
    layers = {name: m for name, m in find_moe_layers(model).items() if name not in there}
    if not layers:
        raise ConfigError(
            f"MOE_CONFIG: the model of '{args.moe_config}' has no sparse experts that the dense "
            'one has not; give the config of one that has'
        )
    state = dense.state_dict()
    if left := check_weights(model, state):
        raise ConfigError(
            f'MOE_CONFIG: its model has no place for {len(left)} of the {len(state)} tensors of '
            f"the dense model, such as '{left[0]}'; give configs that differ in their experts alone"
        )
    model.to(next(dense.parameters()).device).eval()
    found = predict(dense, data, 'dense'), predict(model, data, 'with experts')
    before, after, text = compare(data, *found)
    experts = ', '.join(f'{layer.num_experts} in "{name}"' for name, layer in layers.items())
    note = f"upcycle: '{args.dense_checkpoint}' has become experts, {experts}"
    write_model(args.out, cfg, model, meta, [note])
    print('', text, sep='\n')
    print(f'\nModel with experts: {args.out}')
    return before, after
