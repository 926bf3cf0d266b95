"""Training steps of a config in float32 and in bfloat16, as ``tools/train.py`` makes them on a CPU.

``python -m research.benchmarks.mixed_precision CONFIG --cfg-options data_root=DIR`` prints images
per second of CPU time, which other work on the machine disturbs less than it does the clock. The
kinds take turns, on one thread; loading the data is part of a step.
"""

import argparse
import time
from collections.abc import Callable
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from mmdet_moe.cli import load_config, parse_options, set_loader_defaults
from mmdet_moe.compat.amp import CpuAmpOptimWrapper
from mmdet_moe.compat.malloc import keep_large_blocks
from mmdet_moe.engine.channels_last import ChannelsLastHook

KINDS = ('float32', 'float32, channels_last', 'bfloat16', 'bfloat16, channels_last')
WARM_UP = 2


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('--steps', type=int, default=10, help='of each kind (%(default)s)')
    parser.add_argument('--cfg-options', nargs='+', default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_blocks()
    cfg = load_config(
        args.config, parse_options([*args.cfg_options, 'train_dataloader.num_workers=0'])
    )
    set_loader_defaults(cfg)
    init_default_scope(cfg.default_scope)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    batches = chain.from_iterable(repeat(loader))
    steppers = {kind: _stepper(cfg, kind) for kind in KINDS}
    seconds = {kind: [] for kind in KINDS}
    # In bfloat16 on a processor without it, too: how much slower that is.
    with patch('mmdet_moe.compat.amp.has_bfloat16', return_value=True):
        for _ in range(WARM_UP + args.steps):
            for kind, step in steppers.items():
                started = time.process_time()
                step(next(batches))
                seconds[kind].append(time.process_time() - started)
    fastest = {kind: min(times[WARM_UP:]) for kind, times in seconds.items()}
    for kind, best in fastest.items():
        ratio = fastest[KINDS[0]] / best
        print(f'{kind:24s} {loader.batch_size / best:7.1f} images/s  {ratio:.2f} x')


def _stepper(cfg: Config, kind: str) -> Callable[[Any], Any]:
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.train()
    wrapper = dict(cfg.optim_wrapper)
    if kind.startswith('bfloat16'):
        wrapper['type'] = CpuAmpOptimWrapper.__name__
    if kind.endswith('channels_last'):
        ChannelsLastHook().before_train(SimpleNamespace(model=model))
    optimizer = build_optim_wrapper(model, wrapper)
    return lambda batch: model.train_step(batch, optimizer)


if __name__ == '__main__':
    main()
