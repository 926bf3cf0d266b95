"""What ``torch.compile`` leaves alone; to import this imports dynamo, which takes two seconds."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable
def call_uncompiled(function: Callable, *args: Any) -> Any:
    """``function(*args)``: one graph ends before the call, the next one begins behind it."""
    return function(*args)
