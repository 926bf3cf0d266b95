"""Freed blocks stay in the process."""

import platform
import subprocess
import sys

import pytest

from mmdet_moe.compat.malloc import keep_large_blocks

# Fills 64 MiB again and again and counts the pages that the system had to hand out for it.
CODE = """
import resource, torch
from mmdet_moe.compat.malloc import keep_large_blocks
if {keep}:
    assert keep_large_blocks()
torch.ones(3 << 23)  # a larger block, because an aligned one asks for a little more than it uses
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep):
    done = subprocess.run(
        [sys.executable, '-c', CODE.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='not the GNU C library')
def test_no_new_pages_for_the_second_tensor():
    pages = 4 * (1 << 26) // 4096
    assert faults(keep=False) > 0.9 * pages  # otherwise nothing is tested
    assert faults(keep=True) < 0.1 * pages


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('musl', '1.2'))
    assert keep_large_blocks() is False
