"""What a report knows about one run, as JSON."""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmdet_moe.analysis.data import drawn
from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.records.contents import select
from mmdet_moe.analysis.report.explorer.packing import (
    in_steps,
    pack,
    quantise,
    quantise_weights,
    unpack,
)
from mmdet_moe.analysis.report.explorer.pool import fill_pool
from mmdet_moe.analysis.report.names import layer_names
from mmdet_moe.analysis.report.shown import SIGNIFICANT_CELL, shown_interventions, shown_layer
from mmdet_moe.analysis.statistics.outcomes import Outcomes
from mmdet_moe.errors import ConfigError

SCHEMA, VERSION = 'mmdet_moe.explorer', 2
_FIELDS = (
    'run', 'metrics', 'layers', 'interventions', 'verdict', 'rows', 'columns', 'files', 'pool',
)  # fmt: skip
COLUMNS = (
    'image', 'is_detection', 'box', 'label', 'true_label', 'score', 'kind', 'partner', 'iou',
    'loss', 'size', 'level',
)  # fmt: skip
#: Share of the budget that the columns may take; crops without their statistics help nobody, and
#: neither do statistics without a crop.
_COLUMN_SHARE = 0.6
#: Steps of the training that the history is thinned to.
_HISTORY_STEPS = 120


def build_payload(
    experts: dict,
    outcomes: Outcomes,
    load_image: Callable[[int], np.ndarray],
    budget: int = 9_000_000,
    path_of: Callable[[int], str | None] = lambda index: None,
    folder: Path = Path(),
    pictures: Sequence[dict] = (),
) -> dict:
    """Gather everything that a report shows of one run.

    Of a layer with very many experts only those with the most weight are told of
    (:mod:`~mmdet_moe.analysis.report.shown`). All outcomes are kept as columns. Where there are so
    many that they alone would use up the budget, the outcomes of images drawn at random are kept.
    Crops and whole images are JPEG, of a choice of images (see
    :mod:`~mmdet_moe.analysis.report.explorer.pool`).

    Args:
        experts: The content of ``experts.json``, JSON-able.
        outcomes: n rows; their weights by the layers of ``experts``. Layers without weights are
            shown without crops.
        load_image: The image of an index, RGB uint8 ``(H, W, 3)``, in its original size.
        budget: Bytes that the payload may take as JSON. Statistics are kept even beyond it.
        path_of: The file, or address, of the image of an index; None where it has none.
        folder: Where the report will be: links to the images start there.
        pictures: From :func:`~mmdet_moe.analysis.report.pictures.pictures_of`, beside the budget.

    Returns:
        JSON-able. Images that cannot be read any more are left out and named in
        ``payload['pool']['unreadable']``, with the reasons.
    """
    layers = {name: shown_layer(layer) for name, layer in experts['layers'].items()}
    metrics = _overall(experts.get('metrics'))
    interventions = experts.get('interventions') or []
    titles = layer_names(experts['layers'])
    payload = {
        'schema': SCHEMA,
        'version': VERSION,
        'run': experts['run'],
        'metrics': metrics,
        'metrics_interval': experts.get('metrics_interval') or {},
        'layers': {
            name: {
                'title': titles[name][:1].upper() + titles[name][1:],
                **_layer(layer, (experts.get('history') or {}).get(name)),
            }
            for name, layer in layers.items()
        },
        'interventions': [
            {**entry, 'metrics': _overall(entry['metrics'])}
            for name in dict.fromkeys(entry['layer'] for entry in interventions)
            for entry in shown_interventions(
                [entry for entry in interventions if entry['layer'] == name],
                next(iter(metrics), ''),
            )
        ],
        'verdict': experts.get('verdict') or [],
        'flows': experts.get('flows') or [],
    }
    room = budget - len(_dumps(payload))
    total = len(outcomes)
    outcomes = _known_layers(outcomes, layers)
    columns = _columns(outcomes)
    if len(_dumps(columns)) > _COLUMN_SHARE * room:
        outcomes, columns = _thinned(outcomes, columns, _COLUMN_SHARE * room)
    payload['rows'] = {'kept': len(outcomes), 'all': total}
    payload['columns'] = columns
    payload['files'] = _files({int(i): path_of(int(i)) for i in np.unique(outcomes.image)}, folder)
    weights = {
        name: in_steps(quantise_weights(values)) for name, values in outcomes.weights.items()
    }
    # 256 bytes for the punctuation and the names of what is added below.
    room = budget - len(_dumps(payload)) - 256
    pool = fill_pool(outcomes, weights, load_image, room)
    payload['pool'] = {
        'rows': pack(np.array(list(pool.crops), np.int32)),
        'regions': pack(pool.regions()),
        'crops': list(pool.crops.values()),
        'images': {
            str(index): [image.width, image.height, image.jpeg]
            for index, image in pool.images.items()
        },
        'unreadable': list(pool.unreadable.values()),
    }
    return {**payload, 'pictures': list(pictures)}


def _files(paths: dict[int, str | None], folder: Path) -> dict:
    """``{'folder', 'names': {index: name}}``; folder + name leads from the report to the file."""
    known = {index: path for index, path in paths.items() if path}
    if not known:
        return {'folder': '', 'names': {}}
    if any('://' in path for path in known.values()):
        return {'folder': '', 'names': {str(index): path for index, path in known.items()}}
    absolute = {index: os.path.abspath(path) for index, path in known.items()}
    common = os.path.commonpath([os.path.dirname(path) for path in absolute.values()])
    names = {str(i): Path(path).relative_to(common).as_posix() for i, path in absolute.items()}
    return {'folder': _relative(common, folder), 'names': names}


def _relative(path: str | Path, folder: Path) -> str:
    """The way from a folder to another one, with a slash behind it."""
    try:
        way = os.path.relpath(path, folder)
    except ValueError:  # on another drive
        way = os.path.abspath(path)
    return f'{Path(way).as_posix()}/'


def _overall(metrics: dict | None) -> dict:
    # Those of single classes are not shown; thousands of interventions have as many each.
    return {name: value for name, value in (metrics or {}).items() if name != 'per_class'}


def _layer(layer: dict, history: dict | None) -> dict:
    """A layer's entry of ``experts.json``, with its tables packed."""
    # The counterfactual is a picture.
    left_out = ('associations', 'counterfactual')
    entry = {key: value for key, value in layer.items() if key not in left_out}
    entry['coactivation'] = pack(np.asarray(layer['coactivation'], np.float32))
    entry['associations'] = {
        source: {name: _association(table) for name, table in attributes.items()}
        for source, attributes in (layer.get('associations') or {}).items()
    }
    if history and history.get('step'):
        steps = np.asarray(history['step'])
        kept = np.unique(np.linspace(0, len(steps) - 1, _HISTORY_STEPS).round().astype(int))
        load = np.asarray(history['load'], np.float32)[kept]
        load = load[:, layer['experts']] if 'experts' in layer else load
        entry['history'] = {'step': steps[kept].tolist(), 'load': pack(load)}
    return entry


def _association(table: dict) -> dict:
    # Both conditional tables follow from the counts; the intervals of their cells are in the file.
    shares = ('bin_given_expert', 'expert_given_bin')
    left_out = ('counts', 'cell_p', *shares, *(f'{name}_interval' for name in shares))
    entry = {key: value for key, value in table.items() if key not in left_out}
    if table.get('counts') is not None:
        entry['counts'] = pack(np.asarray(table['counts'], np.float32))
    if table.get('cell_p') is not None:
        entry['marked'] = pack((np.asarray(table['cell_p']) <= SIGNIFICANT_CELL).astype(np.uint8))
    return entry


def _known_layers(outcomes: Outcomes, layers: dict[str, dict]) -> Outcomes:
    """Only the weights of these layers, and only where there are any."""
    weights = {}
    for name, layer in layers.items():
        values = outcomes.weights.get(name)
        if values is None or np.isnan(values).all():
            continue
        if values.shape != (len(outcomes), layer['num_experts']):
            raise ValueError(
                f'the outcomes have weights of shape {values.shape} for {name}, '
                f'expected {(len(outcomes), layer["num_experts"])}'
            )
        weights[name] = values[:, layer['experts']] if 'experts' in layer else values
    return replace(outcomes, weights=weights)


def _columns(outcomes: Outcomes) -> dict:
    limit = np.iinfo(np.uint16).max
    return {
        'image': pack(outcomes.image.astype(np.int32)),
        'is_detection': pack(outcomes.is_detection.astype(np.uint8)),
        'box': pack(np.rint(np.clip(np.nan_to_num(outcomes.box), 0, limit)).astype(np.uint16)),
        'label': pack(outcomes.label.astype(np.int32)),
        'true_label': pack(outcomes.true_label.astype(np.int32)),
        'score': pack(quantise(outcomes.score)),
        'kind': pack(outcomes.kind.astype(np.uint8)),
        'partner': pack(outcomes.partner.astype(np.int32)),
        'iou': pack(quantise(outcomes.iou)),
        'loss': pack(np.round(outcomes.loss, 3).astype(np.float32)),
        'size': pack(outcomes.size.astype(np.float32)),
        'level': pack(outcomes.level.astype(np.int32)),
        'weights': {
            name: pack(quantise_weights(values)) for name, values in outcomes.weights.items()
        },
    }


def _thinned(outcomes: Outcomes, columns: dict, limit: float) -> tuple[Outcomes, dict]:
    images = np.unique(outcomes.image)
    count, thinned = len(images), outcomes
    while len(_dumps(columns)) > limit and count:
        # Aims a little below, for deflation does worse on less; then in small steps.
        count = min(int(count * 0.97 * max(limit, 0) / len(_dumps(columns))), count - 1)
        kept = images[drawn(len(images), count)]
        rows = np.isin(outcomes.image, kept)
        thinned = select(outcomes, rows)
        columns = _columns(thinned)
    return thinned, columns


def _dumps(payload: dict) -> str:
    return json.dumps(payload, separators=(',', ':'), allow_nan=False)


def write_payload(payload: dict, path: Path) -> None:
    """Write a payload in one step: a reader never meets half a file."""
    write_file(Path(path), _dumps(payload).encode())


def read_payload(path: Path, folder: Path | None = None) -> dict:
    """Read what :func:`write_payload` wrote.

    Args:
        path: The file.
        folder: Where the report will be, if not beside the file: links to images start there.

    Returns:
        The payload, with the ``folder`` of the file.

    Raises:
        ConfigError: If there is no such file, it is damaged or of another version.
    """
    path = Path(path)
    again = 'run tools/analyze_experts.py again'
    try:
        payload = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise ConfigError(
            f'{path} does not exist; name a folder that tools/analyze_experts.py wrote'
        ) from None
    except OSError as error:
        raise ConfigError(f'{path} cannot be read: {error.strerror}') from None
    except ValueError:
        raise ConfigError(f'{path} is damaged (no complete JSON); {again}') from None
    if not isinstance(payload, dict) or payload.get('schema') != SCHEMA:
        raise ConfigError(f'{path} is no payload of the Expert Explorer; {again}')
    if payload.get('version') != VERSION:
        raise ConfigError(
            f'{path} has version {payload.get("version")!r}, this mmdet_moe reads '
            f'version {VERSION}; {again}'
        )
    missing = [name for name in _FIELDS if name not in payload]
    if missing:
        raise ConfigError(f'{path} is damaged (no {", ".join(missing)}); {again}')
    try:
        _check_arrays(payload)
    except (KeyError, TypeError, ValueError, zlib.error):
        raise ConfigError(
            f'{path} is damaged (some of its columns are not whole); {again}'
        ) from None
    files = payload['files']
    if folder is not None and files['names'] and files['folder']:
        files['folder'] = _relative(path.absolute().parent / files['folder'], folder)
    return {**payload, 'folder': str(path.absolute().parent)}


def _check_arrays(payload: dict) -> None:
    """Raise if a column is missing, cannot be unpacked, or has another number of rows."""
    columns, pool, count = payload['columns'], payload['pool'], payload['rows']['kept']
    for name in COLUMNS:
        if len(unpack(columns[name])) != count:
            raise ValueError(name)
    for name, packed in columns['weights'].items():
        if name not in payload['layers'] or len(unpack(packed)) != count:
            raise ValueError(name)
    if not len(unpack(pool['rows'])) == len(unpack(pool['regions'])) == len(pool['crops']):
        raise ValueError('pool')
    for layer in payload['layers'].values():
        unpack(layer['coactivation'])
    payload['run']['task'], payload['files']['folder'], payload['files']['names'].items()
