"""One classifier for two unlike data sets: where theory says that experts must win.

CIFAR-100 and Fashion-MNIST, the classes of both, on the features of a frozen ImageNet backbone:
linear layers on pooled features, or convolutions on its last maps (:data:`TRUNKS`). The claim to be
tested (arXiv 2208.02813; arXiv 2311.04894): a router finds the data sets apart, and a mixture is
then better than a dense model of equal cost. And: which way to train the router does it take?
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmdet_moe.cli import load_config
from mmdet_moe.drawing import new_figure, style
from mmdet_moe.moe import MoELayer, Utilization
from mmdet_moe.moe.flops import count_flops
from mmdet_moe.moe.metrics import mutual_information
from mmdet_moe.moe.utilization import DEAD_SHARE
from mmdet_moe.registry import build
from research.experiments.experiment import CONFIGS, folder_name
from research.experiments.markdown import NOTHING, mean_and_std, table
from research.experiments.on_features import FeaturesExperiment, choose, chosen
from research.features import FeatureCache
from research.heads import Data, Recipe, accuracy, predict, train_head
from research.runs import mean_std

CONFIG = 'efficientnet_lite0_dense_cifar100'
#: Training images of each data set: the first ones.
IMAGES = 20_000
SOURCES = ('CIFAR-100', 'Fashion-MNIST')
CLASSES = (100, 10)
#: Channels in the middle of an expert, w; it gives 2w.
WIDTH = 32
#: Tried on the dense model, with a tenth of the training images held out.
RECIPES = tuple(
    Recipe(lr, decay, epochs=10, batch_size=256) for lr, decay in product((1e-3, 3e-3), (0.01, 1.0))
)

#: Clustered: k-means start on normalised features, no noise, straight-through weights.
_CLUSTERED = {'init': 'kmeans', 'noise': False, 'softmax': 'straight_through'}
_NORMALISED = {'normalise_levels': 1}
_SWITCH = {'type': 'mmdet_moe.SwitchLoss', 'weight': 0.01}
_IMPORTANCE = {'type': 'mmdet_moe.ImportanceLoss', 'weight': 0.5}
_DATA_SETS = {'type': 'mmdet_moe.DatasetLoss', 'weight': 0.1, 'sources': 2}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: As the table calls it.
        experts: E; 0 for a dense model.
        top_k: k.
        router: Options of the router.
        loss: Config of the balancing loss, if any.
        width: w. None: as wide as costs what 4 experts of :data:`WIDTH` and their router do.
        apart: A dense model for each data set, told which one is whose.
        frozen_router: The router stays as it was drawn.
        one_for_all: The experts have the same weights, and only their norms are their own.
    """

    name: str
    experts: int = 0
    top_k: int = 1
    router: Mapping[str, Any] = field(default_factory=dict, hash=False)
    loss: Mapping[str, Any] | None = field(default=None, hash=False)
    width: int | None = WIDTH
    apart: bool = False
    frozen_router: bool = False
    one_for_all: bool = False

    def hidden(self, trunk: 'Trunk') -> int:
        """The width w."""
        return WIDTH + trunk.router_costs if self.width is None else self.width


METHODS = (
    Method('dense, equal cost', width=None),
    Method('dense, 4 times as wide', width=4 * WIDTH),
    Method('a dense model for each data set', apart=True),
    Method('4 experts: Switch', 4, loss=_SWITCH),
    Method('4 experts: importance', 4, loss=_IMPORTANCE),
    Method('4 experts: loss-free', 4, router={'constraint': {'type': 'mmdet_moe.BiasBalancing'}}),
    Method('4 experts: DAMEX', 4, loss=_DATA_SETS),
    Method('4 experts: Switch, no noise', 4, router={'noise': False}, loss=_SWITCH),
    Method(
        '4 experts: Switch, no noise, normalised', 4, router={'noise': False, **_NORMALISED},
        loss=_SWITCH,
    ),
    Method(
        '4 experts: Switch, no noise, normalised, straight-through', 4,
        router={'noise': False, 'softmax': 'straight_through', **_NORMALISED}, loss=_SWITCH,
    ),
    Method(
        '4 experts: loss-free, normalised', 4,
        router={'constraint': {'type': 'mmdet_moe.BiasBalancing'}, **_NORMALISED},
    ),
    Method(
        '4 experts: k-means start, Switch', 4, router={'noise': False, 'init': 'kmeans'},
        loss=_SWITCH,
    ),
    Method('4 experts: clustered, Switch', 4, router=_CLUSTERED, loss=_SWITCH),
    Method('4 experts: clustered alone', 4, router=_CLUSTERED),
    Method(
        '4 experts: clustered, loss-free', 4,
        router={**_CLUSTERED, 'constraint': {'type': 'mmdet_moe.BiasBalancing'}},
    ),
    Method('2 experts: clustered, Switch', 2, router=_CLUSTERED, loss=_SWITCH),
    Method('8 experts: clustered, Switch', 8, router=_CLUSTERED, loss=_SWITCH),
    Method(
        '8 experts of half the width, k = 2: k-means start, Switch', 8, 2, width=WIDTH // 2,
        router={'noise': False, 'init': 'kmeans'}, loss=_SWITCH,
    ),
    Method(
        '4 experts: random router, never trained', 4, frozen_router=True,
        router={'noise': False, 'init_std': 1.0, 'softmax': 'straight_through', **_NORMALISED},
    ),
)  # fmt: skip
DENSE = METHODS[0]
_ON_MAPS = (
    'dense, equal cost', 'dense, 4 times as wide', 'a dense model for each data set',
    '4 experts: Switch', '4 experts: importance', '4 experts: k-means start, Switch',
    '2 experts: clustered, Switch', '4 experts: clustered, Switch', '8 experts: clustered, Switch',
    '4 experts: random router, never trained',
)  # fmt: skip
METHODS_ON_MAPS = (
    *(method for method in METHODS if method.name in _ON_MAPS),
    Method(
        '2 experts: clustered, Switch, norms alone', 2, router=_CLUSTERED, loss=_SWITCH,
        one_for_all=True,
    ),
)  # fmt: skip


def _linear(width: int) -> nn.Sequential:
    layers = nn.Linear(1280, width), nn.ReLU(), nn.Linear(width, 2 * width), nn.ReLU()
    return nn.Sequential(*layers)


def _convolutions(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, size in ((320, width, 1), (width, width, 3), (width, 2 * width, 1)):
        layers.append(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Trunk:
    """What follows the frozen backbone: dense, or as experts.

    Attributes:
        name: Of the experiment.
        shape: Of an image's features, as the trunk gets them.
        body: The dense one, or an expert, of a width w.
        router_costs: What a router of 4 experts costs, in units of w, rounded up.
        methods: That are compared.
        stage: Of the backbone, whose maps are the features; by default its last one, pooled.
        image_size: The images' edge, which the backbone sees.
    """

    name: str
    shape: tuple[int, ...]
    body: Callable[[int], nn.Sequential]
    router_costs: int
    methods: tuple[Method, ...]
    stage: int | None = None
    image_size: int = 96


TRUNKS = {
    trunk.name: trunk
    for trunk in (
        Trunk('domains', (1280,), _linear, 4, METHODS),
        Trunk(
            'domains-maps', (320, 2, 2), _convolutions, 1, METHODS_ON_MAPS, stage=5, image_size=64
        ),
    )
}  # fmt: skip


def build_head(
    trunk: Trunk, method: Method, seed: int, classes: int = sum(CLASSES)
) -> nn.Sequential:
    """An untrained model (N, F) → (N, classes)."""
    torch.manual_seed(seed)
    width, channels, *maps = method.hidden(trunk), *trunk.shape
    first: nn.Module = trunk.body(width)
    if method.experts:
        experts = [trunk.body(width) for _ in range(method.experts)]
        if method.one_for_all:
            for layers in zip(*experts, strict=True):
                for layer in layers:
                    if isinstance(layer, nn.Conv2d):
                        layer.weight = layers[0].weight
        first = MoELayer(
            experts,
            method.experts,
            method.top_k,
            {'type': 'mmdet_moe.GAPRouter', **method.router},
            channels,
            granularity='image' if maps else 'token',
        )
        first.router.requires_grad_(not method.frozen_router)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if maps else nn.Identity()
    return nn.Sequential(nn.Unflatten(1, trunk.shape), first, pool, nn.Linear(2 * width, classes))


class DomainsExperiment(FeaturesExperiment[Method]):
    """All methods, on CIFAR-100 and Fashion-MNIST.

    Args:
        data, work_dir, seeds, jobs: As of the base class.
        fashion_mnist: Folder of Fashion-MNIST.
        trunk: Where the experts are.
        methods: What is trained; the trunk's by default.
        images: Training images of each data set.
    """

    def __init__(
        self,
        data: Path,
        work_dir: Path,
        seeds: Sequence[int],
        jobs: int,
        fashion_mnist: Path,
        trunk: Trunk = TRUNKS['domains'],
        methods: Sequence[Method] | None = None,
        images: int = IMAGES,
    ) -> None:
        super().__init__(data, work_dir, seeds, jobs)
        self.kinds = trunk.methods if methods is None else methods
        self.where = Where((self.data, fashion_mnist.resolve()), self.work_dir, images, trunk)

    def prepare(self) -> None:
        load(self.where, 'train'), load(self.where, 'test')
        if not self._recipe_path.exists():
            self.tune()

    def tune(self) -> None:
        """Choose the best recipe for the dense model, on a tenth of the training images."""
        images = load(self.where, 'train')
        # Drawn: a data set may go round its classes, and every tenth image then lacks some.
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out = torch.zeros(len(images), dtype=torch.bool)
        held_out[drawn[: len(images) // 10]] = True

        def judge(recipe: Recipe) -> float:
            head = build_head(self.where.trunk, DENSE, 0)
            train_head(head, images[~held_out], recipe, seed=0)
            held = images[held_out]
            return accuracy(predict(head, held.features), held.labels)

        choose(RECIPES, judge, self._recipe_path)

    @property
    def _recipe_path(self) -> Path:
        return self.work_dir / 'recipe.json'

    def path(self, kind: Method, seed: int) -> Path:
        return self.work_dir / folder_name(kind.name).replace('=', '') / f'seed{seed}.json'

    def settings(self, kind: Method) -> dict[str, Any]:
        return {
            'trunk': self.where.trunk.name,
            'method': asdict(kind),
            'recipe': asdict(chosen(self._recipe_path)),
            'images': self.where.images,
        }

    def measure(self, kind: Method, seed: int) -> dict[str, Any]:
        images = load(self.where, 'train'), load(self.where, 'test')
        return measure(self.where.trunk, kind, seed, chosen(self._recipe_path), *images)

    def write(self) -> None:
        results, name = self.results(), self.where.trunk.name
        text = markdown_table(results)
        if self._recipe_path.exists():
            recipe = chosen(self._recipe_path)
            text = (
                f'AdamW, cosine to 0, {recipe.epochs} epochs in batches of {recipe.batch_size}, '
                f'learning rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}: of '
                f'{len(RECIPES)} recipes the best for the dense model, on a held-out tenth of the '
                f'training images.\n\n{text}'
            )
        is_default = (self.kinds, self.where.images) == (self.where.trunk.methods, IMAGES)
        compared = len(results) > 1 and all(results.values())
        pictures = {f'{name}.png': partial(plot, results)} if compared else {}
        self.publish(results, {name: text}, pictures, is_default)


@dataclass(frozen=True)
class Where:
    """What the features are computed of.

    Attributes:
        data: Folders of the data sets.
        work_dir: Gets a folder ``features``.
        images: Training images of each.
        trunk: For which.
    """

    data: tuple[Path, ...]
    work_dir: Path
    images: int
    trunk: Trunk


@cache
def load(where: Where, split: str) -> Data:
    """The images of both data sets: features, labels among all classes, and sources."""
    torch.set_num_threads(1)
    parts, first_class = [], 0
    for source, name in enumerate(SOURCES):
        cache = FeatureCache(_config(source, where), where.work_dir / 'features' / name)
        indices = range(where.images) if split == 'train' else None
        features, labels = cache.load(split, indices=indices, change=_coloured if source else None)
        sources = torch.full_like(labels, source)
        parts.append(Data(features.flatten(1), labels + first_class, sources=sources))
        first_class += CLASSES[source]
    keys = 'features', 'labels', 'sources'
    return Data(**{key: torch.cat([getattr(part, key) for part in parts]) for key in keys})


def _config(source: int, where: Where) -> Any:
    cfg = load_config(str(CONFIGS / f'{CONFIG}.py'), {'data_root': str(where.data[0])})
    if source:
        for split in ('train', 'val', 'test'):
            dataset = cfg[f'{split}_dataloader'].dataset
            root, is_test = str(where.data[source]), split != 'train'
            dataset.update(type='FashionMNIST', data_root=root, test_mode=is_test)
        cfg.model.head.num_classes = CLASSES[source]
    trunk = where.trunk
    if trunk.stage is not None:
        cfg.model.backbone.module.out_indices = (trunk.stage,)
        cfg.model.neck = None
        for step in cfg.test_dataloader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = trunk.image_size
    return cfg


def _coloured(image: np.ndarray) -> np.ndarray:
    """A grey image (H, W) with three channels."""
    return np.repeat(image[..., None], 3, axis=-1)


def measure(
    trunk: Trunk, method: Method, seed: int, recipe: Recipe, train: Data, test: Data
) -> dict:
    """Train one model; its accuracy for each data set, its cost, and what its router does.

    Args:
        trunk: Of which kind.
        method: Which.
        seed: Of weights and order.
        recipe: Of the training.
        train, test: Images with sources.
    """
    loss = None if method.loss is None else build(dict(method.loss))
    parts = [train.sources == s for s in range(len(SOURCES))] if method.apart else [slice(None)]
    heads = []
    for part in parts:
        heads.append(build_head(trunk, method, seed))
        train_head(heads[-1], train[part], recipe, seed, loss)
    by_source = []
    for source in range(len(SOURCES)):
        of_source = test[test.sources == source]
        head = heads[source if method.apart else 0]
        by_source.append(accuracy(predict(head, of_source.features), of_source.labels))
    result = {
        'accuracy': by_source,
        'flops': count_flops(heads[0], test.features[:1]),
        'parameters': sum(p.numel() for head in heads for p in head.parameters()),
    }
    if method.experts:
        result['routing'] = look_at_routing(heads[0], train, test)
    return result


@torch.no_grad()
def look_at_routing(head: nn.Sequential, train: Data, test: Data) -> dict:
    """Who gets what at inference, and how far from that training was.

    Returns:
        ``counts`` (sources, E) of the test images' choices, their ``information`` on the source in
        nats, ``dead`` experts, and the ``disagreement`` of a pass in training mode.
    """
    unflatten, layer = head[:2]
    counts = torch.zeros(len(SOURCES), layer.num_experts, dtype=torch.float64)
    report = Utilization(layer.num_experts)
    for rows in torch.arange(len(test)).split(2000):
        layer.eval()(unflatten(test.features[rows]))
        routing = layer.routing
        report.update(routing)
        sources = test.sources[rows, None].expand_as(routing.expert_ids)
        counts.index_put_((sources, routing.expert_ids), (routing.weights > 0).double(), True)
    training = Utilization(layer.num_experts)
    constraint = layer.router.constraint
    state = copy.deepcopy(constraint.state_dict()) if constraint is not None else None
    for rows in torch.arange(0, len(train), 8).split(256):
        layer.train()(unflatten(train.features[rows]))
        training.update(layer.routing, layer.router)
    if state is not None:
        constraint.load_state_dict(state)
    layer.eval()
    return {
        'counts': counts.tolist(),
        'information': float(mutual_information(counts)),
        'dead': len(report.report().dead_experts(DEAD_SHARE)),
        'disagreement': training.report().disagreement(),
    }


def markdown_table(results: Mapping[Method, Mapping[int, dict]]) -> str:
    """Mean ± standard deviation over the seeds, in percent.

    Args:
        results: What the finished trainings have left, by method and seed.
    """
    columns = (
        'model', 'seeds', 'accuracy', 'against dense', *SOURCES, 'active kFLOPs', 'parameters',
        'information on the data set', 'dead experts', 'training against inference',
    )  # fmt: skip
    dense = {s: 100 * np.mean(run['accuracy']) for s, run in results.get(DENSE, {}).items()}

    def rows() -> Iterator[list[str]]:
        for method, by_seed in results.items():
            if not by_seed:
                continue
            found = list(by_seed.values())
            means = [100 * np.mean(run['accuracy']) for run in found]
            by_source = zip(*(run['accuracy'] for run in found), strict=True)
            cells = [method.name, str(len(found)), mean_and_std(means, 2)]
            paired = [m - dense[s] for s, m in zip(by_seed, means, strict=True) if s in dense]
            other = method is not DENSE and paired
            cells.append(f'{mean_std(paired)[0]:+.2f}' if other else NOTHING)
            cells += [f'{100 * mean_std(of_source)[0]:.1f}' for of_source in by_source]
            cells += [f'{found[0]["flops"] / 1e3:.0f}', f'{found[0]["parameters"] / 1e3:.0f} k']
            if 'routing' not in found[0]:
                yield [*cells, *[NOTHING] * 3]
                continue
            routing = [run['routing'] for run in found]
            dead = sum(of['dead'] for of in routing)
            yield [
                *cells,
                mean_and_std([of['information'] for of in routing], 2),
                f'{dead} of {method.experts * len(found)}',
                f'{mean_std([of["disagreement"] for of in routing])[0]:.2f}',
            ]

    return table(columns, rows())


def plot(results: Mapping[Method, Mapping[int, dict]], path: Path) -> None:
    """What each model gains over the dense one, of each seed and on average.

    Args:
        results: As for :func:`markdown_table`, those of the dense model among them.
        path: Of the picture.
    """
    dense = {s: np.mean(run['accuracy']) for s, run in results[DENSE].items()}
    gains = {
        method.name: [
            100 * (np.mean(run['accuracy']) - dense[s]) for s, run in by_seed.items() if s in dense
        ]
        for method, by_seed in results.items()
        if method is not DENSE
    }
    text = 'points above the dense model of equal cost (bars: mean, dots: seeds)'
    plot_gains(gains, text, path)


def plot_gains(gains: Mapping[str, Sequence[float]], text: str, path: Path) -> None:
    """Bars of means, and a dot for each seed.

    Args:
        gains: By model; those without any are left out.
        text: Below the axis.
        path: Of the picture.
    """
    shown = {name: values for name, values in gains.items() if values}
    with style():
        figure = new_figure(7.5, 0.28 * len(shown) + 1)
        axis = figure.subplots()
        for row, values in enumerate(shown.values()):
            axis.barh(row, np.mean(values), color='tab:green' if np.mean(values) > 0 else 'tab:red')
            axis.plot(values, [row] * len(values), 'k.', markersize=3)
        axis.set_yticks(range(len(shown)), list(shown), fontsize=7)
        axis.invert_yaxis()
        axis.axvline(0, color='black', linewidth=0.8)
        # A training that went wrong would leave no room for the others.
        low, high = min(map(min, shown.values())), max(map(max, shown.values()))
        axis.set_xlim(max(-6, low - 0.5), high + 0.5)
        axis.set_xlabel(text)
        figure.savefig(path, dpi=150, bbox_inches='tight')
