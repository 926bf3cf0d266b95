"""What a step of experts on 8 to 512 GPUs moves and waits for, simulated.

``python -m research.benchmarks.scaling`` writes the tables of ``docs/scaling.md``. Nothing here was
measured on a GPU: the sizes are exact, the speeds are assumptions (:class:`Cluster`).
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from research.experiments.markdown import replace_between_markers, table

GPUS = (8, 32, 128, 512)
#: Bytes of one parameter in a mixed-precision training with Adam: float32 weight, gradient and two
#: moments.
_PER_PARAMETER = 16
_DRAWS = 200
#: Standard deviation of the experts' shares over their mean: with a balancing loss, and without.
EVEN, UNEVEN = 0.05, 0.5


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines.

    Attributes:
        flops: What a GPU reaches in bfloat16, per second.
        per_node: GPUs of one node.
        inside: Bytes per second that a GPU sends to others of its node.
        outside: Bytes per second that it sends to other nodes.
        latency: Seconds until a collective among N GPUs begins, for each doubling of N.
    """

    flops: float = 400e12
    per_node: int = 8
    inside: float = 300e9
    outside: float = 40e9
    latency: float = 10e-6


@dataclass(frozen=True)
class Work:
    """What one GPU does in one step, besides what no choice here changes.

    Attributes:
        items: T, decisions on one GPU.
        top_k: k.
        experts: E.
        numbers_in, numbers_out: Of one item, and of what an expert makes of it.
        expert_parameters: Of one expert.
        dense_parameters: Of all else.
        flops: Of the forward pass of one item through one expert.
        dense_flops: Of the forward pass of all else, on one GPU.
        layers: How often rows travel in a forward pass.
    """

    items: int
    top_k: int
    experts: int
    numbers_in: int
    numbers_out: int
    expert_parameters: int
    dense_parameters: int
    flops: float
    dense_flops: float
    layers: int


def _transformer(experts: int = 64, width: int = 1024, tokens: int = 16 * 1024) -> Work:
    """Twelve blocks' MLPs of a ViT-L-like model of 24; 16 images of 1,024 tokens on each GPU."""
    mlp, blocks = 8 * width**2, 12
    dense = 24 * 4 * width**2 + 12 * mlp
    return Work(
        items=tokens * blocks,
        top_k=2,
        experts=experts,
        numbers_in=width,
        numbers_out=width,
        expert_parameters=mlp * blocks,
        dense_parameters=dense,
        flops=2.0 * mlp,
        dense_flops=2.0 * dense * tokens,
        layers=blocks,
    )


WORK = _transformer()
#: The two subnets of a RetinaNet's head as experts; 8 images of 800×1333 pixels on each GPU, whose
#: five levels have 22,300 places of 256 channels together.
DETECTOR = Work(
    items=2 * 8 * 5,
    top_k=2,
    experts=4,
    numbers_in=256 * 22_300 // 5,
    numbers_out=256 * 22_300 // 5,
    expert_parameters=2 * 4 * (9 * 256 + 1) * 256,
    dense_parameters=34_000_000,
    flops=2 * 4 * 9 * 256 * 256 * 22_300 / 5,
    dense_flops=8 * 200e9,
    layers=2 * 5,
)


def exchanged_bytes(rows: float, numbers_in: int, numbers_out: int, itemsize: int) -> float:
    """Bytes that rows cost which are computed on another rank: there and back, and the gradients.

    Args:
        rows: How many; of T · k rows with even loads (N − 1) / N.
        numbers_in, numbers_out: Of one row, and of what an expert makes of it.
        itemsize: Bytes of one number.
    """
    return 2 * rows * (numbers_in + numbers_out) * itemsize


def reduced_bytes(
    dense_parameters: float, expert_parameters: float, ranks: int, parts: int, itemsize: int
) -> float:
    """Bytes that a rank sends for the gradients, of ring all-reduces.

    Args:
        dense_parameters: What every rank has.
        expert_parameters: Of all experts; each rank has 1 / N of them.
        ranks: R.
        parts: N.
        itemsize: Bytes of one number.
    """

    def ring(numbers: float, members: int) -> float:
        return 2 * (members - 1) / members * numbers * itemsize

    return ring(dense_parameters, ranks) + ring(expert_parameters / parts, ranks // parts)


def imbalance(work: Work, ranks: int, parts: int, spread: float, seed: int = 0) -> float:
    """The rows of the fullest rank over the mean, averaged over random draws.

    All wait for it, as they do in every step of data parallelism.

    Args:
        work: What one GPU does.
        ranks: R.
        parts: N; 1 is data parallelism alone, in which every rank computes its own rows.
        spread: Standard deviation of the experts' true shares over their mean; 0 is even.
        seed: Of the draws.
    """
    if parts == 1:
        return 1.0
    rng = np.random.default_rng(seed)
    even = np.full(work.experts, 1 / work.experts)
    ratios = []
    for _ in range(_DRAWS):
        # The shares of a symmetric Dirichlet vary by (E − 1) / (E·c + 1), squared, over the mean.
        c = ((work.experts - 1) / spread**2 - 1) / work.experts if spread else 0
        shares = rng.dirichlet(np.full(work.experts, c)) if spread else even
        rows = rng.multinomial(work.items * work.top_k * parts, shares, size=ranks // parts)
        of_rank = rows.reshape(ranks // parts, parts, -1).sum(-1)
        ratios.append(of_rank.max() / of_rank.mean())
    return float(np.mean(ratios))


@dataclass(frozen=True)
class Step:
    """One step on one GPU; seconds, and bytes.

    Attributes:
        memory: Of weights, gradients and moments.
        exchanged: Sent by all-to-alls.
        reduced: Sent by all-reduces of gradients.
        imbalance: Rows of the fullest rank over the mean.
        computing: Forward and backward, with even loads.
        seconds: All of it, nothing of which overlaps.
    """

    memory: float
    exchanged: float
    reduced: float
    imbalance: float
    computing: float
    seconds: float


def simulate(work: Work, ranks: int, parts: int, spread: float, cluster: Cluster) -> Step:
    """A step of R GPUs with expert parallelism over N of them, in bfloat16."""
    rows = work.items * work.top_k
    experts = work.experts * work.expert_parameters
    uneven = imbalance(work, ranks, parts, spread)
    exchanged = exchanged_bytes(rows * (1 - 1 / parts), work.numbers_in, work.numbers_out, 2)
    reduced = reduced_bytes(work.dense_parameters, experts, ranks, parts, 2)
    # The N - 1 others of a group; those of the own node come first.
    outside = max(parts - cluster.per_node, 0) / max(parts - 1, 1)
    speed = 1 / (outside / cluster.outside + (1 - outside) / cluster.inside)
    # Sizes, rows there and back, and the gradients of both.
    collectives = 5 * work.layers * np.log2(parts) * cluster.latency
    travel = exchanged * uneven / speed + collectives
    reduce = reduced / (cluster.inside if ranks <= cluster.per_node else cluster.outside)
    # A backward pass costs two forward passes.
    expert_time = 3 * rows * work.flops / cluster.flops
    dense_time = 3 * work.dense_flops / cluster.flops
    return Step(
        memory=_PER_PARAMETER * (work.dense_parameters + experts / parts),
        exchanged=exchanged,
        reduced=reduced,
        imbalance=uneven,
        computing=expert_time + dense_time,
        seconds=expert_time * uneven + dense_time + travel + reduce,
    )


def bytes_table(ranks: int = 8) -> str:
    """Markdown: what spreading the experts over 8 GPUs, or one each, saves and costs a GPU."""
    heads = ['experts', 'their weights', 'memory saved', 'all-reduce saved', 'all-to-all added']
    rows = []
    for name, work in (('detection head, E = 4', DETECTOR), ('transformer, E = 64', WORK)):
        parts = min(ranks, work.experts)
        alone, spread = (simulate(work, ranks, n, 0, Cluster()) for n in (1, parts))
        cells = [
            2 * work.experts * work.expert_parameters,
            alone.memory - spread.memory,
            alone.reduced - spread.reduced,
            spread.exchanged,
        ]
        rows.append([name, *(f'{value / 1e9:.2f} GB' for value in cells)])
    return table(heads, rows)


def steps_table(work: Work = WORK, cluster: Cluster | None = None) -> str:
    """Markdown: one row for each number of GPUs and each N."""
    heads = [
        *('GPUs', 'N', 'weights and Adam', 'all-to-all', 'all-reduce', 'fullest GPU, even'),
        *('uneven', 'computing, even', 'uneven'),
    ]
    rows = []
    for ranks, parts in product(GPUS, (1, 8, 64)):
        if parts > ranks:
            continue
        even, uneven = (
            simulate(work, ranks, parts, spread, cluster or Cluster()) for spread in (EVEN, UNEVEN)
        )
        cells = [
            *(str(ranks), str(parts), f'{even.memory / 1e9:.0f} GB'),
            *(f'{even.exchanged / 1e9:.2f} GB', f'{even.reduced / 1e9:.1f} GB'),
            *(f'{step.imbalance:.2f} ×' for step in (even, uneven)),
            *(f'{100 * step.computing / step.seconds:.0f} %' for step in (even, uneven)),
        ]
        rows.append(cells)
    return table(heads, rows)


def write_page(page: Path) -> None:
    """Put both tables between the marks of a page."""
    replace_between_markers(page, 'scaling bytes', bytes_table())
    replace_between_markers(page, 'scaling steps', steps_table())


if __name__ == '__main__':
    write_page(Path(__file__).parents[2] / 'docs' / 'scaling.md')
