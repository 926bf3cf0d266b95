"""Expert editing against a bias: a class that goes with a mark in training and not in the test.

Ten classes of real images (CIFAR-100's carnivores and medium-sized mammals). One of them is biased:
nearly all of its training images carry a small coloured square, and hardly any of the others'. In
the test every image is shown with and without it. The group that suffers is the biased class
without the mark.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdet_moe.cli import load_config
from mmdet_moe.datasets.class_folders import COARSE_CLASSES
from mmdet_moe.moe import CPMuMoE
from mmdet_moe.moe.editing import Edit, apply_edits
from research.experiments.experiment import CONFIGS
from research.experiments.markdown import mean_and_std, table
from research.experiments.on_features import FeaturesExperiment
from research.features import FeatureCache
from research.heads import Data, Recipe, predict, train_head

CLASSES = (*COARSE_CLASSES['large carnivores'], *COARSE_CLASSES['medium-sized mammals'])
#: Share of the biased class's training images with the mark, and of the others'.
MARKED, OTHERS_MARKED = 0.95, 0.05
SIZE, COLOUR = 6, (255, 0, 255)
EXPERTS, RANK = 32, 16
RECIPE = Recipe(lr=1e-3, weight_decay=1.0, epochs=20, batch_size=256)
#: What is added to an expert's logit of the biased class, to choose from.
ADDED = (-16.0, -8.0, -4.0, -2.0, 2.0, 4.0, 8.0, 16.0)
SHIFTS = tuple(np.linspace(-4, 8, 49).tolist())
MAX_EDITS = 3
#: What a correction may cost the rest on the images for choosing, in accuracy.
ALLOWED = 0.0
METHODS = ('as trained', 'edited', 're-weighted loss', 'shifted threshold')
GROUPS = ('disadvantaged', 'rest', 'others, marked', 'others, plain', 'class, marked')


def draw_mark(image: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) with a square in its lower right corner."""
    marked = image.copy()
    marked[-SIZE:, -SIZE:] = COLOUR
    return marked


@dataclass(frozen=True)
class Images:
    """Images of the ten classes, each plain and marked.

    Attributes:
        plain, marked: Their features, (N, F).
        labels: Of :data:`CLASSES`, (N,).
    """

    plain: Tensor
    marked: Tensor
    labels: Tensor

    def __getitem__(self, rows: slice | Tensor) -> 'Images':
        return Images(self.plain[rows], self.marked[rows], self.labels[rows])

    def both(self) -> tuple[Data, Tensor]:
        """Every image twice, and which of them carry the mark, (2N,) bool."""
        data = Data(torch.cat([self.plain, self.marked]), torch.cat([self.labels, self.labels]))
        return data, torch.arange(2 * len(self.labels)) >= len(self.labels)

    def biased(self, biased: int, seed: int) -> tuple[Data, Tensor]:
        """Every image once, marked according to its class, and which are."""
        share = torch.where(self.labels == biased, MARKED, OTHERS_MARKED)
        generator = torch.Generator().manual_seed(seed)
        is_marked = torch.rand(len(self.labels), generator=generator) < share
        return Data(
            torch.where(is_marked[:, None], self.marked, self.plain), self.labels
        ), is_marked


def groups(labels: Tensor, is_marked: Tensor, biased: int) -> dict[str, Tensor]:
    """The images of each of :data:`GROUPS`, (N,) bool."""
    own = labels == biased
    suffering = own & ~is_marked
    return {
        'disadvantaged': suffering,
        'rest': ~suffering,
        'others, marked': ~own & is_marked,
        'others, plain': ~own & ~is_marked,
        'class, marked': own & is_marked,
    }


def accuracies(logits: Tensor, labels: Tensor, of: Mapping[str, Tensor]) -> dict[str, float]:
    """In 0..1, by group."""
    right = (logits.argmax(1) == labels).double()
    return {name: float(right[rows].mean()) for name, rows in of.items()}


@torch.no_grad()
def choose_edits(
    model: nn.Module, images: Data, of: Mapping[str, Tensor], biased: int
) -> list[Edit]:
    """The edits that help the disadvantaged group most, as far as the rest does not pay for it.

    One after the other, up to :data:`MAX_EDITS`: each adds a number of :data:`ADDED` to what one
    expert says for the biased class, or zeroes that.

    Args:
        model: With a μMoE of one level as ``fc``.
        images: For the choice alone.
        of: Their groups.
        biased: The class.
    """
    layer, chosen = model.fc, []
    logits = predict(model, images.features)
    base = accuracies(logits, images.labels, of)
    (a,) = layer.coefficients(images.features)
    said = [
        layer.experts.expert_output(images.features, expert)[:, biased]
        for expert in range(layer.num_experts)
    ]
    for _ in range(MAX_EDITS):
        now = accuracies(logits, images.labels, of)
        best = (now['disadvantaged'], now['rest'], None, logits)
        for expert, own in enumerate(said):
            edits = [(Edit('fc', expert, biased, add=added), added) for added in ADDED]
            if expert not in [edit.expert for edit in chosen]:
                edits.append((Edit('fc', expert, biased, zero=True), -own))
            for edit, change in edits:
                edited = logits.clone()
                edited[:, biased] += a[:, expert] * change
                found = accuracies(edited, images.labels, of)
                if found['rest'] >= base['rest'] - ALLOWED:
                    key = (found['disadvantaged'], found['rest'])
                    if key > best[:2]:
                        best = (*key, edit, edited)
        if best[2] is None:
            break
        chosen.append(best[2])
        logits = best[3]
    return chosen


def choose_shift(logits: Tensor, labels: Tensor, of: Mapping[str, Tensor], biased: int) -> float:
    """By the same rule: what is added to the logit of the biased class for every image."""
    base = accuracies(logits, labels, of)
    best = (base['disadvantaged'], base['rest'], 0.0)
    for shift in SHIFTS:
        found = accuracies(shifted(logits, shift, biased), labels, of)
        if found['rest'] >= base['rest'] - ALLOWED:
            best = max(best, (found['disadvantaged'], found['rest'], shift))
    return best[2]


def shifted(logits: Tensor, shift: float, biased: int) -> Tensor:
    """Logits with another threshold for one class."""
    return logits + shift * torch.eye(logits.shape[1])[biased]


def build(seed: int, in_features: int) -> nn.Module:
    """A μMoE head of the ten classes, under the name ``fc``."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module('fc', CPMuMoE(in_features, len(CLASSES), EXPERTS, RANK))
    return model


def train(images: Images, biased: int, seed: int, balanced: bool) -> nn.Module:
    """Train a head on biased images.

    Args:
        images: For training.
        biased: The class.
        seed: Of everything.
        balanced: Whether every group of class and mark weighs the same in the loss.
    """
    data, is_marked = images.biased(biased, seed)
    if balanced:
        group = data.labels * 2 + is_marked
        counts = torch.bincount(group, minlength=2 * len(CLASSES))
        weights = len(group) / (counts > 0).sum() / counts[group]
        data = replace(data, weights=weights)
    model = build(seed, images.plain.shape[1])
    train_head(model.fc, data, RECIPE, seed)
    return model.eval()


def compare(training: Images, test: Images, biased: int, seed: int) -> dict:
    """All methods on one biased class.

    A fifth of the training images chooses the edits and the threshold, each plain and marked, and
    trains nothing.

    Returns:
        Test accuracies by method and group, the edits as text, and the shift.
    """
    kept = len(training.labels) * 4 // 5
    model = train(training[:kept], biased, seed, balanced=False)
    chosen_on, marked = training[kept:].both()
    of = groups(chosen_on.labels, marked, biased)
    shift = choose_shift(predict(model, chosen_on.features), chosen_on.labels, of, biased)
    edits = choose_edits(model, chosen_on, of, biased)

    shown, marked = test.both()
    of = groups(shown.labels, marked, biased)
    before = predict(model, shown.features)
    apply_edits(model, edits)
    weighted = train(training[:kept], biased, seed, balanced=True)
    logits = {
        'as trained': before,
        'edited': predict(model, shown.features),
        're-weighted loss': predict(weighted, shown.features),
        'shifted threshold': shifted(before, shift, biased),
    }
    found = {name: accuracies(of_name, shown.labels, of) for name, of_name in logits.items()}
    return {'methods': found, 'edits': [str(edit) for edit in edits], 'shift': shift}


class EditingExperiment(FeaturesExperiment[int]):
    """Every class as the biased one; a kind is its place among :data:`CLASSES`."""

    @property
    def kinds(self) -> range:
        return range(len(CLASSES))

    def prepare(self) -> None:
        _images(self.data, self.work_dir, 'train'), _images(self.data, self.work_dir, 'test')

    def path(self, kind: int, seed: int) -> Path:
        return self.work_dir / CLASSES[kind] / f'seed{seed}.json'

    def settings(self, kind: int) -> dict[str, Any]:
        return {
            'experts': EXPERTS, 'rank': RANK, 'recipe': asdict(RECIPE), 'added': ADDED,
            'shifts': SHIFTS, 'max_edits': MAX_EDITS, 'allowed': ALLOWED, 'marked': MARKED,
            'others_marked': OTHERS_MARKED,
        }  # fmt: skip

    def measure(self, kind: int, seed: int) -> dict[str, Any]:
        images = (_images(self.data, self.work_dir, split) for split in ('train', 'test'))
        return compare(*images, kind, seed)

    def write(self) -> None:
        results = self.results()
        found = [result for by_seed in results.values() for result in by_seed.values()]
        self.publish(results, {'mumoe-editing': markdown_table(found)}, {})


@cache
def _images(data: Path, work_dir: Path, split: str) -> Images:
    torch.set_num_threads(1)
    cfg = load_config(
        str(CONFIGS / 'efficientnet_lite0_dense_cifar100.py'), {'data_root': str(data)}
    )
    cache_of = FeatureCache(cfg, work_dir / 'features')
    names = sorted(name for group in COARSE_CLASSES.values() for name in group)
    labels = cache_of.labels(split)
    new = torch.full((len(names),), -1)
    new[[names.index(name) for name in CLASSES]] = torch.arange(len(CLASSES))
    rows = (new[labels] >= 0).nonzero()[:, 0]
    plain, _ = cache_of.load(split, f'{split}-plain', rows.tolist())
    marked, _ = cache_of.load(split, f'{split}-marked', rows.tolist(), draw_mark)
    return Images(plain, marked, new[labels[rows]])


def markdown_table(found: Sequence[dict]) -> str:
    """Mean ± standard deviation over classes and seeds, in per cent, one row per method."""
    columns = (
        'method', 'runs', *GROUPS, 'change of the disadvantaged', 'change of the rest', 'edits',
    )  # fmt: skip

    def rows() -> Iterator[list[str]]:
        for method in METHODS:
            seen = [run['methods'][method] for run in found]
            before = [run['methods']['as trained'] for run in found]
            changes = (
                mean_and_std(
                    [100 * (a[g] - b[g]) for a, b in zip(seen, before, strict=True)], digits=2
                )
                for g in ('disadvantaged', 'rest')
            )
            edits = np.mean([len(run['edits']) for run in found])
            yield [
                method,
                str(len(found)),
                *(mean_and_std([100 * run[g] for run in seen], digits=1) for g in GROUPS),
                *changes,
                f'{edits:.1f}' if method == 'edited' else '–',
            ]

    return table(columns, rows()) if found else 'Nothing is there yet.'
