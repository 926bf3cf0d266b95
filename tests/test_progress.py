import io
import sys

import pytest

from mmdet_moe.progress import progress_bar


@pytest.mark.parametrize(
    ('terminal', 'hidden', 'shown'),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_only_a_terminal_shows_it(terminal, hidden, shown, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, 'stderr', stream)
    assert list(progress_bar(range(3), hidden, desc='images')) == [0, 1, 2]
    assert ('images:' in stream.getvalue()) == shown
    assert '\n' not in stream.getvalue()
