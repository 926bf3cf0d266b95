#!/usr/bin/env python
"""Everything that needs a GPU, in one command: checks first, then the figures of the docs.

1. which kernels serve the GPU (they have to be compiled ones);
2. the tests of the ops and of the layers on it: the CPU's numbers, streams, CUDA graphs, and how
   often the host waits for it;
3. the ops under compute-sanitizer (memory, races), where that is installed;
4. tools/benchmark_moe.py on it; its tables go to docs/gpu.md.

Exit status 1: a check failed, or a step took longer than it may.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from mmdet_moe.errors import ConfigError, exit_on_user_error
from mmdet_moe.ops import native
from research.benchmarks.gpu_page import write_page
from research.runs import REPOSITORY

TESTS = ('tests/ops', 'tests/moe/test_gpu.py', 'tests/moe/test_linear_experts.py')
SANITIZERS = ('memcheck', 'racecheck')
EXERCISE = """
import torch
from mmdet_moe import ops
for items, width, k, dtype in (
    (1, 1, 1, 'float64'), (37, 5, 3, 'float16'), (300, 264, 2, 'bfloat16'),
    (64, 3000, 2, 'float32'), (5000, 16, 4, 'float32'),
):
    ids = torch.rand(items, 8, device='cuda').topk(k)[1]
    ids[::7, 0] = -1
    offsets, inverse = ops.sort_routes(ids, 8)
    x = torch.randn(items, width, device='cuda', dtype=getattr(torch, dtype), requires_grad=True)
    weights = torch.rand(items, k, device='cuda', dtype=x.dtype, requires_grad=True)
    y = ops.combine(ops.dispatch(x, inverse, int(offsets[-1])), weights, inverse)
    y.sum().backward()
    ops.entmax15(x).sum().backward()
torch.cuda.synchronize()
"""
BENCHMARK_SUITES = ('ops', 'conv', 'retinanet', 'mumoe', 'overhead')


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--page', type=Path, default=REPOSITORY / 'docs' / 'gpu.md')
    parser.add_argument('--work-dir', type=Path, default=REPOSITORY / 'work_dirs' / 'gpu')
    parser.add_argument('--repeats', type=int, default=9, help='rounds of every table')
    args = parser.parse_args(argv)
    with exit_on_user_error():
        if not torch.cuda.is_available():
            raise ConfigError('PyTorch finds no GPU here; this command needs one')
        if not native.is_native(torch.device('cuda')):
            raise ConfigError(
                'there are no compiled kernels for the GPU; build them with '
                '`python -m mmdet_moe.ops --build`'
            )
        raise SystemExit(run(args.page, args.work_dir, args.repeats))


def run(page: Path, folder: Path, repeats: int) -> int:
    """All steps; the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / 'benchmark.json'
    report.unlink(missing_ok=True)
    tests = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-n', '4', *TESTS]
    benchmark = [
        sys.executable, 'tools/benchmark_moe.py', *BENCHMARK_SUITES, '--device', 'cuda',
        '--repeats', str(repeats), '--json', str(report),
    ]  # fmt: skip
    checks = [_step('tests', [*tests, '-k', 'cuda or gpu'], folder, 150)]
    checks += [_sanitized(tool, folder) for tool in SANITIZERS]
    checks.append(_step('benchmark', benchmark, folder, 280))
    if report.exists():
        write_page(page, json.loads(report.read_text()), [text for _, text in checks])
        print(f'The tables are in {page}.')
    return 0 if all(passed for passed, _ in checks) else 1


def _sanitized(tool: str, folder: Path) -> tuple[bool, str]:
    sanitizer = shutil.which('compute-sanitizer') or '/usr/local/cuda/bin/compute-sanitizer'
    if not Path(sanitizer).exists():
        return True, f'compute-sanitizer ({tool}): not installed here, so not run'
    command = [
        sanitizer,
        '--tool',
        tool,
        '--error-exitcode',
        '1',
        '--kernel-regex',
        'kns=mmdet_moe',
        sys.executable,
        '-c',
        EXERCISE,
    ]
    return _step(f'compute-sanitizer ({tool})', command, folder, 60)


def _step(name: str, command: list[str], folder: Path, seconds: float) -> tuple[bool, str]:
    """Run a command; whether it passed, and a sentence that says so."""
    print(f'{name} ...', flush=True)
    begin = time.monotonic()
    log = folder / f'{name.split()[0]}{"-" + command[2] if "sanitizer" in name else ""}.log'
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(REPOSITORY), *sys.path])}
    with log.open('w') as out:
        try:
            code = subprocess.run(
                command, cwd=REPOSITORY, env=env, stdout=out, stderr=subprocess.STDOUT,
                timeout=seconds, check=False,
            ).returncode  # fmt: skip
            outcome = 'passed' if code == 0 else f'FAILED (exit status {code})'
        except subprocess.TimeoutExpired:
            code, outcome = 1, f'FAILED (more than {seconds:.0f} s)'
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    print(f'  {outcome} in {time.monotonic() - begin:.0f} s; {log}', flush=True)
    last = lines[-1].strip('= ') if lines else 'no output'
    return code == 0, f'{name}: {outcome} ({last})'


if __name__ == '__main__':
    main()
