"""Made-up runs with the structure of real ones: experts that prefer levels, ties, misses."""

from dataclasses import dataclass, field
from itertools import pairwise

import cv2
import numpy as np

from mmdet_moe.analysis.records.contents import select
from mmdet_moe.analysis.statistics.matching import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    CORRECT,
    DUPLICATE,
    LOCALISATION,
    MISSED,
)
from mmdet_moe.analysis.statistics.outcomes import Outcomes

WIDTH, HEIGHT, LEVELS = 320, 240, 5


@dataclass
class FakeRun:
    """What an analysis hands to the explorer."""

    experts: dict
    outcomes: Outcomes
    width: int = WIDTH
    height: int = HEIGHT
    noise: float = 6.0
    loaded: list[int] = field(default_factory=list)

    def load_image(self, index: int) -> np.ndarray:
        """A textured background with a coloured shape for each row's object."""
        self.loaded.append(index)
        rng = np.random.default_rng(index)
        coarse = rng.uniform(40, 190, (4, 5, 3)).astype(np.float32)
        image = cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_CUBIC)
        outcomes = self.outcomes
        for row in np.flatnonzero(outcomes.image == index):
            if np.isnan(outcomes.size[row]):
                box = np.array([0.2, 0.2, 0.8, 0.8]) * np.tile([self.width, self.height], 2)
            else:
                box = outcomes.box[row]
            x1, y1, x2, y2 = (int(v) for v in box)
            label = max(outcomes.true_label[row], outcomes.label[row])
            colour = tuple(float(v) for v in np.random.default_rng(label).uniform(30, 255, 3))
            if label % 2:
                cv2.rectangle(image, (x1, y1), (x2, y2), colour, -1)
            else:
                centre, axes = ((x1 + x2) // 2, (y1 + y2) // 2), ((x2 - x1) // 2, (y2 - y1) // 2)
                cv2.ellipse(image, centre, axes, 0, 0, 360, colour, -1)
        image += rng.normal(0, self.noise, image.shape)
        return np.clip(image, 0, 255).astype(np.uint8)


def routed(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Softmax over the ``top_k`` largest logits, (T, E)."""
    kept = logits >= np.sort(logits, axis=1)[:, -top_k][:, None]
    weights = np.where(kept, np.exp(logits - logits.max(axis=1, keepdims=True)), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def association(bins, counts, **extra) -> dict:
    counts = np.asarray(counts, float)
    joint = counts / max(counts.sum(), 1e-9)
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    mi = float((joint[seen] * np.log(joint[seen] / outer[seen])).sum())
    columns, rows = counts.sum(0, keepdims=True), counts.sum(1, keepdims=True)
    return {
        'bins': bins,
        'edges': None,
        'unit': None,
        'counts': counts.tolist(),
        'bin_given_expert': (counts / np.maximum(columns, 1e-9)).tolist(),
        'expert_given_bin': (counts / np.maximum(rows, 1e-9)).tolist(),
        'mi': mi,
        'chance': 0.004,
        'p_value': 0.001 if mi > 0.02 else 0.31,
        'p_adjusted': 0.001 if mi > 0.02 else 0.62,
        'interval': [0.9 * mi, 1.1 * mi],
        'given': {
            'level': {'mi': 0.012, 'interval': [-0.01, 0.03], 'p_adjusted': 0.4, 'mi_max': 1.6}
        },
        'permutations': 999,
        'num_units': int(counts.sum()),
        'mi_max': float(np.log(min(counts.shape))),
        **extra,
    }


def associations_of(weights, outcomes, rows, classes, superclasses, detection) -> dict:
    """What is counted of some rows."""
    weights, outcomes = np.nan_to_num(weights).astype(float)[rows], select(outcomes, rows)
    label = outcomes.counted_label

    def table(keys, bins, extra=None):
        counts = [weights[keys == b].sum(0) for b in range(len(bins))]
        return association(bins, counts, **(extra or {}))

    attributes = {'class': table(label, classes)}
    if superclasses:
        group = np.full(len(classes), -1)
        for i, labels in enumerate(superclasses.values()):
            group[labels] = i
        attributes['superclass'] = table(group[label], list(superclasses))
    if detection:
        edges = [2.0 ** (i / 2) for i in range(6, 17)]
        attributes['level'] = table(outcomes.level, [f'P{i + 3}' for i in range(LEVELS)])
        names = [f'{a:.0f}–{b:.0f}' for a, b in pairwise(edges)]
        keys = np.clip(np.digitize(outcomes.size, edges) - 1, 0, len(names) - 1)
        attributes['size'] = table(keys, names, {'edges': edges, 'unit': 'px'})
        cells = [f'{v} {h}' for v in ('top', 'middle', 'bottom') for h in ('left', 'mid', 'right')]
        middle = (outcomes.box[:, :2] + outcomes.box[:, 2:]) / 2
        column = np.clip(middle[:, 0] / middle[:, 0].max() * 3, 0, 2.9).astype(int)
        line = np.clip(middle[:, 1] / middle[:, 1].max() * 3, 0, 2.9).astype(int)
        attributes['position'] = table(line * 3 + column, cells)
    image = {
        k: v
        for k, v in attributes['class'].items()
        if k in ('mi', 'chance', 'p_value', 'p_adjusted')
    }
    image |= {'permutations': 999, 'num_units': 1000, 'mi_max': 1.2}
    return {**attributes, 'image': image}


def layer_entry(weights, outcomes, classes, superclasses, granularity, detection) -> dict:
    """The statistics of a layer, in the form of ``experts.json``."""
    tables = {
        source: associations_of(weights, outcomes, rows, classes, superclasses, detection)
        for source, rows in (
            ('objects', ~outcomes.is_detection), ('detections', outcomes.is_detection)
        )
        if detection or source == 'objects'
    }  # fmt: skip
    tables['decisions'] = tables['objects']
    weights = np.nan_to_num(weights).astype(float)
    experts = weights.shape[1]
    chosen = weights > 0
    load, importance = chosen.sum(0) / max(chosen.sum(), 1), weights.sum(0) / weights.sum()

    paired = sorted(np.argsort(-importance, kind='stable')[:64].tolist())
    return {
        'num_experts': experts,
        'top_k': int(chosen.sum(1).max()),
        'granularity': granularity,
        'num_decisions': len(weights),
        'load': load.tolist(),
        'importance': importance.tolist(),
        'load_cv2': float(load.var() / load.mean() ** 2),
        'usage_entropy': 1.2,
        'decision_entropy': 0.5,
        'mi_input': 0.7,
        'dead_experts': np.flatnonzero(load == 0).tolist(),
        'collapsed': False,
        'coactivation_experts': paired,
        'coactivation': (chosen.T.astype(float) @ chosen / len(chosen))[paired][:, paired].tolist(),
        'associations': tables,
    }


def experts_entry(name, outcomes, classes, superclasses, layers, detection, seed) -> dict:
    rng = np.random.default_rng(seed)
    names = ('AP', 'AP50', 'AP small', 'AP medium', 'AP large') if detection else ('accuracy',)

    def metrics(drop):
        per_class = {c: float(v) for c, v in zip(classes, rng.uniform(0.3, 0.8, len(classes)))}  # noqa: B905
        return {n: float(0.61 - drop + 0.05 * i) for i, n in enumerate(names)} | {
            'per_class': per_class
        }

    interventions = []
    for layer, entry in layers.items():
        for kind in ('only', 'without'):
            for expert in range(entry['num_experts']):
                drop = float(rng.uniform(0.02, 0.4))
                interventions.append(
                    {'layer': layer, 'kind': kind, 'expert': expert, 'metrics': metrics(drop)}
                )
        interventions.append(
            {'layer': layer, 'kind': 'equal', 'expert': None, 'metrics': metrics(0.011)}
        )
    interventions.append(
        {'layer': 'all', 'kind': 'random', 'expert': None, 'metrics': metrics(0.2)}
    )
    first, entry = next(iter(layers.items()))
    steps = list(range(0, 400, 10))
    load = [routed(rng.normal(0, 0.2, (1, entry['num_experts'])), entry['num_experts'])[0].tolist()
            for _ in steps]  # fmt: skip
    return {
        'schema': 'mmdet_moe.experts',
        'version': 1,
        'run': {
            'config': name,
            'checkpoint': 'iter_400.pth',
            'task': 'detection' if detection else 'classification',
            'split': 'val',
            'num_images': int(outcomes.image.max() + 1) if len(outcomes) else 0,
            'num_objects': int((~outcomes.is_detection).sum()),
            'num_detections': int(outcomes.is_detection.sum()),
            'score_thr': 0.3,
            'classes': classes,
            'superclasses': superclasses,
            'num_levels': LEVELS if detection else None,
        },
        'metrics': metrics(0),
        'layers': layers,
        'interventions': interventions,
        'history': {first: {'step': steps, 'load': load, 'importance': load}},
        'metrics_interval': {name: [0.5, 0.7] for name in names},
        'verdict': [
            {
                'layer': first,
                'name': 'classification head',
                'lines': ['not collapsed.', 'strongly specialised by pyramid level.', 'needed.'],
                'details': ['Expert 0 handles most small objects.'],
            },
            {'layer': None, 'name': 'All layers', 'lines': [], 'details': ['The routing matters.']},
        ],
    }


def detection_run(
    name='retinanet_moe_soft',
    num_images=40,
    classes=('cat', 'dog', 'car', 'cup'),
    layers=(('bbox_head.cls_moe', 4), ('bbox_head.reg_moe', 4)),
    superclasses=None,
    backbone=False,
    objects_per_image=6.5,
    sharpness=2.0,
    top_k=2,
    size=(WIDTH, HEIGHT),
    seed=0,
) -> FakeRun:
    """Decisions are per image and level, so that many rows of an image have the same weights."""
    rng = np.random.default_rng(seed)
    width, height = size
    classes = list(classes)
    n = rng.poisson(objects_per_image, num_images)
    image = np.repeat(np.arange(num_images), n).astype(np.int32)
    total = len(image)
    label = rng.integers(0, len(classes), total).astype(np.int32)
    sides = 2 ** rng.uniform(3, np.log2(height * 0.9), (total, 1))
    sides = sides * 2 ** rng.uniform(-0.4, 0.4, (total, 2))
    sides = np.minimum(sides, [width - 2, height - 2])
    corner = rng.uniform(0, 1, (total, 2)) * ([width, height] - sides)
    box = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    outcomes = with_detections(rng, image, label, box, len(classes))
    image, level = outcomes.image, outcomes.level
    total = len(image)
    entries = {}
    if backbone:
        per_image = routed(rng.normal(0, 1, (num_images, 4)), top_k)
        entries['backbone.layer4'] = layer_entry(
            per_image[image], outcomes, classes, superclasses, 'image', True
        )
        entries['backbone.layer4']['num_decisions'] = num_images
    for layer, experts in layers:
        prefers = rng.normal(0, sharpness, (LEVELS, experts))
        by_image = rng.normal(0, 0.4, (num_images, LEVELS, experts))
        decisions = routed((prefers + by_image).reshape(-1, experts), min(top_k, experts))
        weights = decisions.reshape(num_images, LEVELS, experts)[image, level].astype(np.float32)
        weights[rng.random(total) < 0.01] = np.nan
        outcomes.weights[layer] = weights
        entries[layer] = layer_entry(weights, outcomes, classes, superclasses, 'image', True)
        entries[layer]['num_decisions'] = num_images * LEVELS
    entry = experts_entry(name, outcomes, classes, superclasses, entries, True, seed)
    return FakeRun(entry, outcomes, width, height)


def with_detections(rng, image, label, box, num_classes) -> Outcomes:
    """Objects with what a detector may make of them; what is wrong with it is drawn."""
    total = len(image)
    kind = rng.choice(
        [CORRECT, CLASSIFICATION, LOCALISATION, MISSED], total, p=[0.62, 0.1, 0.1, 0.18]
    )
    found = np.flatnonzero(kind != MISSED)
    # Beside the objects' own detections some that find nothing.
    more = rng.choice(total, total // 6, replace=False)
    extra = rng.choice([BOTH, DUPLICATE, BACKGROUND], len(more))
    other = np.concatenate([found, more])
    what = np.concatenate([kind[found], extra])
    taken = np.isin(what, [CLASSIFICATION, BOTH])
    predicted = np.where(taken, (label[other] + 1) % num_classes, label[other])
    shift = rng.uniform(-0.06, 0.06, (len(other), 4)) * np.tile(box[other, 2:] - box[other, :2], 2)
    iou = np.where(
        what == CORRECT, rng.uniform(0.5, 1, len(other)), rng.uniform(0.1, 0.5, len(other))
    )
    score = rng.uniform(0.3, 1, len(other))
    rows = np.concatenate([image, image[other]])
    order = np.argsort(rows, kind='stable')
    place = np.argsort(order)
    partner = place.copy()
    partner[found] = place[total + np.arange(len(found))]
    meant = np.flatnonzero(what != BACKGROUND)
    partner[total + meant] = place[other[meant]]

    def column(of_objects, of_detections, dtype):
        return np.concatenate([of_objects, of_detections]).astype(dtype)[order]

    def of_partner(values, default):
        result = np.full(total, default, float)
        result[found] = values[: len(found)]
        return result

    boxes = column(box, box[other] + shift, np.float32).clip(0)
    area = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    mine, theirs = of_partner(score, np.nan), of_partner(iou, np.nan)
    background = what == BACKGROUND
    return Outcomes(
        image=rows[order].astype(np.int32),
        is_detection=column(np.zeros(total), np.ones(len(other)), bool),
        box=boxes,
        label=column(of_partner(predicted, -1), predicted, np.int32),
        true_label=column(label, np.where(background, -1, label[other]), np.int32),
        score=column(mine, score, np.float32),
        kind=column(kind, what, np.uint8),
        partner=(partner - place)[order].astype(np.int32),
        iou=column(theirs, np.where(background, np.nan, iou), np.float32),
        loss=column(
            np.where(kind == CORRECT, 1 - mine * theirs, 1),
            np.where(what == CORRECT, 1 - score * iou, score), np.float32,
        ),
        size=area,
        level=np.clip(np.log2(np.maximum(area, 1) / 16), 0, LEVELS - 1).astype(np.int32),
        weights={},
    )  # fmt: skip


def classification_run(num_images=120, num_classes=100, experts=10, top_k=2, seed=0) -> FakeRun:
    rng = np.random.default_rng(seed)
    classes = [f'class {i}' for i in range(num_classes)]
    label = rng.integers(0, num_classes, num_images).astype(np.int32)
    correct = rng.random(num_images) < 0.8
    outcomes = Outcomes(
        image=np.arange(num_images, dtype=np.int32),
        is_detection=np.zeros(num_images, bool),
        box=np.zeros((num_images, 4), np.float32),
        label=label,
        true_label=np.where(correct, label, (label + 1) % num_classes).astype(np.int32),
        score=rng.uniform(0.2, 1, num_images).astype(np.float32),
        kind=np.where(correct, CORRECT, CLASSIFICATION).astype(np.uint8),
        partner=np.zeros(num_images, np.int32),
        iou=np.full(num_images, np.nan, np.float32),
        loss=rng.exponential(1, num_images).astype(np.float32),
        size=np.full(num_images, np.nan, np.float32),
        level=np.full(num_images, -1, np.int32),
        weights={},
    )
    prefers = rng.normal(0, 2, (num_classes, experts))
    weights = routed(prefers[label], top_k).astype(np.float32)
    outcomes.weights['backbone.layer3'] = weights
    entry = layer_entry(weights, outcomes, classes, None, 'image', False)
    layers = {'backbone.layer3': entry}
    experts_json = experts_entry('resnet_moe', outcomes, classes, None, layers, False, seed)
    return FakeRun(experts_json, outcomes, 64, 64)
