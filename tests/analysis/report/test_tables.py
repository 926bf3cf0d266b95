"""The tables, read back with the csv module."""

import csv
import json

import numpy as np
import pytest
from synthetic import make_experts

from mmdet_moe.analysis.report.tables import write_tables
from mmdet_moe.analysis.statistics.counterfactual import Alone, summary


def read(folder):
    tables = {}
    for path in folder.iterdir():
        with path.open(encoding='utf-8', newline='') as file:
            tables[path.stem] = list(csv.DictReader(file))
    return tables


def same(text, value):
    """Whether a field holds a value: exactly, not about."""
    if value is None or isinstance(value, str):
        return text == (value or '')
    return type(value)(float(text)) == value


@pytest.fixture
def experts():
    names = ['person', 'a, "quoted"\nname', 'Zebra – größer', '']
    return make_experts(classes=names, superclasses=True, num_levels=3)


@pytest.fixture
def tables(experts, tmp_path):
    paths = write_tables(experts, tmp_path / 'a' / 'tables')
    assert sorted(path.name for path in paths) == [
        'association_counts.csv',
        'associations.csv',
        'coactivation.csv',
        'confusion.csv',
        'controls.csv',
        'counterfactual.csv',
        'experts.csv',
        'flow_counts.csv',
        'flows.csv',
        'interventions.csv',
        'layers.csv',
        'polysemanticity.csv',
        'similarity.csv',
        'stability.csv',
    ]
    assert sorted(paths) == sorted((tmp_path / 'a' / 'tables').iterdir())  # nothing temporary
    return read(tmp_path / 'a' / 'tables')


def test_layers_and_experts(experts, tables):
    assert [row['layer'] for row in tables['layers']] == list(experts['layers'])
    for row in tables['layers']:
        layer = experts['layers'][row['layer']]
        for key in ('num_experts', 'top_k', 'granularity', 'num_decisions', 'load_cv2'):
            assert same(row[key], layer[key])
        for key in ('usage_entropy', 'decision_entropy', 'mi_input'):
            assert same(row[key], layer[key])
        assert row['dead_experts'] == '1'
        assert row['collapsed'] == 'False'
    assert len(tables['experts']) == 2 * 4
    for row in tables['experts']:
        layer, e = experts['layers'][row['layer']], int(row['expert'])
        assert same(row['load'], layer['load'][e])
        assert same(row['importance'], layer['importance'][e])
        assert same(row['active_share'], layer['active_share'][e])
        assert row['dead'] == str(e == 1)
    assert len(tables['coactivation']) == 2 * 4 * 4
    for row in tables['coactivation']:
        matrix = experts['layers'][row['layer']]['coactivation']
        assert same(row['share'], matrix[int(row['expert'])][int(row['other_expert'])])


def test_associations(experts, tables):
    known = {
        (layer, source, attribute): association
        for layer, content in experts['layers'].items()
        for source, attributes in content['associations'].items()
        for attribute, association in attributes.items()
    }
    keys = ('layer', 'source', 'attribute')
    rows = {(*map(row.get, keys), row['given']): row for row in tables['associations']}
    assert rows.keys() == {(*where, given) for where in known for given in ('', 'level')}
    for (*where, given), row in rows.items():
        found = known[tuple(where)]
        found = found['given'][given] if given else found
        for key in (
            *('mi', 'chance', 'p_value', 'p_adjusted', 'permutations', 'num_units', 'mi_max'),
            *('num_images', 'left_out'),
        ):
            assert same(row[key], found[key])
        assert [float(row['low']), float(row['high'])] == found['interval']

    rows = tables['association_counts']
    assert len(rows) == sum(4 * len(a.get('bins', ())) for a in known.values())
    place = {}
    for row in rows:
        where = row['layer'], row['source'], row['attribute']
        # The expert changes fastest, then the bin: so bins of equal names are told apart, too.
        b, e = divmod(place.setdefault(where, 0), 4)
        place[where] += 1
        association = known[where]
        assert row['expert'] == str(e)
        assert row['bin'] == association['bins'][b]
        assert same(row['count'], association['counts'][b][e])
        assert same(row['bin_given_expert'], association['bin_given_expert'][b][e])
        assert same(row['expert_given_bin'], association['expert_given_bin'][b][e])
        edges = association['edges']
        assert same(row['lower_edge'], edges and edges[b])
        assert same(row['upper_edge'], edges and edges[b + 1])
        assert row['unit'] == ('px' if row['attribute'] == 'size' else '')


def test_interventions(experts, tables):
    rows = iter(tables['interventions'])
    before = {'layer': 'all', 'kind': 'unchanged', 'expert': None, 'metrics': experts['metrics']}
    for entry in [before, *experts['interventions']]:
        flat = {(key, ''): v for key, v in entry['metrics'].items() if key != 'per_class'}
        flat |= {('per_class', name): v for name, v in entry['metrics']['per_class'].items()}
        for (metric, name), value in flat.items():
            row = next(rows)
            assert (row['metric'], row['class']) == (metric, name)
            assert row['layer'] == entry['layer']
            assert row['kind'] == entry['kind']
            assert same(row['expert'], entry['expert'])
            assert same(row['value'], value)
            reference = experts['metrics'][metric]
            reference = reference[name] if isinstance(reference, dict) else reference
            known = entry.get('difference', {}).get(metric)
            low, high = known['interval'] if known else (None, None)
            assert same(row['low'], low)
            assert same(row['high'], high)
            if value is None:
                assert row['change'] == ''
            else:
                assert float(row['change']) == pytest.approx(value - reference)
    assert next(rows, None) is None


def test_a_later_run_replaces_everything(tmp_path):
    write_tables(make_experts(), tmp_path)
    options = dict(task='classification', num_levels=None, num_experts=2, interventions=False)
    experts = make_experts(layers=('backbone.layer4',), **options)
    experts['metrics'] = {'accuracy': None, 'per_class': {}}
    # As the dict comes from a file.
    write_tables(json.loads(json.dumps(experts)), tmp_path)
    tables = read(tmp_path)
    assert {row['layer'] for row in tables['association_counts']} == {'backbone.layer4'}
    assert [row['metric'] for row in tables['interventions']] == ['accuracy']
    assert tables['interventions'][0]['value'] == ''


def test_names_that_look_like_formulas_are_text(tmp_path):
    names = ['=1+1', '@SUM(A1)', '-2', '+x', 'a=b']
    experts = make_experts(interventions=False)
    experts['metrics'] = {'per_class': dict.fromkeys(names, -0.5)}
    write_tables(experts, tmp_path)
    rows = read(tmp_path)['interventions']
    assert [row['class'] for row in rows] == ["'=1+1", "'@SUM(A1)", "'-2", "'+x", 'a=b']
    assert {row['value'] for row in rows} == {'-0.5'}


def test_polysemanticity(tables, experts):
    rows = iter(tables['polysemanticity'])
    for name, layer in experts['layers'].items():
        found = layer['polysemanticity']
        for e, value, of_class, drop in zip(
            *(found[key] for key in ('experts', 'values', 'classes', 'drops')), strict=True
        ):
            row = next(rows)
            assert (row['layer'], row['expert'], row['class']) == (name, str(e), of_class)
            assert same(row['polysemanticity'], value)
            assert same(row['drop'], drop)
    assert next(rows, None) is None
    means = [row['polysemanticity'] for row in tables['layers']]
    assert [float(mean) for mean in means] == [
        layer['polysemanticity']['mean'] for layer in experts['layers'].values()
    ]


def test_pairs_of_many_experts(tmp_path):
    experts = make_experts(num_experts=70, layers=('a',), history=False, interventions=False)
    write_tables(experts, tmp_path)
    layer, rows = experts['layers']['a'], read(tmp_path)['coactivation']
    assert len(rows) == 64 * 64
    places = {str(e): i for i, e in enumerate(layer['coactivation_experts'])}
    for row in rows:
        a, b = places[row['expert']], places[row['other_expert']]
        assert same(row['share'], layer['coactivation'][a][b])


def test_controls_similarity_and_stability(tmp_path):
    """Every draw, each given alike; pairs of experts; runs that could not be compared have none."""
    experts = make_experts(num_experts=2, layers=('a', 'b'), history=False, interventions=False)
    for layer in experts['layers'].values():
        for attributes in layer['associations'].values():
            for association in attributes.values():
                association['controls'] = {}
    layer = experts['layers']['a']
    layer['associations']['objects']['size']['controls'] = {
        'random': {
            'mi': 0.2, 'draws': [0.1, 0.3], 'given': {'level': 0.02},
            'draws_given': {'level': [0.01, 0.03]},
        },
        'level': {'mi': 0.4, 'given': {'level': 0.0}},
    }  # fmt: skip
    alike = {'cosine': [[1.0, 0.5], [0.5, 1.0]], 'cka': [[1.0, None], [None, 1.0]]}
    layer['similarity'] = {'weights': {'cosine': alike['cosine']}, 'outputs': alike}
    experts['layers']['b']['similarity'] = {'reason': 'there is one expert alone'}
    shares = {'num_decisions': 9, 'changed': 0.25, 'changed_by_chance': 0.5, 'overlap': 0.75}
    shares |= {'changed_relabelled': 0.125, 'weight_in_common': 0.625}
    shares['changed_relabelled_by_chance'] = 0.4
    experts['stability'] = [
        {'run': 'soft', 'reason': None, 'layers': {'a': shares}},
        {'run': 'hard', 'reason': 'it is of another split', 'layers': {}},
    ]
    write_tables(experts, tmp_path)
    tables = read(tmp_path)
    assert [tuple(row.values()) for row in tables['controls']] == [
        ('a', 'objects', 'size', given, control, draw, mi)
        for given, control, draw, mi in (
            ('', 'random', '0', '0.1'), ('', 'random', '1', '0.3'),
            ('level', 'random', '0', '0.01'), ('level', 'random', '1', '0.03'),
            ('', 'level', '0', '0.4'), ('level', 'level', '0', '0.0'),
        )
    ]  # fmt: skip
    assert [tuple(row.values()) for row in tables['similarity']] == [
        ('a', '0', '0', '1.0', '1.0', '1.0'), ('a', '0', '1', '0.5', '0.5', ''),
        ('a', '1', '0', '0.5', '0.5', ''), ('a', '1', '1', '1.0', '1.0', '1.0'),
    ]  # fmt: skip
    (row,) = tables['stability']
    assert (row.pop('run'), row.pop('layer')) == ('soft', 'a')
    assert all(same(value, shares[key]) for key, value in row.items())
    assert set(row) == set(shares)


def test_counterfactuals_and_flows(tmp_path):
    """Read back as they are: a class called 'value', a regret of nobody, a step without a test."""
    experts = make_experts(num_experts=2, layers=('a', 'b'), history=False, interventions=False)
    alone = Alone(
        np.repeat([0, 1, 2, 3, 4, 5], 2), np.tile([0, 1], 6), np.full(12, 20.0),
        np.zeros(12, int), np.ones(12), np.random.default_rng(0).random((12, 2)),
    )  # fmt: skip
    confusion = np.arange(18).reshape(2, 3, 3)
    found = summary(alone, confusion, ['value', 'other'], 0.3)
    experts['layers']['a']['counterfactual'] = found
    step = {'from': 'a', 'to': 'b', 'num_units': 9, 'counts': [[1, 2], [0, 6]], 'mi': 0.5}
    step |= {'chance': None, 'p_value': None}
    experts['flows'] = [{'unit': 'image', 'layers': ['a', 'b'], 'steps': [step]}]
    write_tables(experts, tmp_path)
    tables = read(tmp_path)
    rows = {(row['quantity'], row['of']): row for row in tables['counterfactual']}
    assert len(rows) == len(tables['counterfactual']) == 10 + 2 + 2 + 3 + 2
    known = [
        (('oracle', ''), found['oracle']), (('alone', '1'), found['alone'][1]),
        (('regret_by_expert', '1'), found['regret_by_expert'][1]),
        (('regret_by_size', 'small'), found['regret_by_size']['small']),
        (('regret_by_class', 'value'), found['regret_by_class']['value']),
    ]  # fmt: skip
    for where, mean in known:
        row = rows[where]
        assert same(row['value'], mean['value'])
        assert same(row['num'], mean['num'])
        low, high = mean['interval'] or (None, None)
        assert same(row['low'], low)
        assert same(row['high'], high)
    assert rows['regret_by_expert', '1']['value'] == ''
    counts = [int(row['count']) for row in tables['confusion']]
    assert counts == confusion.ravel().tolist()
    assert list(tables['confusion'][5].values()) == ['a', '0', 'other', 'missed', '5']
    assert [list(row.values()) for row in tables['flows']] == [
        ['image', 'a', 'b', '9', '0.5', '', '']
    ]
    assert [list(row.values()) for row in tables['flow_counts']] == [
        ['image', 'a', 'b', '0', '0', '1'], ['image', 'a', 'b', '0', '1', '2'],
        ['image', 'a', 'b', '1', '0', '0'], ['image', 'a', 'b', '1', '1', '6'],
    ]  # fmt: skip
