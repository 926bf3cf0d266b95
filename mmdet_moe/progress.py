"""Progress bars, for somebody who watches."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(items: Iterable | None = None, hidden: bool = False, **options: Any) -> tqdm:
    """A bar of ``tqdm`` on a terminal; elsewhere it would fill a log with its copies.

    A bar that is not shown does not count: its ``n`` stays 0.

    Args:
        items: What to go through, if the bar shall do so.
        hidden: Not even on a terminal. ``TQDM_DISABLE=1`` hides all of them.
        **options: Of ``tqdm``.
    """
    if hidden or not sys.stderr.isatty():
        options['disable'] = True
    return tqdm(items, leave=False, mininterval=0.5, **options)
