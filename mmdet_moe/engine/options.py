"""The option of the tools that overrides fields of a config."""

import argparse
from collections.abc import Sequence
from typing import Any

from mmengine.config import DictAction


class _Fields(DictAction):
    """Where MMEngine's has a traceback, what is no ``KEY=VALUE`` is a mistake in one sentence."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for text in values or ():
            try:
                super().__call__(parser, namespace, [text], option_string)
            except (ValueError, AssertionError):  # no =, or a bracket that is not closed
                message = f'{text!r} is no KEY=VALUE; write for example model.neck.num_outs=5'
                raise argparse.ArgumentError(self, message) from None


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options KEY=VALUE …``, by dotted key; None without it."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Fields,
        metavar='KEY=VALUE',
        help='override fields of the config, for example optim_wrapper.optimizer.lr=0.01; '
        'data_root=DIR moves every path below the old data_root',
    )
