"""Rows to the experts and back: against ``index_add_``, and against plain copies."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from mmdet_moe import ops
from mmdet_moe.compat.malloc import keep_large_blocks
from mmdet_moe.ops import native, reference
from research.benchmarks.harness import (
    FORWARD,
    PASSES,
    TRAINING,
    Alternative,
    Benchmark,
    Computation,
    Inputs,
)


def run_ops(bench: Benchmark, num_items: int, channels: int) -> None:
    """Dispatch and combine; on a CPU with the memory as the C library gives it, then with kept one.

    This suite comes first, because :func:`keep_large_blocks` cannot be taken back.
    """
    if bench.device.type == 'cpu':
        # A new block is a set of page faults there: the fair limit is a copy that has them, too.
        if not bench.only_watched:
            memory = 'memory: as the C library gives it'
            _compare_ops(bench, num_items, channels, memory, limit='copy into new memory')
        if not keep_large_blocks():
            bench.note('This C library cannot be told to keep memory, so there is no second run.')
            return
    memory = 'memory: kept for reuse'
    _compare_ops(bench, num_items, channels, memory, limit='copy into existing memory')


def _compare_ops(bench: Benchmark, num_items: int, channels: int, memory: str, limit: str) -> None:
    k, num_experts = 2, 8
    x = bench.tensor(num_items, channels)
    ids, weights = bench.routing(num_items, num_experts, k)
    _, inverse = ops.sort_routes(ids, num_experts)
    order, num_rows = inverse.flatten().argsort(), inverse.numel()
    inputs: Inputs = {'x': x, 'weights': weights}

    def index_add() -> Tensor:
        items = torch.div(order, k, rounding_mode='floor')
        rows = x.index_select(0, items) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add_(0, items, rows)

    kernels = 'compiled kernels' if native.is_native(bench.device) else 'reference'
    ours = Computation(
        f'ours ({kernels})',
        lambda: ops.combine(ops.dispatch(x, inverse, num_rows), weights, inverse),
        inputs,
    )
    plain = Computation(
        'plain PyTorch (ops.reference)',
        lambda: reference.combine(reference.dispatch(x, inverse, num_rows), weights, inverse),
        inputs,
    )
    added = Computation('index_select + index_add_', index_add, inputs)

    # What has to be read and written at least, in units of T rows (M = k·T). Indices and weights,
    # about 1 % more, are left out, in favour of the copies.
    #   dispatch           reads T (every item once), writes M
    #   combine            reads M, writes T
    #   combine, backward  reads T (the gradient) and M (for that of the weights), writes M
    #   dispatch, backward reads M, writes T
    # A copy of n rows reads n and writes n: the forward pair is a copy of T + M rows.
    dispatch = combine = dispatch_backward = 1 + k
    combine_backward = 1 + k + k
    moved = {
        FORWARD: dispatch + combine,
        TRAINING: dispatch + combine + combine_backward + dispatch_backward,
    }
    written = {FORWARD: (k, 1), TRAINING: (k, 1, k, 1)}
    row_bytes = num_items * channels * x.element_size()
    what = f'T={num_items}, C={channels}, E={num_experts}, k={k}; {memory}'
    for pass_ in PASSES:
        expected = plain.run(pass_)
        comparison = bench.compare(
            f'dispatch + combine, {pass_}; {what}',
            [
                *(c.row(pass_, expected, moved[pass_] * row_bytes) for c in (ours, plain, added)),
                *_copies(x, moved[pass_], written[pass_]),
            ],
            baseline=limit,
            limit=limit,
            watch=[(ours.name, limit), (ours.name, added.name)],
        )
        bench.target(
            f'{pass_}, {memory}: at least 75 % of the bandwidth of a plain copy ({limit})',
            100 * comparison.share(ours.name, limit),
            at_least=75,
            unit=' %',
        )
        bench.target(
            f'{pass_}, {memory}: at least 5x faster than index_select + index_add_',
            comparison.ratio(added.name, ours.name),
            at_least=5,
        )

    if bench.only_watched:
        return
    # In turns, so that a cache that holds one of them holds none of them when it is read again.
    many = cycle([bench.tensor(*x.shape).detach() for _ in range(3)])
    many_rows = cycle([bench.tensor(num_rows, channels).detach() for _ in range(3)])
    weights = weights.detach().float()
    # Reads int64 ids, writes inverse.
    sort_bytes = 2 * ids.numel() * ids.element_size()
    parts: dict[str, tuple[int, Callable[[Any], Any]]] = {
        'sort_routes': (sort_bytes, lambda o: o.sort_routes(ids, num_experts)),
        'dispatch': (dispatch * row_bytes, lambda o: o.dispatch(next(many), inverse, num_rows)),
        'combine': (combine * row_bytes, lambda o: o.combine(next(many_rows), weights, inverse)),
        'combine, backward': (
            combine_backward * row_bytes,
            lambda o: o.combine_backward(next(many), next(many_rows), weights, inverse),
        ),
        'dispatch, backward': (
            dispatch_backward * row_bytes,
            lambda o: o.dispatch_backward(next(many_rows), inverse),
        ),
    }
    rows = _copies(x, moved[FORWARD], written[FORWARD])
    for name, (num_bytes, call) in parts.items():
        one = Computation(name, lambda call=call: call(torch.ops.mmdet_moe))
        rows.append(one.row(FORWARD, None, num_bytes))
    comparison = bench.compare(f'each op alone; {what}', rows, limit=limit, replay=True)
    if bench.device.type == 'cuda':
        slowest = min(list(parts)[1:], key=lambda name: comparison.share(name, limit))
        bench.target(
            f'each op that moves rows: at least 85 % of the bandwidth of a plain copy ({limit})',
            100 * comparison.share(slowest, limit),
            at_least=85,
            unit=' %',
            detail=slowest,
        )


def _copies(x: Tensor, moved: int, written: Sequence[int]) -> list[Alternative]:
    """Plain copies that move as many bytes as the ops.

    Args:
        x: T rows.
        moved: What is read and written, in units of T rows.
        written: The blocks that the ops allocate, in the same unit: what a new block costs depends
            on its size.
    """
    num_items = len(x)
    source = x.new_ones(moved * num_items // 2, x.shape[1])
    target = torch.empty_like(source)
    blocks = [source[: n * num_items] for n in written]
    # Where more is read than written, a part of the copy goes nowhere new.
    rest = slice(sum(written) * num_items, None)

    def copy() -> None:
        target.copy_(source)

    def clone() -> None:
        new = [block.clone() for block in blocks]
        target[rest].copy_(source[rest])
        del new

    num_bytes = 2 * source.numel() * source.element_size()
    return [
        Alternative('copy into existing memory', copy, num_bytes=num_bytes),
        Alternative('copy into new memory', clone, num_bytes=num_bytes),
    ]
