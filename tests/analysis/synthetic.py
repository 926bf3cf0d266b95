"""The content of an ``experts.json`` made up from random joint tables, for tests."""

import itertools

import numpy as np
from scipy import stats

from mmdet_moe.analysis.statistics.polysemanticity import polysemanticity

#: Half octaves, as the analysis has them.
SIZE_EDGES = [8 * 2 ** (i / 2) for i in range(-1, 14)]
POSITIONS = [f'{y} {x}' for y in ('top', 'middle', 'bottom') for x in ('left', 'centre', 'right')]


def entropy(p):
    p = np.asarray(p, dtype=float)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def information_of(table):
    """Of a joint table, in nats: how far it is from that of independent rows and columns."""
    table = np.asarray(table, dtype=float)
    independent = np.outer(table.sum(1), table.sum(0))
    return stats.entropy(table.ravel(), independent.ravel()) if table.any() else 0.0


def association(bins, counts, edges=None, **fields):
    """An association from its joint table; the statistics of the permutations are made up."""
    counts = np.asarray(counts, dtype=float)
    of_expert, of_bin = counts.sum(0), counts.sum(1)
    p = counts / max(counts.sum(), 1e-12)
    mi = entropy(p.sum(0)) + entropy(p.sum(1)) - entropy(p.ravel())
    information = {
        'mi': max(0.0, mi),
        'chance': 0.004,
        'p_value': 0.001,
        'p_adjusted': 0.002,
        'interval': [0.9 * max(0.0, mi), 1.1 * max(0.0, mi)],
        'permutations': 999,
        'num_units': 1000,
        'num_images': 200,
        'left_out': 0.0,
        'mi_max': min(entropy(p.sum(0)), entropy(p.sum(1))),
    }
    ends = [0.2 * mi, 0.4 * mi]
    given = {**information, 'mi': 0.3 * max(0.0, mi), 'interval': ends, 'left_out': 0.25}
    return {
        'bins': list(bins),
        'edges': edges,
        'unit': 'px' if edges else None,
        'counts': counts.tolist(),
        'bin_given_expert': np.divide(counts, of_expert, where=of_expert > 0, out=counts * 0)
        .astype(float)
        .tolist(),
        'expert_given_bin': np.divide(
            counts, of_bin[:, None], where=of_bin[:, None] > 0, out=counts * 0
        ).tolist(),
        'cell_p': np.full(counts.shape, 0.001).tolist(),
        **information,
        'given': {'level': given},
        **fields,
    }


def joint(rng, num_bins, num_experts, total, sharpness=2.0):
    """Things by bin and expert; each expert prefers some neighbouring bins."""
    centres = np.linspace(0, num_bins - 1, num_experts)
    distance = (np.arange(num_bins)[:, None] - centres) / max(num_bins / num_experts, 1)
    preference = np.exp(-0.5 * distance**2 * sharpness) + 0.05
    preference /= preference.sum(1, keepdims=True)
    number = rng.multinomial(total, rng.dirichlet(np.full(num_bins, 2.0)))
    return number[:, None] * preference


def sizes(rng, num_experts, total):
    """An association with the size; few objects at both ends, none in the last bin."""
    num_bins = len(SIZE_EDGES) - 1
    bell = np.exp(-0.5 * ((np.arange(num_bins) - 4.5) / 2.2) ** 2)
    counts = joint(rng, num_bins, num_experts, total)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
    number = np.floor(bell / bell.sum() * total)
    number[-1] = 0
    counts = shares * number[:, None]
    names = [f'{a:.0f}-{b:.0f}' for a, b in itertools.pairwise(SIZE_EDGES)]
    return association(names, counts, SIZE_EDGES)


def make_experts(
    num_experts=4,
    task='detection',
    num_levels=5,
    classes=10,
    layers=('bbox_head.cls_moe', 'bbox_head.reg_moe'),
    superclasses=False,
    history=True,
    interventions=True,
    kind='sparse',
    seed=0,
):
    """The dict of an ``experts.json``.

    Args:
        classes: Names of the classes, or how many.
        num_levels: Pyramid levels; None for a classifier.
    """
    rng = np.random.default_rng(seed)
    names = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
    detection = task == 'detection'
    groups = {
        f'group {g}': list(range(g, len(names), 3)) for g in range(min(3, len(names)))
    } or None
    base = _metrics(rng, names, detection)
    experts = {
        'schema': 'mmdet_moe.experts',
        'version': 4,
        'run': {
            'config': 'synthetic',
            'checkpoint': 'iter_400.pth',
            'task': task,
            'split': 'val',
            'num_images': 200,
            'num_objects': 1093,
            'num_detections': 950 if detection else None,
            'score_thr': 0.3 if detection else None,
            'classes': names,
            'superclasses': groups if superclasses else None,
            'num_levels': num_levels,
        },
        'metrics': base,
        'metrics_interval': {
            key: [value - 0.02, value + 0.02] for key, value in base.items() if key != 'per_class'
        },
        'layers': {
            name: _layer(rng, num_experts, detection, num_levels, names, groups, superclasses)
            for name in layers
        },
        'interventions': [
            _intervention(rng, base, layer, kind, expert)
            for layer in (*layers, 'all')
            for kind, expert in [
                *(('only', e) for e in range(num_experts)),
                *(('without', e) for e in range(num_experts)),
                *(('zeroed', e) for e in range(num_experts)),
                ('equal', None),
                ('random', None),
            ]
            if layer != 'all' or expert is None
        ]
        if interventions
        else [],
        'history': {name: _history(rng, num_experts) for name in layers} if history else None,
        'verdict': ['The experts of bbox_head.cls_moe divide the objects by size.'],
    }
    for name, layer in experts['layers'].items():
        layer['kind'] = kind
        layer['polysemanticity'] = polysemanticity(name, base, experts['interventions'])
    return experts


def _layer(rng, num_experts, detection, num_levels, names, groups, superclasses):
    load = rng.dirichlet(np.full(num_experts, 8.0))
    pair = rng.uniform(0, 0.3, (num_experts, num_experts))
    coactivation = (pair + pair.T) / 2
    np.fill_diagonal(coactivation, 2 * load)
    importance = rng.dirichlet(np.full(num_experts, 8.0))
    paired = sorted(np.argsort(-importance)[:64].tolist())
    associations = {'decisions': {}}
    if num_levels:
        levels = [str(level) for level in range(num_levels)]
        table = joint(rng, num_levels, num_experts, 1000)
        associations['decisions']['level'] = association(levels, table)
    for source, total in [('objects', 1093), ('detections', 950)][: 1 + detection]:
        found = {'class': association(names, joint(rng, len(names), num_experts, total, 0.5))}
        if superclasses:
            found['superclass'] = association(groups, joint(rng, len(groups), num_experts, total))
        if detection:
            found['size'] = sizes(rng, num_experts, total)
            found['size_coco'] = association(
                ['small', 'medium', 'large'], joint(rng, 3, num_experts, total)
            )
            found['position'] = association(POSITIONS, joint(rng, 9, num_experts, total, 0.1))
            found['level'] = association(levels, joint(rng, num_levels, num_experts, total))
        associations[source] = found
    return {
        'num_experts': num_experts,
        'top_k': min(2, num_experts),
        'granularity': 'image',
        'num_decisions': 1000,
        'load': load.tolist(),
        'importance': importance.tolist(),
        'load_interval': np.stack([0.9 * load, 1.1 * load], axis=1).tolist(),
        'importance_interval': np.stack([0.9 * importance, 1.1 * importance], axis=1).tolist(),
        'load_cv2': 0.1,
        'usage_entropy': entropy(load),
        'decision_entropy': 0.5,
        'mi_input': 0.4,
        'dead_experts': [1] if num_experts > 2 else [],
        'collapsed': False,
        'active_share': np.diag(coactivation).tolist(),
        'coactivation_experts': paired,
        'coactivation': coactivation[np.ix_(paired, paired)].tolist(),
        'associations': associations,
    }


def _metrics(rng, names, detection):
    keys = ('AP', 'AP50', 'AP small', 'AP medium', 'AP large') if detection else ('accuracy',)
    return {key: float(rng.uniform(0.4, 0.8)) for key in keys} | {
        'per_class': {name: float(rng.uniform(0.2, 0.9)) for name in names}
    }


def _intervention(rng, base, layer, kind, expert):
    metrics = {
        key: {name: v * float(rng.uniform(0.3, 1)) for name, v in value.items()}
        if isinstance(value, dict)
        else value * float(rng.uniform(0.2, 1.02))
        for key, value in base.items()
    }
    if kind == 'random' and 'AP large' in metrics:
        metrics['AP large'] = None
    difference = {
        key: {
            'value': value - base[key],
            'interval': [value - base[key] - 0.01, value - base[key] + 0.01],
        }
        for key, value in metrics.items()
        if key != 'per_class' and value is not None
    }
    return {
        'layer': layer,
        'kind': kind,
        'expert': expert,
        'metrics': metrics,
        'difference': difference,
    }


def _history(rng, num_experts, num_steps=40):
    def walk():
        drift = rng.normal(0, 0.25, (num_steps, num_experts)).cumsum(0)
        drift -= 0.9 * drift[-1] * np.linspace(0, 1, num_steps)[:, None]
        return (np.exp(drift) / np.exp(drift).sum(1, keepdims=True)).tolist()

    return {
        'step': [50 * (i + 1) for i in range(num_steps)],
        'load': walk(),
        'importance': walk(),
    }
