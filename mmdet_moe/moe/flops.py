"""Floating-point operations of a module, counted by PyTorch while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmdet_moe.moe.experts import ConvExperts, ModuleExperts


def count_flops(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """FLOPs of one forward pass in eval mode, a multiplication and an addition counted as two.

    On the ``meta`` device nothing is computed; a router needs real values.

    Args:
        module: Left as it was, but for what it remembers of its latest forward pass.
        *args, **kwargs: Its inputs.
    """
    with counting(module) as counter:
        module(*args, **kwargs)
    return counter.get_total_flops()


@contextmanager
def counting(model: nn.Module) -> Iterator['FlopCounter']:
    """Count the FLOPs of what a model computes inside of the ``with``, in eval mode.

    Sparse experts count as far as items are sent to them: one image gives the *active* FLOPs of a
    model that routes images. They do not depend on the device: k experts that are convolutions
    count as k, also where mixing their kernels first makes one of them.
    """
    # Without mixed kernels, and without the margins of sheets.
    impls = {m: 'subbatches' for m in model.modules() if isinstance(m, ConvExperts)}
    impls |= {m: 'levels' for m in model.modules() if isinstance(m, ModuleExperts)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        impls = _exchanged(impls)
        # PyTorch's counter hooks into gradients, and fails where a parameter is an input.
        for parameter in trainable:
            parameter.requires_grad_(False)
        with evaluating(model), FlopCounter() as counter:
            yield counter
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        _exchanged(impls)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients inside of the ``with``; then each part as it was."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def _exchanged(impls: dict[Any, str]) -> dict[Any, str]:
    """Set how experts compute; how they did before."""
    before = {experts: experts.impl for experts in impls}
    for experts, impl in impls.items():
        experts.impl = impl
    return before


class FlopCounter(FlopCounterMode):
    """PyTorch's counter, which also counts what PyTorch's takes for nothing."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)

    def __enter__(self) -> 'FlopCounter':
        # Its one operator would count for nothing.
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *args: Any) -> Any:
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
        return super().__exit__(*args)

    def by_module(self, model: nn.Module) -> dict[str, int]:
        """FLOPs of every module of a model that was run, by its path; '' is all of it."""
        name = type(model).__name__
        return {
            path.removeprefix(name).removeprefix('.'): sum(counts.values())
            for path, counts in self.get_flop_counts().items()
            if path == name or path.startswith(name + '.')
        }


def _grouped_product(rows: torch.Size, matrices: torch.Size, *_: Any, **__: Any) -> int:
    """FLOPs of ``F.grouped_mm`` as our experts call it: (R, in) by (E, in, out)."""
    return 2 * rows.numel() * matrices[-1]


#: Of what PyTorch's counter takes for nothing; older versions of PyTorch do not have them.
_FORMULAS = {
    getattr(torch.ops.aten, name): formula
    for name, formula in {
        '_grouped_mm': _grouped_product,
        '_scaled_dot_product_flash_attention_for_cpu': lambda q, k, v, *_, **__: sdpa_flop_count(
            q, k, v
        ),
    }.items()
    if hasattr(torch.ops.aten, name)
}
