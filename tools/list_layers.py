"""List the layers of a config's model that can become experts; ``--help`` lists the arguments.

The paths are what `experts=[dict(at=...)]` and `add_experts` take.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

# From a checkout the tool works without an installed package, too.
if importlib.util.find_spec('mmdet_moe') is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_moe.cli import load_config
from mmdet_moe.engine.dry_run import add_options, build_model, dry_run, image_size
from mmdet_moe.errors import exit_on_user_error
from mmdet_moe.moe.surgery.paths import find_places
from mmdet_moe.moe.surgery.survey import survey, table


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0].split(';')[0])
    add_options(parser)
    parser.add_argument('--at', metavar='PATH', help='list what lies here, for example backbone.*')
    parser.add_argument(
        '--depth', type=int, default=4, help='names below --at, numbers not counted (default: 4)'
    )
    args = parser.parse_args(argv)
    with exit_on_user_error():
        print(list_layers(args))


def list_layers(args: argparse.Namespace) -> str:
    """The table."""
    cfg = load_config(args.config, args.cfg_options)
    size = image_size(cfg, args.shape)
    model = build_model(cfg)
    places = (
        ['']
        if args.at is None
        else [path for place in find_places(model, args.at) for path in place.paths]
    )
    run, *also = (
        dry_run(model, cfg.default_scope, size, mode=mode, suggest=mode == 'tensor')
        for mode in ('tensor', 'predict', 'loss')
    )
    return table(survey(model, run, places, args.depth, also))


if __name__ == '__main__':
    main()
