"""What figures depend on: the machine, the versions, the kernels."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmdet_moe.ops import native
from mmdet_moe.version import __version__
from research.runs import REPOSITORY

PACKAGES = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'numpy')


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that figures depend on."""
    return {
        'date': time.strftime('%Y-%m-%d %H:%M:%S %z'),
        'commit': _commit(),
        'python': platform.python_version(),
        'platform': platform.platform(),
        'versions': {'mmdet_moe': __version__} | _versions(),
        'cpu': _cpu_name(),
        'cpus': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load_average': os.getloadavg() if hasattr(os, 'getloadavg') else None,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name(),
        'cuda': torch.version.cuda if device.type == 'cuda' else None,
        'kernels': [asdict(entry) for entry in native.kernels()],
    }


@cache
def _versions() -> dict[str, str]:
    """Of the packages that are installed, whatever distribution they come from."""
    distributions, versions = importlib.metadata.packages_distributions(), {}
    for name in PACKAGES:
        # Python 3.10 does not know the packages of every distribution.
        for distribution in distributions.get(name, (f'onedl-{name}', name)):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions.setdefault(name, importlib.metadata.version(distribution))
    return versions


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of this checkout; None where there is none."""
    if not (REPOSITORY / '.git').exists():
        return None  # and not that of a repository around the environment
    describe = ('describe', '--always', '--abbrev=40', '--exclude=*', '--dirty= with changes')
    with contextlib.suppress(OSError):
        command = ['git', '-C', str(REPOSITORY), *describe]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None
