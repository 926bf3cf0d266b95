"""``python -m mmdet_moe.ops [--build]``: which kernels serve the ops, and building them."""

import argparse
import os
import sys
import time

from mmdet_moe.errors import exit_on_user_error


def main() -> None:
    """Print what serves each device, and why; build first if asked to."""
    parser = argparse.ArgumentParser(
        prog='python -m mmdet_moe.ops',
        description='Which kernels serve dispatch and combine on each device, and why.',
    )
    parser.add_argument(
        '--build', action='store_true', help='compile the kernels (again) for this environment'
    )
    args = parser.parse_args()
    if args.build:
        from mmdet_moe.ops import build

        start = time.perf_counter()
        print('compiling (a minute or two with CUDA) ...', flush=True)
        for entry in build.build():
            print(f'{entry.device}: {entry.reason or "built"}')
        print(f'{time.perf_counter() - start:.0f} s\n', flush=True)
        # What this process loaded is the state before.
        os.execv(sys.executable, [sys.executable, '-m', 'mmdet_moe.ops'])
    from mmdet_moe.ops import native

    for entry in native.kernels():
        print(f'{entry.device:5s} {"native   " if entry.native else "reference"} {entry.detail}')


if __name__ == '__main__':
    with exit_on_user_error():
        main()
