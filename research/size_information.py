"""What the choice of experts says on the objects' sizes beyond their pyramid level.

With ``C`` (rows, B), the bin of an object's part on one level, and ``W`` (rows, E), the mean
weights of the decisions behind it, every level l has the joint table ``C_l^T W_l``, and

    I(bin; expert | level) = sum_l p(l) I(bin; expert | level = l),

p(l) being the share of the objects on level l. Informations are in nats. The chance level is the
mean over permutations within the levels: the images change places, each with all of its decisions,
so that the decisions of one image stay together.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.models import load_model
from mmdet_moe.analysis.records.contents import DetectorRecords
from mmdet_moe.analysis.statistics.bins import box_sizes, position_bin, size_bin
from mmdet_moe.analysis.study import Study
from mmdet_moe.cli import load_config, set_loader_defaults
from mmdet_moe.moe.layer import find_moe_layers
from mmdet_moe.moe.metrics import conditional_entropy, entropy, mutual_information, shares
from mmdet_moe.moe.routers import LevelNorm, RouterLinear
from research.runs import latest_checkpoint

#: What :func:`measure` writes into a run's folder.
FILE = 'size_information.json'
ATTRIBUTES = ('size', 'class', 'position')
#: Random routers that one trained router is compared with.
DRAWS = 3


@dataclass
class Parts:
    """Parts of objects: all anchors of one object on one level.

    Attributes:
        level: int64 (n,).
        image: int64 (n,), index in the data set.
        share: float64 (n,), of the object's anchors, 1 for each object over all levels.
        weights: float64 (n, E), mean of the decisions behind them, rows sum to 1.
        bins: For each of :data:`ATTRIBUTES`, int64 (n,).
    """

    level: np.ndarray
    image: np.ndarray
    share: np.ndarray
    weights: np.ndarray
    bins: dict[str, np.ndarray]


def parts_of(records: Iterable[DetectorRecords], layer: int) -> Parts:
    """The objects' parts in the records of an analysis, for one of its layers."""
    found: list[list[np.ndarray]] = []
    for part in records:
        links, objects, images = part.layers[layer].links, part.objects, part.images
        keys = np.stack([links.owner, links.level], axis=1)
        (owner, level), which = _unique_rows(keys)
        share = np.bincount(which, links.share)
        weights = np.zeros((len(share), links.weights.shape[1]))
        np.add.at(weights, which, links.share[:, None] * links.weights)
        middle = (objects.box[owner, :2] + objects.box[owner, 2:]) / 2
        row = np.searchsorted(images.index, objects.image[owner])
        height, width = images.size[row].T
        found.append([
            *(level, objects.image[owner], share, weights / weights.sum(1, keepdims=True)),
            size_bin(box_sizes(objects.box[owner])),
            objects.label[owner],
            position_bin(middle[:, 0] / width, middle[:, 1] / height),
        ])  # fmt: skip
    level, image, share, weights, *bins = map(np.concatenate, zip(*found, strict=True))
    return Parts(level, image, share, weights, dict(zip(ATTRIBUTES, bins, strict=True)))


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, which = np.unique(rows, axis=0, return_inverse=True)
    return unique.T, which.reshape(-1)


def tables(parts: Parts, attribute: str, weights: np.ndarray | None = None) -> Tensor:
    """Joint tables of bin and expert of each level, float64 (L, B, E), in numbers of objects."""
    bins, level = parts.bins[attribute], parts.level
    weights = parts.weights if weights is None else weights
    table = np.zeros((level.max() + 1, bins.max() + 1, weights.shape[1]))
    np.add.at(table, (level, bins), parts.share[:, None] * weights)
    return torch.from_numpy(table)


def given_level(table: Tensor) -> float:
    """I(bin; expert | level) of joint tables (L, B, E), in nats."""
    return float((shares(table.sum((1, 2))) * mutual_information(table)).sum())


def information(parts: Parts, attribute: str, permutations: int = 200, seed: int = 0) -> dict:
    """What experts and an attribute have in common.

    Returns:
        ``mi``: I(bin; expert). ``given_level``: I(bin; expert | level), with ``by_level``: of each
        level alone, and its ``chance`` and ``p_value`` by ``permutations``; ``mi_max``: the smaller
        one of H(bin | level) and H(expert | level).
    """
    table = tables(parts, attribute)
    rng = np.random.default_rng(seed)
    permuted = np.array([
        given_level(tables(parts, attribute, parts.weights[order]))
        for order in (_permuted(parts, rng) for _ in range(permutations))
    ])  # fmt: skip
    observed = given_level(table)
    level_by = [table.sum(dim).T for dim in (2, 1)]
    return {
        'mi': float(mutual_information(table.sum(0))),
        'given_level': observed,
        'by_level': mutual_information(table).tolist(),
        'chance': float(permuted.mean()),
        'p_value': (1 + int((permuted >= observed - 1e-9).sum())) / (1 + permutations),
        'mi_max': min(float(conditional_entropy(joint)) for joint in level_by),
    }


def _permuted(parts: Parts, rng: np.random.Generator) -> np.ndarray:
    """Rows in another order: within each level the images, as blocks, are drawn anew."""
    images, image = np.unique(parts.image, return_inverse=True)
    order = np.empty(len(image), dtype=np.int64)
    for level in np.unique(parts.level):
        rows = np.flatnonzero(parts.level == level)
        before = rows[np.argsort(image[rows], kind='stable')]
        rank = rng.permutation(len(images))
        order[before] = rows[np.argsort(rank[image[rows]], kind='stable')]
    return order


def of_layer(parts: Parts) -> dict:
    """All figures of one layer."""
    on_level = tables(parts, 'size').sum(1)
    importance = shares(on_level.sum(0))
    return {
        'level': float(mutual_information(on_level)),
        'importance': importance.tolist(),
        'usage_entropy': float(entropy(importance)),
        'by_level_and_size': tables(parts, 'size').tolist(),
        **{attribute: information(parts, attribute) for attribute in ATTRIBUTES},
    }


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> list[LevelNorm]:
    """Give all routers random weights, as large as their own are.

    Returns:
        Their normalisations, which have to see the new features before they are of use.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for layer in find_moe_layers(model).values():
        for module in layer.router.modules():
            if isinstance(module, LevelNorm):
                module.batches.zero_()
                norms.append(module)
            if isinstance(module, (RouterLinear, torch.nn.Conv2d)):
                weight = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(weight * module.weight.std().cpu())
                if module.bias is not None:
                    module.bias.zero_()
    return norms


def measure(work_dir: Path, device: str | None = None) -> dict:
    """Figures of a finished run's router, and of random ones in its place, on the validation set.

    Args:
        work_dir: Where the run lives; a file :data:`FILE` is written there.
        device: As of :func:`~mmdet_moe.analysis.models.load_model`.

    Returns:
        ``'layers'``: by layer ``'trained'`` and ``'random'``, a list of as many as :data:`DRAWS`.
    """
    (config,) = work_dir.glob('*.py')
    cfg: Config = load_config(str(config))
    set_loader_defaults(cfg)
    checkpoint = latest_checkpoint(work_dir)
    model, _ = load_model(cfg, str(checkpoint), device)
    data, folder = AnalysisData(cfg, 'val'), work_dir / 'records'

    def study(name: str) -> Study:
        plan = {'router': name, 'checkpoint': checkpoint.stat().st_mtime}
        return Study(model, data, folder / name, plan, score_thr=0.0, overwrite=True)

    trained = study('trained')
    found = {name: {'trained': value} for name, value in _figures(trained).items()}
    for draw in range(DRAWS):
        if norms := randomise(model, draw):
            _settle(trained, norms)
        for name, value in _figures(study(f'random{draw}')).items():
            found[name].setdefault('random', []).append(value)
    result = {'layers': found}
    write_file(work_dir / FILE, json.dumps(result, indent=1).encode())
    shutil.rmtree(folder)
    return result


def _figures(study: Study) -> dict[str, dict]:
    study.record(lambda _: None)
    return {name: of_layer(parts_of(study.records, i)) for i, name in enumerate(study.layers)}


def _settle(study: Study, norms: list[LevelNorm]) -> None:
    """Let normalisations see the data set once, with equal weight for every batch."""
    with study.tracer:
        for number, batch in enumerate(study.data.batches(num_workers=0), start=1):
            for norm in norms:
                norm.train().momentum = 1 / number
            study.tracer.predict(batch)
    for norm in norms:
        norm.eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path)
    parser.add_argument('--device')
    args = parser.parse_args(argv)
    measure(args.work_dir, args.device)


if __name__ == '__main__':
    main()
