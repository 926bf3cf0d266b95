"""``python -m mmdet_moe.ops [--build]``: which kernels serve the ops, and building them."""

import argparse
import subprocess
import sys
import time

from mmdet_moe.errors import exit_on_user_error


def main() -> None:
    """Print what serves each device, and why; build first if asked to.

    The exit status is 1 if a compilation fails, and 0 if there is nothing to compile with.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_moe.ops',
        description='Which kernels serve the ops on each device, and why.',
    )
    parser.add_argument(
        '--build', action='store_true', help='compile the kernels (again) for this environment'
    )
    args = parser.parse_args()
    if args.build:
        from mmdet_moe.ops import build

        start = time.perf_counter()
        print('compiling (a minute or two with CUDA) ...', flush=True)
        try:
            results = build.build()
        except build.BuildError as error:
            print(f'error: {error}', file=sys.stderr)
            raise SystemExit(1) from None
        for built in results:
            print(f'{built.device}: {built.reason or "built"}')
        print(f'{time.perf_counter() - start:.0f} s\n', flush=True)
        # What this process loaded is the state before.
        status = subprocess.run([sys.executable, '-m', 'mmdet_moe.ops'], check=False).returncode
        raise SystemExit(1 if any(built.failed for built in results) else status)
    from mmdet_moe.ops import native

    entries = native.kernels()
    native.check()
    for entry in entries:
        print(f'{entry.device:5s} {"native   " if entry.native else "reference"} {entry.detail}')


if __name__ == '__main__':
    with exit_on_user_error():
        main()
