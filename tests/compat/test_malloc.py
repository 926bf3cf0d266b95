"""Freed blocks stay in the process."""

import platform
import subprocess
import sys

import pytest

from mmdet_moe.compat.malloc import keep_large_blocks

# Like a network's steps: tensors of some sizes above 32 MiB, again and again. Counts the pages that
# the system has to hand out once the process has grown to what it needs.
CODE = """
import resource, torch
from mmdet_moe.compat.malloc import keep_large_blocks

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (40, 64, 48, 64, 56):
        torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keep}:
    assert keep_large_blocks()
for _ in range(10):
    step()
print(sum(step() for _ in range(4)))
"""


def faults(keep):
    done = subprocess.run(
        [sys.executable, '-c', CODE.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='not the GNU C library')
def test_no_new_pages_after_some_steps():
    without = faults(keep=False)
    if without < 1000:
        pytest.skip('the system hands out huge pages')
    assert faults(keep=True) < 0.1 * without


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('musl', '1.2'))
    assert keep_large_blocks() is False
