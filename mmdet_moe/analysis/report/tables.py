"""The tables of an expert analysis as CSV: UTF-8, a header, one row per fact.

A value that does not exist (``null`` in ``experts.json``) is an empty field. Numbers are written
so that they are read back unchanged. Text that a spreadsheet would take for a formula, such as the
name of a class that begins with ``=``, begins with an apostrophe.

=========================  ==========================================================
``layers.csv``             one row per layer of experts: its scalars
``experts.csv``            one per layer and expert: load, importance, share of the decisions in
                           which its weight is above 0, whether it is dead
``coactivation.csv``       one per layer and pair of experts, both orders and the diagonal; of a
                           layer with more than 64 experts those with the most weight
``polysemanticity.csv``    one per layer and expert that was zeroed: its polysemanticity, the class
                           hit most and its drop
``associations.csv``       one per layer, source, attribute and what is given (empty: nothing): the
                           mutual information
``controls.csv``           one per layer, source, attribute, given, control and draw of random
                           weights: the mutual information that the control has
``similarity.csv``         one per layer and pair of experts, both orders: how alike they are
``stability.csv``          one per run of --compare and layer: how many decisions have changed
``association_counts.csv`` one per layer, source, attribute, bin and expert
``interventions.csv``      one per intervention, metric and class; the unchanged model first
``counterfactual.csv``     one per layer, quantity (see ``experts.json``), and expert, size or class
                           that it is of (empty: all objects)
``confusion.csv``          one per layer, expert alone, true and predicted class
``flows.csv``              one per two successive layers and unit (image or decision): how much the
                           main experts have in common
``flow_counts.csv``        the same per main expert in both of them
=========================  ==========================================================

A table without rows is a header alone.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mmdet_moe.analysis.files import write_file

_LAYER_SCALARS = (
    'kind',
    'num_experts',
    'top_k',
    'granularity',
    'num_decisions',
    'load_cv2',
    'usage_entropy',
    'decision_entropy',
    'mi_input',
)
_INFORMATION = (
    *('mi', 'chance', 'mi_max', 'p_value', 'p_adjusted', 'permutations', 'num_units', 'num_images'),
    'left_out',
)
_LIKENESS = (('weights', 'cosine'), ('outputs', 'cosine'), ('outputs', 'cka'))
_STABILITY = (
    *('num_decisions', 'changed', 'changed_by_chance', 'changed_relabelled'),
    *('changed_relabelled_by_chance', 'overlap', 'weight_in_common'),
)
_INTERVAL = ('low', 'high')  # 95 %, of the information, or of the change of a metric
_FLOW = ('num_units', 'mi', 'chance', 'p_value')


def write_tables(experts: dict, folder: Path) -> list[Path]:
    """Write all tables; each replaces that of an earlier run.

    Args:
        experts: The content of ``experts.json``.
        folder: Where to; made if it does not exist.

    Returns:
        The files written.
    """
    layers = experts['layers']
    tables = {
        'layers': (
            ('layer', *_LAYER_SCALARS, 'dead_experts', 'collapsed', 'polysemanticity'),
            [_layer_row(name, layer) for name, layer in layers.items()],
        ),
        'experts': (
            ('layer', 'expert', 'load', 'importance', 'active_share', 'dead'),
            [
                (name, e, *columns, e in layer['dead_experts'])
                for name, layer in layers.items()
                for e, columns in enumerate(
                    zip(*map(layer.get, ('load', 'importance', 'active_share')), strict=True)
                )
            ],
        ),
        'coactivation': (
            ('layer', 'expert', 'other_expert', 'share'),
            [
                (name, a, b, share)
                for name, layer in layers.items()
                for a, row in zip(layer['coactivation_experts'], layer['coactivation'], strict=True)
                for b, share in zip(layer['coactivation_experts'], row, strict=True)
            ],
        ),
        'polysemanticity': (
            ('layer', 'expert', 'polysemanticity', 'class', 'drop'),
            [
                (name, *row)
                for name, layer in layers.items()
                if (found := layer['polysemanticity'])
                for row in zip(
                    *map(found.get, ('experts', 'values', 'classes', 'drops')), strict=True
                )
            ],
        ),
        'associations': (
            ('layer', 'source', 'attribute', 'given', *_INFORMATION, *_INTERVAL),
            [
                (
                    *(*where, given),
                    *(found.get(key) for key in _INFORMATION),
                    *(found.get('interval') or (None, None)),
                )
                for *where, association in _associations(layers)
                for given, found in {None: association, **(association.get('given') or {})}.items()
            ],
        ),
        'controls': (
            ('layer', 'source', 'attribute', 'given', 'control', 'draw', 'mi'),
            list(_control_rows(layers)),
        ),
        'similarity': (
            ('layer', 'expert', 'other_expert', *(f'{of}_{kind}' for of, kind in _LIKENESS)),
            [row for name, layer in layers.items() for row in _similarity_rows(name, layer)],
        ),
        'stability': (
            ('run', 'layer', *_STABILITY),
            [
                (other['run'], name, *map(shares.get, _STABILITY))
                for other in experts.get('stability') or ()
                for name, shares in other['layers'].items()
            ],
        ),
        'association_counts': (
            (
                *('layer', 'source', 'attribute', 'bin', 'lower_edge', 'upper_edge', 'unit'),
                *('expert', 'count', 'bin_given_expert', 'expert_given_bin'),
            ),
            list(_count_rows(layers)),
        ),
        'interventions': (
            ('layer', 'kind', 'expert', 'metric', 'class', 'value', 'change', *_INTERVAL),
            list(_intervention_rows(experts)),
        ),
        'counterfactual': (
            ('layer', 'quantity', 'of', 'value', 'num', *_INTERVAL),
            [row for name, layer in layers.items() for row in _counterfactual_rows(name, layer)],
        ),
        'confusion': (
            ('layer', 'expert', 'true', 'predicted', 'count'),
            [
                (name, expert, true, predicted, count)
                for name, layer in layers.items()
                if (found := (layer.get('counterfactual') or {}).get('confusion'))
                for expert, table in enumerate(found['counts'])
                for true, row in zip(found['true'], table, strict=True)
                for predicted, count in zip(found['predicted'], row, strict=True)
            ],
        ),
        'flows': (
            ('unit', 'from', 'to', *_FLOW),
            [(*where, *map(step.get, _FLOW)) for *where, step in _steps(experts)],
        ),
        'flow_counts': (
            ('unit', 'from', 'to', 'expert', 'next_expert', 'count'),
            [
                (*where, a, b, count)
                for *where, step in _steps(experts)
                for a, row in enumerate(step['counts'])
                for b, count in enumerate(row)
            ],
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_file(folder / f'{name}.csv', _csv(header, rows))
        for name, (header, rows) in tables.items()
    ]


def _layer_row(name: str, layer: dict) -> tuple:
    scalars = (layer.get(key) for key in _LAYER_SCALARS)
    dead = ' '.join(str(e) for e in layer['dead_experts'])
    mean = (layer['polysemanticity'] or {}).get('mean')
    return (name, *scalars, dead, layer['collapsed'], mean)


def _associations(layers: dict[str, dict]) -> Iterator[tuple[str, str, str, dict]]:
    for name, layer in layers.items():
        for source, attributes in layer['associations'].items():
            for attribute, association in attributes.items():
                yield name, source, attribute, association


def _control_rows(layers: dict[str, dict]) -> Iterator[tuple]:
    for *where, association in _associations(layers):
        for control, found in (association.get('controls') or {}).items():
            values = {None: found.get('draws') or [found['mi']]}
            for given, mi in found['given'].items():
                values[given] = (found.get('draws_given') or {}).get(given) or [mi]
            for given, draws in values.items():
                for draw, mi in enumerate(draws):
                    yield (*where, given, control, draw, mi)


def _similarity_rows(name: str, layer: dict) -> Iterator[tuple]:
    found = layer.get('similarity') or {}
    if not found.get('weights'):
        return
    for a in range(layer['num_experts']):
        for b in range(layer['num_experts']):
            matrices = ((found[of] or {}).get(kind) for of, kind in _LIKENESS)
            yield name, a, b, *(matrix and matrix[a][b] for matrix in matrices)


def _count_rows(layers: dict[str, dict]) -> Iterator[tuple]:
    for *where, association in _associations(layers):
        names = association['bins']
        edges = association['edges'] or [None] * (len(names) + 1)
        for b, name in enumerate(names):
            for e, count in enumerate(association['counts'][b]):
                yield (
                    *where,
                    *(name, edges[b], edges[b + 1], association.get('unit'), e, count),
                    association['bin_given_expert'][b][e],
                    association['expert_given_bin'][b][e],
                )


def _intervention_rows(experts: dict) -> Iterator[tuple]:
    """The unchanged model is the kind ``unchanged``; ``change`` is the difference to it."""
    before = dict(_metrics(experts['metrics'] or {}))
    unchanged = {'layer': 'all', 'kind': 'unchanged', 'expert': None, 'metrics': experts['metrics']}
    for entry in (unchanged, *experts['interventions']):
        for (metric, label), value in _metrics(entry['metrics'] or {}):
            reference = before.get((metric, label))
            change = None if value is None or reference is None else value - reference
            known = {} if label is not None else (entry.get('difference') or {}).get(metric) or {}
            ends = known.get('interval') or (None, None)
            whose = (entry['layer'], entry['kind'], entry['expert'])
            yield *whose, metric, label, value, change, *ends


def _counterfactual_rows(name: str, layer: dict) -> Iterator[tuple]:
    for quantity, entry in (layer.get('counterfactual') or {}).items():
        if isinstance(entry, list):
            of = dict(enumerate(entry))
        elif isinstance(entry, dict) and quantity != 'confusion':
            of = entry if quantity.startswith('regret_by_') else {None: entry}
        else:  # numbers of objects and the like
            continue
        for whose, mean in of.items():
            ends = mean['interval'] or (None, None)
            yield name, quantity, whose, mean['value'], mean['num'], *ends


def _steps(experts: dict) -> Iterator[tuple[str, str, str, dict]]:
    for flow in experts.get('flows') or ():
        for step in flow['steps']:
            yield flow['unit'], step['from'], step['to'], step


def _metrics(metrics: dict) -> Iterator[tuple[tuple[str, str | None], float | None]]:
    """Each value by (metric, class); a value over all classes has no class."""
    for metric, value in metrics.items():
        if isinstance(value, dict):
            for label, of_class in value.items():
                yield (metric, label), of_class
        else:
            yield (metric, None), value


def _csv(header: Sequence[str], rows: Iterable[Sequence]) -> bytes:
    text = io.StringIO(newline='')
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows([_no_formula(cell) for cell in row] for row in rows)
    return text.getvalue().encode()


def _no_formula(cell: object) -> object:
    starts_one = isinstance(cell, str) and cell.startswith(('=', '+', '-', '@', '\t', '\r'))
    return f"'{cell}" if starts_one else cell
