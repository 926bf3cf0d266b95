"""Three of the moments of the check; ``python -m research.checks.interruptions`` has more.

Run by test_interruptions.py, in a process that has computed nothing before.
"""

import resource
import shutil
import signal

import pytest

from research.checks import interruptions
from research.checks.interruptions import (
    analyse,
    check_analysis,
    check_training,
    in_processes,
    outcome,
    train,
    uninterrupted,
)


@pytest.fixture(scope='module', autouse=True)
def short():
    interruptions.import_all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interruptions, 'ITERATIONS', 3)
        yield


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    return folder, *uninterrupted(folder, 1)


def on_a_full_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    train('--resume')


def test_killed_then_out_of_space(whole, tmp_path):
    _, expected, count = whole

    def fill_the_disk():
        before = {path.name: path.read_bytes() for path in (tmp_path / 'run').glob('*.pth')}
        assert before
        with pytest.raises(RuntimeError, match='SystemExit: 2'):
            in_processes(tmp_path, on_a_full_disk)
        output = (tmp_path / 'output.log').read_text().splitlines()
        (line,) = [line for line in output if line.startswith('error: ')]
        assert 'cannot be written: File too large' in line
        assert line.endswith('a training with --resume')
        assert before == {path.name: path.read_bytes() for path in (tmp_path / 'run').glob('*.pth')}

    # While the checkpoint of the second iteration, between two steps of the optimizer, is written.
    assert check_training(tmp_path, 1, count // 2, 0.5, expected, fill_the_disk)


def test_killed_with_two_ranks(tmp_path):
    expected, count = uninterrupted(tmp_path / 'whole', 2)
    assert check_training(tmp_path / 'killed', 2, count * 2 // 3, 0.3, expected)


def test_a_killed_analysis(whole, quick_analysis):
    folder, _, _ = whole
    count = in_processes(folder, analyse)
    expected = outcome(folder)
    assert 'experts' in expected
    shutil.rmtree(folder / 'out')
    assert check_analysis(folder, count // 3, 0.5, expected)
