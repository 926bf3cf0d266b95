"""Heads of CIFAR-100 on frozen ImageNet features: a μMoE of E experts against a linear layer.

The claim to be tested (arXiv 2402.12550, figure 4): with as many parameters as the linear layer a
μMoE is as accurate, and the more experts it has, the fewer classes hang on each of them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_moe.analysis.models import build_model
from mmdet_moe.cli import load_config
from mmdet_moe.drawing import new_figure, style
from mmdet_moe.moe import ImportanceLoss, MoELayer
from research.experiments.experiment import CONFIGS, folder_name
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.experiments.on_features import FeaturesExperiment, choose, chosen
from research.features import FeatureCache
from research.heads import Data, Recipe, accuracy, look_at_experts, predict, train_head
from research.runs import mean_std

HEAD = 'head.fc'
MATCHED, FIXED_RANK = 'match', 64
#: Experts of the μMoE heads: from 256 on two levels, because the gate of one costs more parameters
#: than the linear layer has.
LEVELS = (2, 4, 8, 16, 32, 64, (16, 16), (32, 32))
FEWER = (4, 16, 64, (32, 32))
SPARSE = (4, 16, 64)
#: 256 on one level and on two, of a rank that does not depend on the gate.
ONE_OR_TWO_LEVELS = ((16,), (64,), (256,), (16, 16))
#: Tried on one head of each kind, with the last tenth of the training images held out.
RECIPES = tuple(
    Recipe(lr, decay, epochs=10, dropout=dropout)
    for lr, decay, dropout in product((1e-3, 3e-3), (1.0, 3.0), (0.0, 0.3))
)


@dataclass(frozen=True)
class Head:
    """One kind of head.

    Attributes:
        line: As table and picture call those that differ in E alone.
        experts: E, by level; empty for the linear layer.
        entry: What ``experts`` of the config says, without the number. Without experts: the
            ``rank`` of two linear layers in a row.
        random_gate: Whether the gate is drawn at random and never trained.
    """

    line: str
    experts: tuple[int, ...] = ()
    entry: Mapping[str, Any] | None = field(default=None, hash=False)
    random_gate: bool = False

    @property
    def name(self) -> str:
        """Of the row."""
        return f'{self.line}, E = {"×".join(map(str, self.experts))}' if self.experts else self.line

    @property
    def kind(self) -> str:
        """Heads of one kind share a recipe: ``'linear'``, ``'sparse'``, or the μMoE's class."""
        if not self.experts:
            return 'linear'
        return self.entry.get('type', 'sparse').removeprefix('mmdet_moe.')

    @property
    def config(self) -> str:
        """Its config below ``configs/``."""
        kind = 'dense' if not self.experts else 'mumoe' if 'type' in self.entry else 'moe'
        return f'efficientnet_lite0_{kind}_cifar100'


def _heads() -> Iterator[Head]:
    yield Head('linear')
    # The ranks of CP, matched, with 64 and with 2 experts: what the rank costs without any experts.
    yield from (Head(f'linear, rank {rank}', entry=dict(rank=rank)) for rank in (31, 90))
    all_sizes, some = ([(e,) if isinstance(e, int) else e for e in es] for es in (LEVELS, FEWER))
    cp, tr = dict(type='mmdet_moe.CPMuMoE'), dict(type='mmdet_moe.TRMuMoE')
    matched = dict(rank=MATCHED)
    yield from (Head('CP, matched', e, cp | matched) for e in all_sizes)
    sparse = dict(granularity='token', top_k=2)
    yield from (Head('sparse, k = 2', (e,), sparse) for e in SPARSE)
    fixed = dict(rank=FIXED_RANK)
    yield from (Head(f'CP, rank {FIXED_RANK}', e, cp | fixed) for e in ONE_OR_TWO_LEVELS)
    yield from (Head('TR, matched', e, tr | matched) for e in some)
    yield from (Head('CP, random gate', e, cp | matched, random_gate=True) for e in some)
    yield Head('CP, matched, softmax', (16,), cp | matched | dict(activation='softmax'))


HEADS = tuple(_heads())
LINEAR = HEADS[0]
#: The recipe of a kind of head is chosen for this one.
TUNED = {head.kind: head for head in reversed(HEADS) if head.experts in ((), (16,))}


class MuMoEExperiment(FeaturesExperiment[Head]):
    """All heads, on CIFAR-100. Each leaves a checkpoint and a config for the tools, too.

    Args:
        data, work_dir, seeds, jobs: As of the base class.
        heads: What is trained.
        recipes: What is tried on a head of each kind, to choose that of all.
    """

    def __init__(
        self,
        data: Path,
        work_dir: Path,
        seeds: Sequence[int],
        jobs: int,
        heads: Sequence[Head] = HEADS,
        recipes: Sequence[Recipe] = RECIPES,
    ) -> None:
        super().__init__(data, work_dir, seeds, jobs)
        self.kinds, self.recipes = heads, recipes

    def prepare(self) -> None:
        _data(self.data, self.work_dir, 'train'), _data(self.data, self.work_dir, 'test')
        untuned = [
            TUNED[kind]
            for kind in sorted({head.kind for head in self.kinds})
            if not self._recipe_path(kind).exists()
        ]
        self.in_processes([partial(self.tune, head) for head in untuned])

    def tune(self, head: Head) -> None:
        """Choose the recipe of a head's kind, on the last tenth of the training images."""
        images = _data(self.data, self.work_dir, 'train')
        kept = len(images) * 9 // 10  # the data set goes round the classes: both parts have all

        def judge(recipe: Recipe) -> float:
            layer, _ = build(head, 0, self.data)
            train_head(layer, images[:kept], recipe, 0, _balancing(layer))
            return accuracy(predict(layer, images[kept:].features), images[kept:].labels)

        choose(self.recipes, judge, self._recipe_path(head.kind))

    def _recipe_path(self, kind: str) -> Path:
        return self.work_dir / f'recipe_{kind}.json'

    def path(self, kind: Head, seed: int) -> Path:
        folder = folder_name(kind.name).replace('=', '')
        return self.work_dir / folder / f'seed{seed}' / 'result.json'

    def settings(self, kind: Head) -> dict[str, Any]:
        return {'head': asdict(kind), 'recipe': asdict(chosen(self._recipe_path(kind.kind)))}

    def measure(self, kind: Head, seed: int) -> dict[str, Any]:
        train, test = (_data(self.data, self.work_dir, split) for split in ('train', 'test'))
        started = time.process_time()
        layer, model = build(kind, seed, self.data)
        recipe = chosen(self._recipe_path(kind.kind))
        loss = train_head(layer, train, recipe, seed, _balancing(layer))
        folder = self.path(kind, seed).parent
        folder.mkdir(parents=True, exist_ok=True)
        if model.get_submodule(HEAD) is layer:
            _config(kind, self.data).dump(folder / 'config.py')
            torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'head.pth')
        return {
            'accuracy': accuracy(predict(layer, test.features), test.labels),
            'loss': loss,
            'parameters': sum(p.numel() for p in layer.parameters()),
            'experts': look_at_experts(layer, test, seed) if kind.experts else None,
            'cpu_seconds': time.process_time() - started,
        }

    def write(self) -> None:
        results = {head: list(by_seed.values()) for head, by_seed in self.results().items()}
        text = f'{self.headline()}\n\n{markdown_table(results)}'
        pictures = {'mumoe-polysemanticity.png': partial(plot_polysemanticity, results)}
        is_default = (self.kinds, self.recipes) == (HEADS, RECIPES)
        self.publish(results, {'mumoe': text}, pictures, is_default)

    def headline(self) -> str:
        """Stands above the table."""
        texts = []
        for kind, head in TUNED.items():
            if self._recipe_path(kind).exists():
                recipe = chosen(self._recipe_path(kind))
                texts.append(
                    f'{kind} (chosen for `{head.name}`): learning rate {recipe.lr:g}, weight decay '
                    f'{recipe.weight_decay:g}, dropout {recipe.dropout:g}'
                )
        return (
            f'AdamW, cosine to 0, {RECIPES[0].epochs} epochs in batches of '
            f'{RECIPES[0].batch_size}; of {len(self.recipes)} recipes the best for each kind of '
            f'head, on the last tenth of the training images. {"; ".join(texts)}.'
        )


@cache
def _data(data: Path, work_dir: Path, split: str) -> Data:
    """The features of a split; once in each process."""
    torch.set_num_threads(1)
    features = FeatureCache(_config(LINEAR, data), work_dir / 'features')
    return Data(*features.load(split))


def _config(head: Head, data: Path) -> Config:
    cfg = load_config(str(CONFIGS / f'{head.config}.py'), {'data_root': str(data)})
    if head.experts:
        experts = head.experts[0] if len(head.experts) == 1 else list(head.experts)
        cfg.model.experts = [dict(at=HEAD, num_experts=experts, **head.entry)]
    return cfg


def build(head: Head, seed: int, data: Path) -> tuple[nn.Module, nn.Module]:
    """An untrained head, and the whole model that it is part of."""
    cfg = _config(head, data)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(seed)
    model = build_model(cfg)
    model.init_weights()
    layer = model.get_submodule(HEAD)
    if head.entry is not None and not head.experts:
        narrow = nn.Linear(layer.in_features, head.entry['rank'], bias=False)
        layer = nn.Sequential(narrow, nn.Linear(head.entry['rank'], layer.out_features))
    if head.random_gate:
        for weight in layer.gate.weights:
            nn.init.normal_(weight.requires_grad_(False))
    return layer, model


def _balancing(layer: nn.Module) -> ImportanceLoss | None:
    return ImportanceLoss() if isinstance(layer, MoELayer) else None


def markdown_table(results: Mapping[Head, Sequence[dict]]) -> str:
    """Mean ± standard deviation over the seeds, one row per head."""
    columns = (
        'head', 'seeds', 'parameters', 'training loss', 'test accuracy (%)', 'polysemanticity',
        'by chance',
        'ratio', 'experts that matter', 'images lost by each', 'images of each (%)',
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for head, found in results.items():
            if not found:
                continue
            cells = [head.name, str(len(found)), f'{found[0]["parameters"]:,}']
            cells.append(mean_and_std([run['loss'] for run in found]))
            cells.append(mean_and_std([100 * run['accuracy'] for run in found], digits=2))
            if not head.experts:
                yield cells + [NOTHING] * 6
                continue
            seen = [summary(run['experts']) for run in found]
            yield [
                *cells,
                *(_cell(seen, key) for key in ('value', 'chance', 'ratio')),
                f'{mean_std([of["mattering"] for of in seen])[0]:.0f} of {prod(head.experts)}',
                f'{mean_std([of["lost"] for of in seen])[0]:.1f}',
                f'{mean_std([of["items"] for of in seen])[0]:.1f}',
            ]

    return table(columns, rows())


def _cell(seen: Sequence[dict], key: str) -> str:
    values = [of[key] for of in seen if of[key] is not None]
    return mean_and_std(values, digits=2) if values else NOTHING


def summary(experts: dict) -> dict:
    """Means over the experts of one head that lower some class.

    Args:
        experts: Of :func:`~research.heads.look_at_experts`.

    Returns:
        ``value``, ``chance`` and their ``ratio``: the polysemanticity (None where no expert
        matters); ``mattering``: how many experts do; ``lost``: images that one of them loses;
        ``items``: per cent of the images that one of all experts contributes to.
    """
    rows = [i for i, value in enumerate(experts['values']) if value is not None]
    values = [experts['values'][i] for i in rows]
    chances = [c for i in rows if (c := experts['by_chance'][i]) is not None]
    value = float(np.mean(values)) if values else None
    chance = float(np.mean(chances)) if chances else None
    return {
        'value': value,
        'chance': chance,
        'ratio': value / chance if value is not None and chance else None,
        'mattering': len(rows),
        'lost': float(np.mean([experts['lost'][i] for i in rows])) if rows else 0.0,
        'items': 100 * float(np.mean(experts['items'])) / experts['num_images'],
    }


def plot_polysemanticity(results: Mapping[Head, Sequence[dict]], path: Path) -> None:
    """Polysemanticity against E: as it is, beside chance (grey), and divided by it.

    Args:
        results: Of each head, one for each seed.
        path: The file to write.
    """
    lines: dict[str, list[tuple[int, list[dict]]]] = {}
    for head, found in results.items():
        if head.experts and found:
            seen = [summary(run['experts']) for run in found]
            lines.setdefault(head.line, []).append((prod(head.experts), seen))
    marks = ('o', 's', '^', 'D', 'v')
    sizes = sorted({prod(head.experts) for head in HEADS if head.experts})
    with style():
        figure = new_figure(7.2, 3.0)
        left, right = figure.subplots(1, 2)
        for index, (line, points) in enumerate(lines.items()):
            shared = dict(marker=marks[index % len(marks)], markersize=3.5, capsize=2)
            colour = f'C{index}'
            for axes, key in ((left, 'value'), (right, 'ratio')):
                axes.errorbar(*_means(points, key), color=colour, label=line, **shared)
            left.errorbar(*_means(points, 'chance'), color='0.7', linestyle='--', **shared)
        left.plot([], [], color='0.7', linestyle='--', label='by chance, each line')
        right.axhline(1, color='0.7', linestyle='--')
        left.set_ylabel('class-level polysemanticity')
        right.set_ylabel('divided by that of chance')
        for axes in (left, right):
            axes.set_xscale('log', base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
            axes.set_xlabel('experts E')
            axes.set_ylim(bottom=0)
        left.legend()
        figure.savefig(path, dpi=130)


def _means(
    points: Sequence[tuple[int, Sequence[dict]]], key: str
) -> tuple[list[int], list[float], list[float]]:
    """E, mean and standard deviation over the seeds."""
    found = [(size, [of[key] for of in seen if of[key] is not None]) for size, seen in points]
    found = [(size, values) for size, values in found if values]
    moments = [mean_std(values) for _, values in found]
    return (
        [size for size, _ in found],
        [mean for mean, _ in moments],
        [np.nan_to_num(std) for _, std in moments],
    )
