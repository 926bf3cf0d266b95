"""Feature maps of several sizes side by side on one sheet per expert, for one pass over all levels.

An expert of a detection head computes its items of each pyramid level by itself: with five levels,
four experts and two branches these are hundreds of small operations, which take longer to start
than to compute. Here all items of an expert lie on one tall map, its sheet, with margins between
them as wide as the padding of the expert's convolutions. Before each convolution the margins are
set to 0, which is what the padding of an item by itself would be: every item gets exactly what it
would get alone.

The items are put there and taken back pixel by pixel, by the ops of :mod:`mmdet_moe.ops`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, islice, pairwise

import torch
from torch import Tensor, nn

from mmdet_moe import ops
from mmdet_moe.moe.dispatcher import Dispatcher, Sorting

#: Height and width of a map.
Size = tuple[int, int]
#: How much wider than the widest item a sheet may be so that small items fill its rows.
_WIDER = 0.05
#: Sheets have few different heights, as every new one has to be planned by the convolutions'
#: library: up to this part of the height is left empty.
_HEIGHTS_PER_DOUBLING = 16


@dataclass(frozen=True)
class Packing:
    """Where the items of one expert lie on its sheet.

    Attributes:
        height: Of the sheet in pixels.
        corners: (y, x) of the upper left pixel of each item, level after level.
    """

    height: int
    corners: list[tuple[int, int]]


def sheet_width(sizes: Sequence[Size], margin: int) -> int:
    """Width of all sheets: that of the widest item, or a little more if smaller ones fit better."""
    widest = max(w for _, w in sizes)
    fitting = [-(-(widest + margin) // (w + margin)) * (w + margin) - margin for _, w in sizes]
    return max(w for w in fitting if w <= (1 + _WIDER) * widest)


def pack(counts: Sequence[int], sizes: Sequence[Size], width: int, margin: int) -> Packing:
    """Put items in rows, the tallest first, each in the first row that has room for it.

    Args:
        counts: Items of each level.
        sizes: Height and width of the items of each level.
        width: Of the sheet.
        margin: Pixels between items.
    """
    corners: list[list[tuple[int, int]]] = [[] for _ in sizes]
    rows: list[list[int]] = []  # y, height, and the first x that is free
    below = 0
    for level in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        height, item_width = sizes[level]
        left, row = counts[level], 0
        while left:
            if row == len(rows):
                rows.append([below, height, 0])
                below += height + margin
            y, row_height, x = rows[row]
            fit = min(left, (width - x + margin) // (item_width + margin))
            if fit and height <= row_height:
                step = item_width + margin
                corners[level] += [(y, x + i * step) for i in range(fit)]
                rows[row][2] += fit * step
                left -= fit
            row += 1
    return Packing(_rounded(below - margin) if rows else 0, [*chain.from_iterable(corners)])


def _rounded(height: int) -> int:
    step = max(1, 1 << (height.bit_length() - 1)) // _HEIGHTS_PER_DOUBLING
    return -(-height // step) * step if step else height


class Sheets:
    """The items of all levels on one sheet per expert, and back.

    Args:
        sorting: The routes of all levels.
        dispatchers: Of each level.
        items: Of each level, (T_l, C, h_l, w_l).
        margin: Pixels between items.
    """

    def __init__(
        self,
        sorting: Sorting,
        dispatchers: Sequence[Dispatcher],
        items: Sequence[Tensor],
        margin: int,
    ) -> None:
        self._items = items
        self._sizes: list[Size] = [(x.shape[2], x.shape[3]) for x in items]
        self._width = sheet_width(self._sizes, margin)
        self._weights = [dispatcher.weights for dispatcher in dispatchers]
        counts = [[b - a for a, b in pairwise(dispatcher.bounds)] for dispatcher in dispatchers]
        packings = [pack(of, self._sizes, self._width, margin) for of in zip(*counts, strict=True)]
        #: Of the sheet of each expert, in pixels; 0 without items.
        self.heights = [packing.height for packing in packings]
        firsts = list(accumulate((h * self._width for h in self.heights), initial=0))
        self._num_rows = firsts.pop()
        corners = [
            iter([first + y * self._width + x for y, x in packing.corners])
            for first, packing in zip(firsts, packings, strict=True)
        ]
        # In the order of the sorted routes: level by level, and in it expert by expert.
        of_routes = [
            corner
            for of_level in counts
            for of_expert, n in zip(corners, of_level, strict=True)
            for corner in islice(of_expert, n)
        ]
        table = torch.tensor([*of_routes, self._num_rows])
        device = items[0].device
        if device.type == 'cuda':  # from pageable memory the host would wait
            table = table.pin_memory()
        table = table.to(device, non_blocking=True)
        corner_TK = table[sorting.tables[1].clamp(max=len(of_routes))]
        pixels = [h * w for h, w in self._sizes]
        used = sum(sum(n) * p for n, p in zip(counts, pixels, strict=True))
        self._inverse, self._is_item = self._rows_of(corner_TK, self._num_rows - used)

    def _rows_of(self, corner_TK: Tensor, num_free: int) -> tuple[Tensor, Tensor]:
        """The rows of each pixel, (P, K), and which rows hold an item, bool (R,).

        The ops want every row to be somebody's. So behind the pixels of the items come others, K to
        a row, for the rows that hold none.
        """
        device, top_k, num_rows = corner_TK.device, corner_TK.shape[1], self._num_rows
        corners = corner_TK.split([len(x) for x in self._items])
        offsets = _offsets(tuple(self._sizes), self._width, device)
        of_items = torch.cat([
            (corner[:, None] + offset).view(-1, top_k)
            for corner, offset in zip(corners, offsets, strict=True)
        ])  # fmt: skip
        free = torch.ones(num_rows + 1, dtype=torch.bool, device=device)
        free = free.index_fill_(0, of_items.flatten().clamp(max=num_rows), False)[:num_rows]
        others = torch.full((-(-num_free // top_k) * top_k + 1,), num_rows, device=device)
        # No nonzero(), whose size the host would wait for. All that is not free goes to the end.
        place = (free.cumsum(0) - 1).where(free, len(others) - 1)
        others.scatter_(0, place, torch.arange(num_rows, device=device))
        return torch.cat([of_items, others[:-1].view(-1, top_k)]), ~free

    def through(self, experts: Iterable[nn.Module]) -> list[Tensor]:
        """What the experts make of the items: of each level (T_l, C', h_l, w_l)."""
        pixels = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in self._items]
        num_pixels = sum(map(len, pixels))
        empty = pixels[0].new_zeros(len(self._inverse) - num_pixels, pixels[0].shape[1])
        rows = ops.dispatch(torch.cat([*pixels, empty]), self._inverse, self._num_rows)
        lengths = [height * self._width for height in self.heights]
        outputs = []
        parts = zip(experts, rows.split(lengths), self._is_item.split(lengths), strict=True)
        for expert, own, is_item in parts:
            if len(own):
                sheet = own.view(1, -1, self._width, own.shape[1]).permute(0, 3, 1, 2)
                with _margins_of_zeros(expert, is_item.view(1, 1, -1, self._width), sheet):
                    y = expert(sheet)
                outputs.append(y.permute(0, 2, 3, 1).flatten(0, 2))
        weights = [
            # Not by an index, whose gradient would be a sum in an order that changes.
            of_item[:, None].expand(-1, h * w, -1).flatten(0, 1)
            for of_item, (h, w) in zip(self._weights, self._sizes, strict=True)
        ]
        weights.append(weights[0].new_zeros(len(empty), weights[0].shape[1]))
        mixed = ops.combine(torch.cat(outputs), torch.cat(weights), self._inverse)
        # Not as views, which nobody could change in place.
        *levels, _ = torch.unsafe_split_with_sizes(mixed, [*map(len, pixels), len(empty)])
        return [
            level.view(-1, *size, mixed.shape[1]).permute(0, 3, 1, 2)
            for level, size in zip(levels, self._sizes, strict=True)
        ]


@lru_cache(maxsize=64)  # a model repeats its few shapes
@torch.inference_mode(False)
def _offsets(sizes: tuple[Size, ...], width: int, device: torch.device) -> list[Tensor]:
    """Of each level's item, (h · w, 1): how far behind its first pixel each pixel lies."""
    columns = torch.arange(width, device=device)
    return [
        (torch.arange(h, device=device)[:, None] * width + columns[:w]).view(-1, 1)
        for h, w in sizes
    ]


@contextmanager
def _margins_of_zeros(expert: nn.Module, is_item: Tensor, sheet: Tensor) -> Iterator[None]:
    """Before every convolution that sees more than a pixel, the margins are what padding is."""

    def clear(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *others = inputs
        return None if x is sheet else (x.where(is_item, 0), *others)

    with ExitStack() as stack:
        for conv in _convolutions(expert):
            stack.callback(conv.register_forward_pre_hook(clear).remove)
        yield


def signature(expert: nn.Module) -> tuple:
    """What decides about :func:`margin_of`: while it stays, the answer does."""
    names = ('kernel_size', 'dilation', 'padding', 'padding_mode', 'training')
    return tuple((type(m), *(getattr(m, name, None) for name in names)) for m in expert.modules())


def _convolutions(expert: nn.Module) -> list[nn.Conv2d]:
    return [m for m in expert.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]


@torch.inference_mode(False)
@torch.enable_grad()
def margin_of(expert: nn.Module, in_channels: int) -> int | None:
    """How far apart the items of an expert have to lie on a sheet.

    An expert may be any module, so it is tried: maps of two sizes on a sheet against each by
    itself, outputs and gradients, in double precision, in its present mode. Dropout of single
    values is left out of it, as it is the same on a sheet.

    Args:
        expert: From (N, C, H, W) to (N, C', H, W).
        in_channels: C.

    Returns:
        In pixels; None for an expert that cannot compute sheets: it changes the size of a map, has
        group normalisation or pooling, draws random numbers (one for a whole item would be one for
        the sheet), or something else than a convolution sees more than a pixel.
    """
    margin = max(
        (
            dilation * (size - 1) // 2
            for conv in _convolutions(expert)
            for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)
        ),
        default=0,
    )
    generator = torch.Generator().manual_seed(0)
    try:
        probe = copy.deepcopy(expert).cpu().double()
        for module in probe.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        items = [
            torch.randn(n, in_channels, *size, dtype=torch.double, generator=generator)
            for n, size in ((1, (5, 7)), (2, (3, 3)))
        ]
        ids = torch.zeros(3, 1, dtype=torch.int64)
        weights = torch.ones(3, 1, dtype=torch.double)
        sorting = Sorting(ids, weights, 1, (1, 2), torch.tensor([0, 1, 1]))
        dispatchers = [
            Dispatcher(ids[:1], weights[:1], 1, sorting),
            Dispatcher(ids[1:], weights[1:], 1, sorting, level=1, first_item=1),
        ]
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            alone = _computed(items, lambda: [probe(x) for x in items], probe)
            if not torch.equal(torch.get_rng_state(), before):
                return None
        on_sheet = _computed(
            items, lambda: Sheets(sorting, dispatchers, items, margin).through([probe]), probe
        )
    except Exception:  # of any kind: the module is the user's
        return None
    same = all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)
        for a, b in zip(alone, on_sheet, strict=True)
    )
    return margin if same else None


def _computed(
    items: Sequence[Tensor], compute: Callable[[], list[Tensor]], module: nn.Module
) -> list[Tensor]:
    """Outputs, and the gradients of inputs and parameters of a function of the outputs."""
    wanted = [*items, *(p for p in module.parameters() if p.requires_grad)]
    for x in items:
        x.requires_grad_()
    outputs = compute()
    torch.stack([y.sin().sum() for y in outputs]).sum().backward(inputs=wanted)
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in wanted]
    for x in wanted:
        x.grad = None
    return [*outputs, *gradients]
