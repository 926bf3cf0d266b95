"""Figures of made-up runs: what is drawn is what the dict says, and can be read."""

import math
import struct
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle, StepPatch
from synthetic import SIZE_EDGES, association, make_experts

from mmdet_moe.analysis.report import figures as figures_module
from mmdet_moe.analysis.report.figures import (
    MAX_CLASSES,
    draw_figures,
    draw_polysemanticity,
    write_comparison,
    write_figures,
)
from mmdet_moe.analysis.report.pictures import pictures_of
from mmdet_moe.drawing import style

LAYER = 'bbox_head.cls_moe'
LONG = tuple(f'a rather long name of a class, number {i}' for i in range(80))
CASES = {
    'detection': {},
    'one level, two experts': {'num_experts': 2, 'num_levels': 1},
    'three experts, super-classes': {'num_experts': 3, 'superclasses': True, 'classes': 6},
    'eight experts, eight levels': {'num_experts': 8, 'num_levels': 8, 'classes': LONG[:20]},
    'sixteen experts, long names': {'num_experts': 16, 'classes': LONG, 'superclasses': True},
    'classification': {
        'num_experts': 10,
        'task': 'classification',
        'num_levels': None,
        'classes': 100,
        'layers': ('backbone.a_stage_with_a_long_name.and_a_longer_name_of_its_block.moe_layer',),
    },
    'a hundred factorised experts': {
        'num_experts': 100,
        'kind': 'factorised',
        'num_levels': 3,
        'classes': 30,
        'history': False,
    },
}


@cache
def draw(**options):
    """A run with one layer and all its figures by name, not laid out; shared by the tests."""
    experts = make_experts(**{'layers': (LAYER,), **options})
    # What objects and detections share need not be drawn twice.
    for layer in experts['layers'].values():
        layer['associations'].pop('detections', None)
    return experts, draw_all(experts)


def draw_all(experts):
    with style():
        return {(layer, name): figure for layer, name, figure in draw_figures(experts)}


def texts_of(figure):
    """Everything written in a figure that can be seen."""
    texts = [figure._suptitle, figure._supxlabel]
    for legend in figure.legends:
        texts += legend.get_texts()
    for axes in figure.axes:
        texts += [*axes.texts, axes.title]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts.append(axis.label)
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high:
                    texts += [tick.label1, tick.label2]
    return [t for t in texts if t is not None and t.get_visible() and t.get_text()]


@pytest.mark.sweep(keep=1 / 7)
@pytest.mark.parametrize('case', CASES)
def test_texts_neither_overlap_nor_leave_the_figure(case):
    _, figures = draw(**CASES[case])
    for (layer, name), figure in figures.items():
        with style():
            figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts_of(figure)]
        width, height = figure.bbox.size
        for text, box in boxes:
            inside = box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2
            assert inside, (layer, name, text, box)
        for (text_a, a), (text_b, b) in combinations(boxes, 2):
            x = min(a.x1, b.x1) - max(a.x0, b.x0)
            y = min(a.y1, b.y1) - max(a.y0, b.y0)
            # A pixel of the empty space around letters may be shared.
            assert min(x, y) < 1.5, (layer, name, text_a, text_b, x, y)


def test_sixty_four_experts():
    experts = make_experts(64, layers=(LAYER,), interventions=False, superclasses=True)
    objects = experts['layers'][LAYER]['associations'].pop('objects')
    del experts['layers'][LAYER]['associations']['detections']
    del objects['level'], objects['size_coco']
    experts['layers'][LAYER]['associations']['objects'] = objects
    figures = draw_all(experts)
    # Half of the time goes into their many panels.
    assert len(figures[LAYER, 'objects_size_given_expert'].axes) == 65
    assert len(figures[LAYER, 'objects_position'].axes) == 9 * 8 + 1
    with style():
        figures[LAYER, 'objects_expert_given_size'].canvas.draw()


def test_which_figures_there_are():
    _, figures = draw(superclasses=True)
    assert {name for layer, name in figures if layer == LAYER} == {
        *('usage', 'information', 'coactivation', 'history', 'interventions', 'decisions_level'),
        *('objects_size_given_expert', 'objects_expert_given_size', 'objects_size_coco'),
        *('objects_class', 'objects_superclass', 'objects_level', 'objects_position'),
        'polysemanticity',
    }
    assert [name for layer, name in figures if layer == 'all'] == ['interventions']

    options = dict(task='classification', num_levels=None, history=False, interventions=False)
    _, figures = draw(**options)
    names = [name for _, name in figures]
    assert names == ['usage', 'information', 'coactivation', 'objects_class']


def test_files(tmp_path):
    options = dict(task='classification', num_levels=None, num_experts=2, history=False)
    experts = make_experts(layers=('backbone.layer4',), **options)
    paths = write_figures(experts, tmp_path / 'figures')
    assert len(paths) == len(set(paths)) == 2 * (6 + 1)
    assert sorted(paths) == sorted(p for p in tmp_path.rglob('*') if p.is_file())
    assert {p.parent.name for p in paths} == {'backbone.layer4', 'all'}
    for path in paths:
        content = path.read_bytes()
        if path.suffix == '.pdf':
            assert content.startswith(b'%PDF')
            assert b'/FontFile2' in content  # TrueType, embedded
            assert b'/Type3' not in content
        else:
            assert content.startswith(b'\x89PNG')
            width, height = struct.unpack('>II', content[16:24])
            assert width >= 600
            assert height >= 250


def test_figures_of_an_earlier_run_are_removed(tmp_path, monkeypatch):
    experts = make_experts(layers=(LAYER,), superclasses=True)
    mine = [f'{LAYER}/{name}.png' for _, name in draw(superclasses=True)[1]]
    mine += [f'{LAYER}/{name}' for name in ('counterfactual.pdf', 'cam_000004.png')]
    mine += ['gone/routing_1234567.png', 'gone/objects_cluster.pdf', 'polysemanticity.png']
    others = ['usage.png', f'{LAYER}/notes.txt', f'{LAYER}/my_usage.png', f'{LAYER}/usage.svg']
    for name in (*mine, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(figures_module, 'draw_figures', lambda _: [])
    assert write_figures(experts, tmp_path) == []
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*.*')}
    assert left - {LAYER} == set(others)
    assert not pictures_of(experts, tmp_path)


def test_numbers_are_those_of_all_experts():
    """Of a hundred experts 64 are drawn; the other ones see most of the last bins."""
    experts = make_experts(100, layers=(LAYER,), history=False, interventions=False)
    layer = experts['layers'][LAYER]
    counts = np.zeros((9, 100))
    counts[:, layer['coactivation_experts'][:2]] = 3  # 6 of each bin, of which 10 are too few
    hidden = sorted(set(range(100)) - set(layer['coactivation_experts']))
    counts[3:, hidden[0]] = 90
    counts[8] = 0
    counts[8, hidden[1]] = 500
    names, edges = [f'c{i}' for i in range(9)], [2.0**i for i in range(2, 12)]
    layer['associations'] = {
        'objects': {
            'class': association(names, counts),
            'position': association(names, counts),
            'size': association(names, counts, edges),
        }
    }
    figures, number = draw_all(experts), counts.sum(1)
    (axes, *_) = figures[LAYER, 'objects_class'].axes
    order = [names.index(name) for name in labels_of(axes.yaxis)]
    assert order[-1] == 8  # which none of the 64 sees
    written = [text.get_text() for text in axes.texts if text.get_text() != 'n']
    assert written == [f'{number[b]:,.0f}' for b in order]
    *_, panel, _ = [a for a in figures[LAYER, 'objects_position'].axes if a.axison]
    assert mesh_of(panel) == pytest.approx(number.reshape(3, 3))
    upper, lower, *_ = figures[LAYER, 'objects_expert_given_size'].axes
    assert steps_of(lower)[0].values == pytest.approx(number)
    assert len([p for p in upper.patches if isinstance(p, Rectangle)]) == 3  # too few
    first, *_, below = figures[LAYER, 'objects_size_given_expert'].axes
    assert steps_of(first)[0].values == pytest.approx(number / number.sum())
    assert steps_of(below)[0].values == pytest.approx(number)


def test_equal_figures_are_equal_files(tmp_path):
    experts = make_experts(2, layers=('odd/name',), history=False, interventions=False)
    experts['layers']['odd/name']['associations'] = {}
    one, two = (write_figures(experts, tmp_path / name) for name in ('one', 'two'))
    assert [p.parent.name for p in one] == ['odd_name'] * 4
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def steps_of(axes):
    return [p.get_data() for p in axes.patches if isinstance(p, StepPatch)]


def find(experts, source, attribute):
    found = experts['layers'][LAYER]['associations'][source][attribute]
    return found, np.array(found['counts'])


@pytest.mark.parametrize('num_experts', [2, 4, 16])
def test_sizes_that_an_expert_sees(num_experts):
    experts, figures = draw(num_experts=num_experts)
    sizes, counts = find(experts, 'objects', 'size')
    *panels, below = figures[LAYER, 'objects_size_given_expert'].axes
    assert len(panels) == num_experts
    for e, axes in enumerate(panels):
        everything, seen = steps_of(axes)
        assert everything.values == pytest.approx(counts.sum(1) / counts.sum())
        assert seen.values == pytest.approx(np.array(sizes['bin_given_expert'])[:, e])
        assert seen.edges == pytest.approx(SIZE_EDGES)
        assert axes.get_title() == f'expert {e} (n = {counts[:, e].sum():,.0f})'
        check_size_axis(axes)
    (number,) = steps_of(below)
    assert number.values == pytest.approx(counts.sum(1))
    check_size_axis(below)
    assert {t.get_text() for t in below.texts} == {'small', 'medium', 'large'}
    assert 'px' in below.get_xlabel()


def check_size_axis(axes):
    assert axes.get_xscale() == 'log'
    marked = {line.get_xdata()[0] for line in axes.lines}
    assert marked == {32, 96}
    assert {32, 96} <= set(axes.get_xticks())
    assert axes.get_xlim() == pytest.approx((SIZE_EDGES[0], SIZE_EDGES[-1]))


def test_who_sees_which_size():
    experts, figures = draw()
    sizes, counts = find(experts, 'objects', 'size')
    figure = figures[LAYER, 'objects_expert_given_size']
    upper, lower = figure.axes
    layers = steps_of(upper)
    for e, data in enumerate(layers):
        heights = data.values - data.baseline
        assert heights == pytest.approx(np.array(sizes['expert_given_bin'])[:, e])
        assert data.edges == pytest.approx(SIZE_EDGES)
    assert steps_of(lower)[0].values == pytest.approx(counts.sum(1))
    faded = sorted(p.get_x() for p in upper.patches if isinstance(p, Rectangle))
    few = [SIZE_EDGES[b] for b, n in enumerate(counts.sum(1)) if 0 < n < 10]
    assert few
    assert faded == pytest.approx(few)
    check_size_axis(lower)
    words = [t.get_text() for t in figure.legends[0].get_texts()]
    assert words[:4] == ['expert 3', 'expert 2', 'expert 1', 'expert 0']


def test_who_sees_which_size_of_many_experts():
    experts, figures = draw(num_experts=16)
    sizes, _ = find(experts, 'objects', 'size')
    upper, *_ = figures[LAYER, 'objects_expert_given_size'].axes
    assert mesh_of(upper) == pytest.approx(np.array(sizes['expert_given_bin']).T)


def test_sizes_without_limits_in_range_and_open_bins():
    experts = make_experts(layers=(LAYER,), interventions=False, history=False)
    experts['layers'][LAYER]['associations'] = {'objects': (objects := {})}
    rng = np.random.default_rng(0)
    for edges in ([0, 40, 50, 60], [40.0, 50.0, 60.0, None], [2000.0, 3000.0, 4000.0, 5000.0]):
        objects['size'] = association('abc', rng.uniform(1, 50, (3, 4)), edges)
        figures = draw_all(experts)
        for axes in figures[LAYER, 'objects_size_given_expert'].axes:
            assert np.isfinite(axes.get_xlim()).all()
            assert axes.get_xticks().size


def mesh_of(axes):
    (mesh,) = [c for c in axes.collections if isinstance(c, QuadMesh)]
    return np.asarray(mesh.get_array())


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_classes_are_sorted_by_their_main_expert():
    experts, figures = draw(classes=tuple(f'class {i}' for i in range(12)))
    classes, counts = find(experts, 'objects', 'class')
    (axes,) = figures[LAYER, 'objects_class'].axes
    order = [classes['bins'].index(name) for name in labels_of(axes.yaxis)]
    assert sorted(order) == list(range(12))
    shares = np.array(classes['expert_given_bin'])
    assert mesh_of(axes) == pytest.approx(shares[order])
    keys = [(shares[b].argmax(), -shares[b].max()) for b in order]
    assert keys == sorted(keys)
    written = [t.get_text() for t in axes.texts]
    assert written[-12:] == [f'{counts[b].sum():,.0f}' for b in order]
    assert f'{shares[order[0], 0]:.2f}' == written[0]
    title = figures[LAYER, 'objects_class'].get_suptitle()
    assert f'mutual information {classes["mi"]:.3f} nats' in title
    assert 'p = 0.002' in title


def test_many_classes():
    experts, figures = draw(classes=80)
    classes, _ = find(experts, 'objects', 'class')
    left, right, *_ = figures[LAYER, 'objects_class'].axes
    order = [int(name) for axes in (left, right) for name in labels_of(axes.yaxis)]
    assert sorted(order) == list(range(80))
    drawn = np.concatenate([mesh_of(left), mesh_of(right)])
    assert drawn == pytest.approx(np.array(classes['expert_given_bin'])[order])


def test_more_classes_than_can_be_shown():
    experts = make_experts(layers=(LAYER,), interventions=False, history=False)
    counts = np.ones((MAX_CLASSES + 50, 4))
    counts[:50] = 0.5
    names = [f'c{i}' for i in range(len(counts))]
    experts['layers'][LAYER]['associations'] = {'objects': {'class': association(names, counts)}}
    figure = draw_all(experts)[LAYER, 'objects_class']
    shown = {name for axes in figure.axes[:-1] for name in labels_of(axes.yaxis)}
    assert shown == set(names[50:])
    assert f'{MAX_CLASSES} of {MAX_CLASSES + 50} classes' in figure.get_suptitle().replace(
        '\n', ' '
    )


def test_names_that_look_like_formulas():
    _, figures = draw(classes=('a_$b', 'c$ & d_e', '^{', '100 %'))
    assert {'a_$b', '^{'} <= set(labels_of(figures[LAYER, 'objects_class'].axes[0].yaxis))


def test_levels():
    experts, figures = draw()
    levels, _ = find(experts, 'decisions', 'level')
    (axes,) = figures[LAYER, 'decisions_level'].axes
    assert mesh_of(axes) == pytest.approx(np.array(levels['expert_given_bin']))
    assert labels_of(axes.yaxis) == ['0\nfine', '1', '2', '3', '4\ncoarse']
    low, high = axes.get_ylim()
    assert low > high  # the finest level on top


def test_position():
    experts, figures = draw()
    position, counts = find(experts, 'objects', 'position')
    *panels, number, _ = figures[LAYER, 'objects_position'].axes
    for e, axes in enumerate(panels[:4]):
        cells = np.array(position['expert_given_bin'])[:, e].reshape(3, 3)
        assert mesh_of(axes) == pytest.approx(cells)
        assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the top of the image on top
    assert mesh_of(number) == pytest.approx(counts.sum(1).reshape(3, 3))


def test_usage_and_coactivation():
    experts, figures = draw()
    layer = experts['layers'][LAYER]
    (axes,) = figures[LAYER, 'usage'].axes
    for bars, key in zip(axes.containers, ('load', 'importance'), strict=True):
        assert [bar.get_height() for bar in bars] == pytest.approx(layer[key])
    fair, *crosses = axes.lines
    assert fair.get_ydata()[0] == 0.25
    assert [line.get_xdata()[0] for line in crosses] == layer['dead_experts'] == [1]
    axes, _ = figures[LAYER, 'coactivation'].axes
    assert mesh_of(axes) == pytest.approx(np.array(layer['coactivation']))


def test_information():
    experts, figures = draw()
    layer = experts['layers'][LAYER]['associations']
    alone = [a for attributes in layer.values() for a in attributes.values()]
    given = [a['given']['level'] for a in alone]
    rows = [a for pair in zip(alone, given, strict=True) for a in pair]
    (axes,) = figures[LAYER, 'information'].axes
    drawn = ('mi_max', rows), ('mi', alone), ('mi', given)
    for bars, (key, found) in zip(axes.containers, drawn, strict=True):
        assert [bar.get_width() for bar in bars] == pytest.approx([a[key] for a in found])
    (chance,) = axes.lines
    assert chance.get_xdata() == pytest.approx([a['chance'] for a in rows])
    (intervals,) = axes.collections
    ends = np.array(intervals.get_segments())[:, :, 0]
    assert ends == pytest.approx(np.array([a['interval'] for a in rows]))
    assert labels_of(axes.yaxis)[:2] == ['level of the decisions', '    given the level']
    assert axes.texts[0].get_text() == f'{alone[0]["mi"]:.3f} nats, p = 0.002'


def small(**options):
    """A run of one layer whose objects' classes alone were compared."""
    experts = make_experts(layers=(LAYER,), history=False, interventions=False, **options)
    layer = experts['layers'][LAYER]
    table = layer['associations']['objects']['class']
    layer['associations'] = {'objects': {'class': table}}
    return experts, table


def test_what_was_not_tested_is_not_zero():
    """Each of its values is on too few images."""
    experts, table = small()
    table['given']['level']['left_out'] = 1.0
    (axes,) = draw_all(experts)[LAYER, 'information'].axes
    assert [text.get_text() for text in axes.texts[1:2]] == ['not tested']
    assert 'nats, p = ' in axes.texts[0].get_text()


def test_controls_are_marks_beside_the_bars():
    experts, table = small()
    table['controls'] = {'random': {'mi': 0.05, 'given': {'level': 0.02}}, 'level': {'mi': 0.1}}
    (axes,) = draw_all(experts)[LAYER, 'information'].axes
    _, random, level = axes.lines
    assert random.get_xdata().tolist() == [0.05, 0.02]
    assert level.get_xdata() == pytest.approx([0.1, math.nan], nan_ok=True)
    assert random.get_label() == 'routers with random weights'


def test_cells_of_chance_are_faded_and_the_scale_is_the_same():
    experts, table = small()
    table['cell_p'][2][1] = 0.06
    figure = draw_all(experts)[LAYER, 'objects_class']
    (axes,) = figure.axes
    (mesh,) = (m for m in axes.collections if isinstance(m, QuadMesh))
    assert mesh.get_clim() == (0, 1)
    ((row, expert),) = np.argwhere(mesh.get_alpha().reshape(-1, 4) < 1)
    assert (table['bins'].index(labels_of(axes.yaxis)[row]), expert) == (2, 1)
    assert 'faded: cells with p > 0.05' in figure.get_suptitle()


@pytest.mark.parametrize('num_experts', [4, 16])
def test_history(num_experts):
    experts, figures = draw(num_experts=num_experts)
    history = experts['history'][LAYER]
    panels = figures[LAYER, 'history'].axes
    for axes, key in zip(panels, ('load', 'importance'), strict=False):
        if num_experts == 4:
            *lines, fair = axes.lines
            for e, line in enumerate(lines):
                assert line.get_xdata() == pytest.approx(history['step'])
                assert line.get_ydata() == pytest.approx([row[e] for row in history[key]])
            assert fair.get_ydata()[0] == 0.25
        else:
            assert mesh_of(axes) == pytest.approx(np.array(history[key]).T)


def test_interventions():
    experts, figures = draw()
    before = experts['metrics']
    figure = figures[LAYER, 'interventions']
    entries = [e for e in experts['interventions'] if e['layer'] == LAYER]
    titles = [axes.get_title().split('\n')[0] for axes in figure.axes]
    assert titles == ['AP', 'AP small', 'AP medium', 'AP large']
    for metric, axes in zip(titles, figure.axes, strict=True):
        for entry, bar, text in zip(entries, axes.patches, axes.texts, strict=True):
            value = entry['metrics'][metric]
            if value is None:
                assert math.isnan(bar.get_width())
                assert text.get_text() == 'n/a'
            else:
                change = 100 * (value - before[metric])
                assert bar.get_width() == pytest.approx(change)
                assert float(text.get_text().replace('−', '-')) == pytest.approx(change, abs=0.051)
    names = labels_of(figure.axes[0].yaxis)
    assert names[0] == 'expert 0 alone'
    assert names[4] == 'without expert 0'
    assert names[-2:] == ['all experts alike', 'experts at random']


def test_interventions_without_metrics():
    experts = make_experts(layers=(LAYER,), history=False)
    experts['metrics'] = dict.fromkeys(experts['metrics'])
    assert not [name for _, name in draw_all(experts) if name == 'interventions']


def test_experts_differ_in_greyscale():
    _, figures = draw(num_experts=8)
    upper = figures[LAYER, 'objects_expert_given_size'].axes[0]
    areas = [p for p in upper.patches if isinstance(p, StepPatch)]
    lines = figures[LAYER, 'history'].axes[0].lines[:8]
    for colours in ([a.get_facecolor()[:3] for a in areas], [to_rgb(x.get_color()) for x in lines]):
        grey = np.array(colours) @ [0.299, 0.587, 0.114]
        assert (np.diff(grey) > 0.02).all()
        assert grey[-1] - grey[0] > 0.4
    assert len({a.get_hatch() for a in areas}) == 8
    assert len({(x.get_linestyle(), x.get_marker()) for x in lines}) == 8


def test_nothing_counted_nothing_drawn():
    experts = make_experts(layers=(LAYER,), history=False, interventions=False)
    experts['layers'][LAYER]['associations'] = {
        'detections': {'size_coco': association(['small', 'medium'], np.zeros((2, 4)), mi=None)}
    }
    names = [name for _, name in draw_all(experts)]
    assert names == ['usage', 'coactivation']


def test_many_experts_are_those_with_the_most_weight():
    """Numbers at the axes are those of the experts shown, and the titles say how many they are."""
    experts, figures = draw(**CASES['a hundred factorised experts'])
    shown = experts['layers'][LAYER]['coactivation_experts']
    assert len(shown) == 64
    for name in ('usage', 'coactivation', 'objects_class', 'objects_expert_given_size'):
        figure = figures[LAYER, name]
        assert '64 of 100 experts' in figure.get_suptitle().replace('\n', ' ')
        axes = figure.axes[0]
        ticks = axes.get_yticks() if 'given_size' in name else axes.get_xticks()
        labels = axes.get_yticklabels() if 'given_size' in name else axes.get_xticklabels()
        found = {int(t): label.get_text() for t, label in zip(ticks, labels, strict=True)}
        known = {place: text for place, text in found.items() if text}
        assert len(known) > 4
        assert all(text == str(shown[place]) for place, text in known.items())
    titles = figures[LAYER, 'usage'].get_suptitle() + figures[LAYER, 'coactivation'].get_suptitle()
    assert 'coefficients' in titles
    assert 'chosen' not in titles
    assert '16 that cost most' in figures[LAYER, 'interventions'].get_suptitle()


def test_drops_are_those_of_the_interventions():
    experts, figures = draw()
    before = experts['metrics']['per_class']
    left, right, *_ = figures[LAYER, 'polysemanticity'].axes
    (mesh,) = (c for c in left.collections if isinstance(c, QuadMesh))
    rows = [int(label.get_text()) for label in left.get_yticklabels()]
    columns = [label.get_text() for label in left.get_xticklabels()]
    after = {
        entry['expert']: entry['metrics']['per_class']
        for entry in experts['interventions']
        if (entry['layer'], entry['kind']) == (LAYER, 'zeroed')
    }
    expected = [[100 * max(0, before[c] - after[e][c]) for c in columns] for e in rows]
    np.testing.assert_allclose(np.reshape(mesh.get_array(), (len(rows), -1)), expected)
    assert sorted(rows) == list(after)
    assert sum(patch.get_height() for patch in right.patches) == len(rows)


def test_polysemanticity_of_several_runs(tmp_path):
    """One point for each layer, sparse and factorised apart; nothing where nobody was zeroed."""
    runs = [make_experts(layers=('a', 'b'), num_experts=4, history=False)]
    runs += [
        make_experts(layers=('head',), num_experts=e, kind='factorised', seed=e) for e in (8, 16)
    ]
    nothing = make_experts(layers=('a',), interventions=False)
    assert write_comparison([nothing], tmp_path) == []
    with style():
        (axes,) = draw_polysemanticity([*runs, nothing]).axes
    points = {line.get_label(): line for line in axes.lines if line.get_marker() != 'None'}
    assert set(points) == {'sparse MoE', 'μMoE'}
    layers = runs[0]['layers'].values()
    assert points['sparse MoE'].get_xdata().tolist() == [4, 4]
    assert sorted(points['sparse MoE'].get_ydata()) == sorted(
        layer['polysemanticity']['mean'] for layer in layers
    )
    assert points['μMoE'].get_xdata().tolist() == [8, 16]
    assert [path.name for path in write_comparison(runs, tmp_path)] == [
        'polysemanticity.png',
        'polysemanticity.pdf',
    ]
