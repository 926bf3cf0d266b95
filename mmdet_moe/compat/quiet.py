"""Messages of the toolboxes that a user can do nothing about, left out by their own words.

They are about packages that nothing here uses, about the toolboxes' calls of each other, and about
boxes at the edge of an image.
"""

import warnings
from functools import wraps
from typing import Any

#: How messages of ``print_log`` begin.
MESSAGES = (
    'Could not import OneDL',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
)
#: How warnings begin, as regular expressions.
WARNINGS = (
    'faster_coco_eval is not installed',
    r'Warning: The (bbox|polygon) is out of bounds',
)


def hush(module: Any) -> None:
    """Leave these messages out of ``mmengine.logging.print_log``, and the warnings."""
    theirs = module.print_log

    @wraps(theirs)
    def print_log(msg: Any, *args: Any, **kwargs: Any) -> None:
        if not str(msg).startswith(MESSAGES):
            theirs(msg, *args, **kwargs)

    module.print_log = print_log
    for message in WARNINGS:
        warnings.filterwarnings('ignore', message=message)
