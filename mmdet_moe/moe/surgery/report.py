"""What became experts, as a table."""

from dataclasses import dataclass

from torch import nn

from mmdet_moe.moe.layer import MoELayer


@dataclass(frozen=True)
class Row:
    """One place.

    Attributes:
        path: Where.
        kind: Class of the module that stood there.
        num_experts, top_k, shared: E, k, and the dense experts beside them.
        granularity: What one decision covers.
        width: Of an expert, relative to the dense module's.
        dense, active, total: Parameters of the dense module, of the experts that one item passes,
            and of all (the router included).
    """

    path: str
    kind: str
    num_experts: int
    top_k: int
    shared: int
    granularity: str
    width: float
    dense: int
    active: int
    total: int

    @classmethod
    def of(cls, path: str, module: nn.Module, layer: MoELayer, width: float) -> 'Row':
        """The row of a layer that takes the place of a module."""
        total, experts = _count(layer), _count(layer.experts)
        each = experts // layer.num_experts
        return cls(
            path=path,
            kind=type(module).__name__,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            shared=len(layer.shared or ()),
            granularity=layer.granularity,
            width=width,
            dense=_count(module),
            active=total - experts + layer.top_k * each,
            total=total,
        )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Report:
    """All places of a model.

    Attributes:
        rows: One for each, in the order of the entries.
    """

    rows: list[Row]

    def __str__(self) -> str:
        heads = (
            'path',
            'layer',
            'E',
            'k',
            'shared',
            'decides per',
            'width',
            'dense',
            'active',
            'all',
        )
        cells = [heads]
        for row in self.rows:
            numbers = (f'{n / 1e6:.2f} M' for n in (row.dense, row.active, row.total))
            cells.append(
                (row.path, row.kind, str(row.num_experts), str(row.top_k), str(row.shared),
                 row.granularity, f'{row.width:.2f}', *numbers)
            )  # fmt: skip
        widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
        return '\n'.join(
            '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )
