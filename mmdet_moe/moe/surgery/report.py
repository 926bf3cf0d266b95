"""What became experts, as a table."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mmdet_moe.moe.expert_layer import ExpertLayer, find_expert_layers
from mmdet_moe.moe.flops import count_flops, counting
from mmdet_moe.moe.layer import count_parameters


@dataclass(frozen=True)
class Row:
    """One layer of experts.

    Attributes:
        path: Where it is.
        kind: Class of the module that stood there, or the names of the siblings; where that is not
            known, the class of the experts.
        num_experts, top_k, shared: E, k, and the dense experts beside them.
        granularity: What one decision covers.
        width: Of an expert, relative to the dense module's.
        dense, active, total: Parameters of the dense module, of the experts that one item passes,
            and of all (the router included). ``dense`` is None where it is not known.
        dense_flops, flops: Of the dense module and of the layer, in one forward pass. None where
            nothing was run.
        levels: Experts of each level of a μMoE, in which all of them take part in every item; empty
            for sparse experts.
    """

    path: str
    kind: str
    num_experts: int
    top_k: int
    shared: int
    granularity: str
    width: float
    dense: int | None
    active: int
    total: int
    dense_flops: int | None = None
    flops: int | None = None
    levels: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, path: str, layer: ExpertLayer, dense_flops: int | None = None, flops: int | None = None
    ) -> 'Row':
        """The row of a layer."""
        known = layer.dense or layer.experts
        active, total = count_parameters(layer)
        return cls(
            path=path,
            kind=f'{{{",".join(layer.siblings)}}}' if layer.siblings else type(known).__name__,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            shared=len(getattr(layer, 'shared', None) or ()),
            granularity=layer.granularity,
            width=layer.width,
            dense=None if layer.dense is None else sum(p.numel() for p in known.parameters()),
            active=active,
            total=total,
            dense_flops=dense_flops,
            flops=flops,
            levels=getattr(layer, 'levels', ()),
        )


@dataclass(frozen=True)
class Report:
    """All layers of experts of a model.

    Attributes:
        rows: One for each, in the order of the model.
        whole: The model itself, with its own numbers where a layer has those of its experts.
    """

    rows: list[Row]
    whole: Row

    def __str__(self) -> str:
        heads = ['path', 'layer', 'E', 'k', 'shared', 'decides per', 'width']
        heads += ['parameters: dense', 'active', 'all']
        has_flops = self.whole.flops is not None
        lines = [(*heads, *(('GFLOPs: dense', 'active') if has_flops else ()))]
        for row in (*self.rows, self.whole):
            is_layer = row is not self.whole
            experts = ' × '.join(map(str, row.levels or (row.num_experts,)))
            chosen = 'all' if row.levels else str(row.top_k)
            numbers = [experts, chosen, str(row.shared), row.granularity]
            # A μMoE's experts have a rank instead.
            has_width = row.dense is not None and not row.levels
            numbers.append(f'{row.width:.2f}' if has_width else '-')
            cells = [row.path, row.kind, *(numbers if is_layer else [''] * len(numbers))]
            cells += [scaled(n, 1e6, ' M') for n in (row.dense, row.active, row.total)]
            if has_flops:
                cells += [scaled(n, 1e9) for n in (row.dense_flops, row.flops)]
            lines.append(tuple(cells))
        return in_columns(lines)


def report_of(model: nn.Module, run: Callable[[], Any] | None = None) -> Report:
    """What became experts in a model.

    Args:
        model: Any module with layers of experts, however they came into it; left as it was.
        run: Runs the model once, on a batch of one image, for FLOPs. They are those of eval mode, a
            multiplication and an addition counted as two.

    Returns:
        All its MoE layers.
    """
    layers = find_expert_layers(model)
    calls: dict[str, list[tuple[tuple, dict]]] = {path: [] for path in layers}
    flops: dict[str, int] = {}
    if run is not None:
        with ExitStack() as stack:
            for path, layer in layers.items():
                hook = layer.register_forward_pre_hook(_note(calls[path]), with_kwargs=True)
                stack.callback(hook.remove)
                stack.callback(layer.forget)
            counter = stack.enter_context(counting(model))
            run()
        flops = counter.by_module(model)
    rows = []
    for path, layer in layers.items():
        dense = _dense_flops(layer, calls[path]) if run is not None else None
        # A layer that did not run has no entry.
        rows.append(Row.of(path, layer, dense, flops.get(path, 0) if run is not None else None))
    return Report(rows, _whole(model, rows, flops.get('')))


def in_columns(lines: Sequence[Sequence[str]]) -> str:
    """Text in columns, the first line being the heads."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def scaled(number: int | None, unit: float, suffix: str = '') -> str:
    """A number in a table; None is a dash."""
    return '-' if number is None else f'{number / unit:.2f}{suffix}'


def _note(calls: list[tuple[tuple, dict]]) -> Callable:
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        # Only shapes matter.
        calls.append(
            tree_map(lambda x: x.to('meta') if isinstance(x, Tensor) else x, (args, kwargs))
        )

    return hook


def _dense_flops(layer: ExpertLayer, calls: list[tuple[tuple, dict]]) -> int | None:
    """FLOPs of the dense module on the inputs of the calls."""
    if layer.dense is None:
        return None
    total = 0
    try:
        for (x, *args), kwargs in calls:
            for level in [x] if isinstance(x, Tensor) else x:
                total += count_flops(layer.dense, level, *args, **kwargs)
    except Exception:  # of any kind: the module is the user's, and may want real values
        return None
    return total


def _whole(model: nn.Module, rows: list[Row], flops: int | None) -> Row:
    active, total = count_parameters(model)

    def before(now: int | None, pairs: Iterable[tuple[int | None, int | None]]) -> int | None:
        """A sum over the model with each layer's number replaced by the dense module's."""
        for dense, layer in pairs:
            now = None if now is None or dense is None or layer is None else now + dense - layer
        return now

    return Row(
        path='(all)',
        kind=type(model).__name__,
        num_experts=0,
        top_k=0,
        shared=0,
        granularity='',
        width=1.0,
        dense=before(total, ((row.dense, row.total) for row in rows)),
        active=active,
        total=total,
        dense_flops=before(flops, ((row.dense_flops, row.flops) for row in rows)),
        flops=flops,
    )
