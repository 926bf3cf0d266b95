"""Kill trainings and analyses at random moments, go on, and compare with uninterrupted ones.

::

    python -m research.checks.interruptions --moments 20

A tiny classifier is trained, by one process and by two, with what a training keeps besides weights:
an exponential moving average, gradients over two iterations, a hard constraint, noise, random
flips, Adam. Then it is analysed. Every opening, renaming and removal of a file is a moment at which
the process may be killed (SIGKILL), so that iterations come up as well as checkpoints, records and
pictures that are being written: the file that was opened last is left with a part of its content.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from mmdet_moe.analysis.command import run_analysis
from mmdet_moe.analysis.files import EXPERTS_FILE
from mmdet_moe.cli import run_train
from mmdet_moe.registry import HOOKS, MODELS

ITERATIONS = 5
CONFIG = """
default_scope = 'mmpretrain'
loader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root='data', pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(type='PackInputs')]),
)
train_dataloader = loader
val_dataloader = test_dataloader = dict(loader, sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=ITERATIONS, val_interval=2)
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='Adam', lr=0.01), accumulative_counts=2)
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=False, T_max=ITERATIONS)
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1, max_keep_ckpts=1,
                    save_best='accuracy/top1'),
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
)
custom_hooks = [
    dict(type='EMAHook', momentum=0.1),
    dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.ImportanceLoss')),
]
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed=0)
model = dict(
    type='mmdet_moe.WithExperts', of='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=18, base_channels=4, stem_channels=4,
                  out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32,
              loss=dict(type='CrossEntropyLoss')),
    experts=[
        dict(at='backbone.layer2.0', num_experts=3, top_k=2,
             router=dict(type='mmdet_moe.GAPRouter', noise=True)),
        dict(at='backbone.layer3.0', num_experts=4, top_k=1,
             router=dict(type='mmdet_moe.GAPRouter', constraint=dict(
                 type='mmdet_moe.RelativeImportanceConstraint', threshold=0.1))),
    ],
)
"""
_WRITING = os.O_WRONLY | os.O_RDWR
_UNTIMED = ('time', 'data_time', 'memory', 'eta')


def prepare(folder: Path) -> None:
    """Write the config and its images."""
    rng = np.random.default_rng(0)
    for index in range(6):
        images = folder / 'data' / 'ab'[index % 2]
        images.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(images / f'{index}.png'), rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    (folder / 'tiny.py').write_text(CONFIG.replace('ITERATIONS', str(ITERATIONS)))


def import_all() -> None:
    """Import the toolboxes before the processes are forked, so that each starts at once."""
    from mmpretrain.utils import register_all_modules

    torch.set_num_threads(1)
    register_all_modules(init_default_scope=False)
    MODELS.import_from_location()
    HOOKS.import_from_location()


def train(*arguments: str) -> None:
    """In the working folder."""
    run_train(['tiny.py', '--work-dir', 'run', *arguments])


def analyse() -> None:
    """In the working folder, after :func:`train`."""
    files = ['tiny.py', f'run/iter_{ITERATIONS}.pth', '--out', 'out']
    run_analysis([*files, '--no-interventions'])


class _Killer:
    """Counts what happens to the files below a folder, and kills the process at a moment."""

    def __init__(self, folder: Path, moment: int | None, share: float) -> None:
        self._folder, self._moment, self._share = str(folder.resolve()), moment, share
        self._opened: tuple[str, int] | None = None
        self.count = 0

    def __call__(self, event: str, args: tuple) -> None:
        if event not in ('open', 'os.rename', 'os.remove') or not isinstance(args[0], (str, Path)):
            return
        path = os.path.abspath(args[0])
        if not path.startswith(self._folder) or (event == 'open' and not args[2] & _WRITING):
            return
        self.count += 1
        if self.count == self._moment:
            if self._opened is not None:
                name, before = self._opened
                size = os.path.getsize(name)
                os.truncate(name, before + int(self._share * max(size - before, 0)))
            os.kill(os.getpid(), signal.SIGKILL)
        appends = event == 'open' and not args[2] & os.O_TRUNC and os.path.exists(path)
        before = os.path.getsize(path) if appends else 0
        self._opened = (path, before) if event == 'open' else None


def in_processes(
    folder: Path,
    function: Callable[[], None],
    ranks: int = 1,
    moment: int | None = None,
    share: float = 0.5,
) -> int:
    """Run a function in forked processes, with a folder as working folder.

    Args:
        folder: Also what is watched; the output goes to ``output.log`` in it.
        function: Of no arguments.
        ranks: How many processes, as a launcher would start them.
        moment: At which file operation of the first process it is killed, counted from 1; None:
            never.
        share: Of the file that was opened last, how much was written before.

    Returns:
        How many file operations there were, or 0 if it was killed.

    Raises:
        RuntimeError: It failed in another way.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    reader, writer = os.pipe()
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.chdir(folder)
                log = os.open('output.log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
                if ranks > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                    )  # fmt: skip
                killer = _Killer(folder, moment if rank == 0 else None, share)
                sys.addaudithook(killer)
                function()
                if rank == 0:
                    os.write(writer, str(killer.count).encode())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    os.close(writer)
    count = os.read(reader, 20)
    os.close(reader)
    _, status = os.waitpid(children[0], 0)
    was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    for child in children[1:]:
        if was_killed:
            os.kill(child, signal.SIGKILL)  # as a launcher does
        os.waitpid(child, 0)
    if status and not was_killed:
        raise RuntimeError((folder / 'output.log').read_text()[-3000:])
    return 0 if was_killed else int(count)


def outcome(folder: Path) -> dict:
    """What must not depend on interruptions, in a form that ``==`` compares bit for bit."""
    checkpoint = torch.load(folder / 'run' / f'iter_{ITERATIONS}.pth')
    content = {
        key: _plain(checkpoint[key])
        for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
    }
    logs: dict = {}
    for path in sorted((folder / 'run').glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the process was killed while it wrote the line
            values = {key: row[key] for key in row if key not in _UNTIMED}
            logs[row['step'], 'accuracy/top1' in row] = values
    content['logs'] = logs
    best = folder.glob('run/best_*.pth')
    content['best'] = {path.name: _plain(torch.load(path)['state_dict']) for path in best}
    if (experts := folder / 'out' / EXPERTS_FILE).exists():
        content['experts'] = experts.read_bytes()
    return content


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_training(folder: Path, ranks: int, moment: int, share: float, expected: dict) -> bool:
    """Kill a training, resume it, and compare.

    Returns:
        Whether it was killed; if not, it had ended before the moment.

    Raises:
        AssertionError: It ends with something else than the uninterrupted one.
    """
    prepare(folder)
    launcher = ('--launcher', 'pytorch') if ranks > 1 else ()
    killed = not in_processes(folder, lambda: train(*launcher), ranks, moment, share)
    in_processes(folder, lambda: train('--resume', *launcher), ranks)
    _compare(outcome(folder), expected, f'training of {ranks}, moment {moment}')
    return killed


def check_analysis(folder: Path, moment: int, share: float, expected: dict) -> bool:
    """Kill an analysis in the folder of a finished training, start it again, and compare.

    Returns:
        Whether it was killed.

    Raises:
        AssertionError: It ends with something else than the uninterrupted one.
    """
    killed = not in_processes(folder, analyse, 1, moment, share)
    in_processes(folder, analyse)
    _compare(outcome(folder), expected, f'analysis, moment {moment}')
    return killed


def _compare(got: dict, expected: dict, what: str) -> None:
    different = [key for key in expected if got.get(key) != expected[key]]
    assert not different, f'{what}: other {", ".join(different)}'


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--moments', type=int, default=20, metavar='N', help='kills (20)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (0)')
    args = parser.parse_args(argv)
    import_all()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        expected, counts = {}, {}
        for ranks in (1, 2):
            folder = root / f'whole{ranks}'
            prepare(folder)
            launcher = ('--launcher', 'pytorch') if ranks > 1 else ()
            count = in_processes(folder, lambda launcher=launcher: train(*launcher), ranks)
            expected[ranks], counts[ranks] = outcome(folder), count
        counts['analysis'] = in_processes(root / 'whole1', analyse)
        expected['analysis'] = outcome(root / 'whole1')
        killed = 0
        for number in range(args.moments):
            kind = (1, 2, 'analysis')[number % 3]
            moment, share = rng.randint(1, counts[kind]), rng.random()
            folder = root / str(number)
            if kind == 'analysis':
                prepare(folder)
                in_processes(folder, train)
                killed += check_analysis(folder, moment, share, expected[kind])
            else:
                killed += check_training(folder, kind, moment, share, expected[kind])
            print(f'{number + 1}: {kind}, moment {moment} of {counts[kind]}: as uninterrupted')
    print(f'{killed} of {args.moments} were killed; all ended as the uninterrupted runs.')


if __name__ == '__main__':
    main()
