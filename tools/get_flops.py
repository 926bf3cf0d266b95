"""FLOPs and parameters of a config's layers of experts; ``--help`` lists the arguments."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.cli import load_config
from mmdet_moe.engine.dry_run import add_options, build_model, dry_run, image_size
from mmdet_moe.errors import exit_on_user_error
from mmdet_moe.moe.surgery.costs import cost_table, costs_of

LEGEND = """
FLOPs of one blank image of {}×{} pixels, without pre- and postprocessing; a multiplication and an
addition are two. dense: what stood there before. active: the k experts of each decision. worst:
the FLOPs of the dearest decisions, and the parameters of all experts that they can need. all:
every expert on everything.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split(';')[0])
    add_options(parser)
    args = parser.parse_args(argv)
    with exit_on_user_error():
        print(get_flops(args))


def get_flops(args: argparse.Namespace) -> str:
    """The table."""
    cfg = load_config(args.config, args.cfg_options)
    size = image_size(cfg, args.shape)
    model = build_model(cfg)
    run = dry_run(model, cfg.default_scope, size, num_images=1, suggest=True)
    return cost_table(costs_of(model, run)) + '\n' + LEGEND.format(*size)


if __name__ == '__main__':
    main()
