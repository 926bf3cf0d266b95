"""Killed trainings and analyses end as those that were left alone."""

import subprocess
import sys
from pathlib import Path

from running import ROOT


def test_in_a_process_of_its_own(tmp_path):
    """They are forked, which fails where autograd has started threads, as in a test before."""
    file = Path(__file__).with_name('interrupted.py')
    command = [sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider']
    command += ['--basetemp', str(tmp_path / 'alone'), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert '3 passed' in done.stdout
