"""``tools/attack_experts.py``: what an attack does to a classifier, to its routing, and to each of
its experts alone.

Three questions stand behind the table. *Does the routing change?* Not only under an attack: random
noise of the same size is the control. *Who was fooled, the router or the experts?* The attacked
image is predicted with the routing of the clean one, and the clean image with the routing of the
attacked one; and a new attack is made on the model whose routing is held, since the first one did
not know of that. *Is an expert alone more robust than the mixture?* Each is attacked itself
(arXiv 2509.05086).
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from mmpretrain.models.classifiers import BaseClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmdet_moe.analysis.attacks import ATTACKS, MAX_BATCH, Attack, noisy
from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.interventions import (
    ALL,
    MANY_EXPERTS,
    Intervention,
    applied,
    decisions_held,
    decisions_noted,
)
from mmdet_moe.analysis.measuring import add_options, images_of, load_trained
from mmdet_moe.cli import check_folder
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.expert_layer import find_expert_layers
from mmdet_moe.moe.routing import Routing
from mmdet_moe.moe.surgery.report import in_columns
from mmdet_moe.progress import progress_bar

CLEAN, NOISE, ATTACKED = COLUMNS = ('clean', 'noise', 'attacked')
#: The rows of the table, for the model and for each layer.
TITLES = {
    'model': 'accuracy',
    'loss': 'cross-entropy (nats)',
    'changed': 'decisions for other experts than of the clean image',
    'clean_routing': 'accuracy with the routing of the clean image',
    'clean_image': 'accuracy of the clean image with this routing',
    'held': 'accuracy, attacked with the routing held',
    'alone': 'accuracy of expert {} alone, attacked itself',
}
#: Shares of images that are worth a note.
_MANY = 0.01
_Z = 1.959964  # of a 95 % interval


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Attack a trained classifier: its accuracy, whether the routing changes, and '
        'how robust each expert is alone. Needs mmdet_moe[attacks].'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--attack',
        choices=tuple(ATTACKS),
        default='pgd',
        help='projected gradient ascent with a fixed step, or AutoPGD, which adapts it (pgd)',
    )
    parser.add_argument(
        '--eps',
        default='8/255',
        metavar='E',
        help='by how much a value of a pixel changes at most, black being 0 and white 1 (8/255)',
    )
    parser.add_argument('--steps', type=int, default=20, metavar='N', help='of the attack (20)')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE.json',
        help='the results (default: next to the checkpoint, attack_<attack>_<checkpoint>_<split>)',
    )
    add_options(parser, max_images=500)
    args = parser.parse_args(argv)
    if args.out is None and '://' not in args.checkpoint:
        checkpoint = Path(args.checkpoint)
        name = f'attack_{args.attack}_{checkpoint.stem}_{args.split}.json'
        args.out = checkpoint.parent / name
    return args


def attack_checkpoint(args: argparse.Namespace) -> dict:
    """Attack a checkpoint, print the table, and write it.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        The content of the file, see :meth:`Robustness.rows`.

    Raises:
        ConfigError: For a mistake in the config, the data or the command line.
    """
    attack = _check(args)
    cfg, model, meta = load_trained(args)
    if not isinstance(model, BaseClassifier):
        raise ConfigError(
            f'{type(model).__name__} is no classifier of MMPretrain, and nothing else is attacked; '
            'give the config of a classifier'
        )
    data = images_of(args, cfg, meta)
    total = len(data)
    found = Robustness(model, attack)
    done = 0  # a bar that is not shown does not count
    with progress_bar(total=total, desc=ATTACKS[attack.kind], unit=' images') as bar:
        for x, labels in _batches(data, next(model.parameters()).device):
            found.add(x, labels, seed=done)
            done += len(x)
            bar.update(len(x))
    result = {
        'config': Path(args.config).stem,
        'checkpoint': Path(args.checkpoint).name,
        'split': args.split,
        'images': total,
        'attack': attack.kind,
        'eps': attack.eps,
        'steps': attack.steps,
        'rows': found.rows(),
    }
    write_file(args.out, json.dumps(result, indent=1, allow_nan=False).encode())
    print(
        f'\n{total:,} of {len(data.dataset):,} images of {args.split}; {ATTACKS[attack.kind]}, '
        f'{attack.steps} steps, eps = {args.eps} ({255 * attack.eps:.3g} of 255)\n'
    )
    print(in_columns(table(result['rows'])), *found.notes(), sep='\n')
    print(f'\nResults: {args.out}')
    return result


def _check(args: argparse.Namespace) -> Attack:
    try:
        eps = float(Fraction(args.eps))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f'--eps={args.eps} must be a number or a fraction, such as 8/255'
        ) from None
    attack = Attack(args.attack, eps, args.steps)
    if args.out is None:
        raise ConfigError('--out: say where to, for the checkpoint is an address')
    check_folder(args.out.parent, '--out')
    if args.out.is_dir() or (args.out.exists() and not args.overwrite):
        raise ConfigError(f"--out: '{args.out}' exists; choose another name, or use --overwrite")
    return attack


def _batches(data: AnalysisData, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The images, float32 (N, C, H, W) in [0, 1], and their classes, int64 (N,)."""
    size = min(data.loader_cfg.get('batch_size', 1), MAX_BATCH)
    for batch in data.batches(batch_size=size, num_workers=0):
        inputs = batch['inputs']
        if not isinstance(inputs, Tensor):
            if len({image.shape for image in inputs}) > 1:
                raise ConfigError(
                    'images of several sizes cannot be attacked together; set '
                    'val_dataloader.batch_size=1'
                )
            inputs = torch.stack(list(inputs))
        if inputs.dtype != torch.uint8:
            raise ConfigError(
                f'the data pipeline gives {inputs.dtype} instead of pixels in 0..255 (uint8), so '
                'that eps has no unit; leave the normalisation to model.data_preprocessor'
            )
        labels = [sample.get('gt_label') for sample in batch['data_samples']]
        if any(label is None or label.numel() != 1 for label in labels):
            raise ConfigError(
                'only images of one class each are attacked, and these have several, or none; take '
                'another --split or data set'
            )
        yield inputs.to(device).float() / 255, torch.cat(labels).to(device)


class Robustness:
    """What an attack does to one model, collected over batches of images.

    Args:
        model: A classifier in evaluation mode. Its parameters lose their gradients.
        attack: The attack.
    """

    def __init__(self, model: nn.Module, attack: Attack) -> None:
        self.model, self.attack = model.requires_grad_(False), attack
        self._values: dict[tuple, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._blind: list[Tensor] = []
        self._notes: list[str] = []
        self._layers: dict[str, MoELayer] | None = None  # known after the first batch

    def logits(self, x: Tensor) -> Tensor:
        """(N, classes) of float32 images (N, C, H, W) in [0, 1], differentiable."""
        inputs = self.model.data_preprocessor({'inputs': 255 * x}, False)['inputs']
        return self.model(inputs, mode='tensor')

    def add(self, x: Tensor, labels: Tensor, seed: int = 0) -> None:
        """Attack a batch, in as many ways as there are rows.

        Args:
            x: float32 (N, C, H, W) in [0, 1].
            labels: int64 (N,).
            seed: Of the noise and the attack.

        Raises:
            ConfigError: If the model gives no scores of classes, or no gradient.
        """
        if self._layers is None:
            self._begin(x, labels)
        seen = {CLEAN: x, NOISE: noisy(x, self.attack.eps, seed)}
        seen[ATTACKED] = self._attacked(x, labels, seed)
        decisions, right = {}, {}
        for column, images in seen.items():
            with decisions_noted(self._layers) as decisions[column], torch.no_grad():
                logits = self.logits(images)
            right[column] = logits.argmax(1) == labels
            self._note('model', None, column, right[column])
            self._note('loss', None, column, cross_entropy(logits, labels, reduction='none'))
        self._blind.append(self._has_no_gradient(x, labels)[right[CLEAN]])
        groups = {name: {name: layer} for name, layer in self._layers.items()}
        if len(groups) > 1:
            groups[ALL] = self._layers
        for name, layers in groups.items():
            for column in (NOISE, ATTACKED):
                if name != ALL:
                    share = changed(decisions[CLEAN][name], decisions[column][name])
                    self._note('changed', name, column, share[right[CLEAN]])
                with decisions_held(layers, decisions[CLEAN]):
                    self._note('clean_routing', name, column, self._right(seen[column], labels))
                with decisions_held(layers, decisions[column]):
                    self._note('clean_image', name, column, self._right(x, labels))
            self._note('held', name, ATTACKED, self._right_if_held(layers, x, labels, seed))
            count = 0 if name == ALL else layers[name].num_experts
            for expert in range(count if count <= MANY_EXPERTS else 0):
                with applied(Intervention(name, 'only', expert), self._layers):
                    alone = {**seen, ATTACKED: self._attacked(x, labels, seed)}
                    for column, images in alone.items():
                        self._note('alone', name, column, self._right(images, labels), expert)

    def rows(self) -> list[dict[str, Any]]:
        """The results: ``what`` (of :data:`TITLES`), ``layer``, ``expert``, and for each of
        :data:`COLUMNS` ``{'mean', 'interval', 'images'}``, or None.

        Accuracies are of all images; ``'changed'`` is the mean share of an image's decisions, of
        those images that the model is right about before the attack. Intervals of shares are
        Wilson's, 95 %, an image being the unit; for images of many decisions they are too wide.
        """
        found = []
        for (what, layer, expert), columns in self._values.items():
            row = {'what': what, 'layer': layer, 'expert': expert}
            for column in COLUMNS:
                values = torch.cat([torch.zeros(0), *columns[column]]).double()
                row[column] = None
                if count := len(values):
                    mean = float(values.mean())
                    ends = None if what == 'loss' else wilson(mean, count)
                    row[column] = {'mean': mean, 'interval': ends, 'images': count}
            found.append(row)
        return found

    def notes(self) -> list[str]:
        """What the reader of the results has to know: signs of gradients that mislead the attack,
        and layers that are left out.
        """
        notes = list(self._notes)
        clean, noise, attacked = (torch.cat(self._values['model', None, None][c]) for c in COLUMNS)
        blind = float(torch.cat(self._blind).float().mean()) if clean.any() else 0.0
        if blind > _MANY:
            notes.append(
                f'note: {blind:.1%} of the images have no gradient at all, so that the attack is '
                'blind there: what is left of the accuracy is an upper bound'
            )
        missed = float((clean & ~noise & attacked).float().mean())
        if missed > _MANY:
            notes.append(
                f'note: random noise fools the model in {missed:.1%} of the images in which the '
                'attack does not: take more --steps'
            )
        return notes

    def _begin(self, x: Tensor, labels: Tensor) -> None:
        """Look at the model with the first images."""
        found = find_expert_layers(self.model)
        sparse = {n: m for n, m in found.items() if isinstance(m, MoELayer) and m.num_experts > 1}
        with decisions_noted(sparse) as decisions:
            logits = self.logits(x.requires_grad_())
        x.requires_grad_(False)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ConfigError(
                f"{type(self.model.head).__name__}: with mode='tensor' the model gives no scores "
                'of classes, so that it cannot be attacked'
            )
        if not logits.requires_grad:
            raise ConfigError(
                'no gradient reaches the images, so that they cannot be attacked; take the model '
                'without frozen parts that compute without gradients'
            )
        with torch.no_grad():
            inputs = self.model.data_preprocessor({'inputs': 255 * x}, False)['inputs']
            samples = self.model(inputs, mode='predict')
        predicted = [int(sample.pred_label) for sample in samples]
        if predicted != logits.argmax(1).tolist():
            raise ConfigError(
                f'{type(self.model.head).__name__} predicts other classes than those with the '
                "largest scores of mode='tensor', which the attack goes by; take another head"
            )
        self._layers = {
            name: layer
            for name, layer in sparse.items()
            if decisions[name] and Routing.cat(decisions[name]).num_images == len(x)
        }
        self._notes += [
            f'note: layer {name} is left out: '
            + ('it decides for parts of a batch' if name in sparse else 'it chooses nobody')
            for name, layer in found.items()
            if name not in self._layers and layer.num_experts > 1
        ]

    def _note(
        self, what: str, layer: str | None, column: str, values: Tensor, expert: int | None = None
    ) -> None:
        self._values[what, layer, expert][column].append(values.cpu())

    def _has_no_gradient(self, x: Tensor, labels: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        loss = cross_entropy(self.logits(x), labels, reduction='sum')
        return ~torch.autograd.grad(loss, x)[0].flatten(1).any(1)

    @torch.no_grad()
    def _right(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.logits(x).argmax(1) == labels

    def _attacked(self, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        """The images; those that the model is wrong about anyway are left as they are."""
        right, attacked = self._right(x, labels), x.clone()
        attacked[right] = self.attack(self.logits, x[right], labels[right], seed)
        return attacked

    def _right_if_held(
        self, layers: Mapping[str, MoELayer], x: Tensor, labels: Tensor, seed: int
    ) -> Tensor:
        """Whether the model is right after an attack in which layers keep their decisions."""
        right = self._right(x, labels)
        still = right.clone()
        if right.any():
            x, labels = x[right], labels[right]
            with decisions_noted(layers) as decisions:
                self._right(x, labels)
            with decisions_held(layers, decisions):
                still[right] = self._right(self.attack(self.logits, x, labels, seed), labels)
        return still


def changed(before: Sequence[Routing], after: Sequence[Routing]) -> Tensor:
    """(N,): of each image's decisions the share in which other experts are chosen.

    Args:
        before: Of a layer, call by call.
        after: Of the same layer for other versions of the same images.
    """
    one, other = Routing.cat(before), Routing.cat(after)
    differ = ((one.dense_weights() > 0) != (other.dense_weights() > 0)).any(1).double()
    sums = differ.new_zeros(one.num_images).index_add(0, one.image_ids, differ)
    return sums / torch.bincount(one.image_ids, minlength=one.num_images)


def wilson(mean: float, count: int) -> list[float]:
    """Wilson's 95 % interval of a share, the mean of so many values in 0..1."""
    centre, scale = mean + _Z**2 / (2 * count), 1 + _Z**2 / count
    half = _Z * sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of :meth:`Robustness.rows`, the heads first."""
    lines, layer = [('', *COLUMNS)], None
    for row in rows:
        if row['layer'] != layer:
            layer = row['layer']
            heading = 'all layers together' if layer == ALL else f'layer {layer}'
            lines.append((heading, *[''] * len(COLUMNS)))
        title = TITLES[row['what']].format(row['expert'])
        lines.append((title, *(_cell(row[column]) for column in COLUMNS)))
    return lines


def _cell(entry: dict | None) -> str:
    if entry is None:
        return '-'
    ends = entry['interval']
    return f'{entry["mean"]:.3f}' + (f' ({ends[0]:.3f} to {ends[1]:.3f})' if ends else '')
