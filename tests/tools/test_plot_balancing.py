"""What the tool draws of logs that were written by hand."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from mmdet_moe.analysis.balancing import parse, plot_balancing
from mmdet_moe.analysis.measuring import run_tool
from mmdet_moe.analysis.report.balancing import (
    LayerHistory,
    animation,
    draw_steps,
    draw_training,
    early_steps,
)
from mmdet_moe.analysis.report.history import read_history
from mmdet_moe.drawing import style

LAYER = 'bbox_head.cls_moe'
STEPS = [10, 20, 30, 40]
# Expert 2 dies at iteration 30. Expert 1 got nothing at 20, as it was masked, and lives.
LOAD = [[0.4, 0.3, 0.3], [0.5, 0.0, 0.5], [0.5, 0.498, 0.002], [0.5, 0.5, 0.0]]
INFERENCE = [[0.5, 0.4, 0.1], [0.5, 0.4, 0.1], [0.5, 0.5, 0.0], [0.8, 0.2, 0.0]]
MASKED = [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]
ALL = {'load': LOAD, 'importance': LOAD, 'inference_load': INFERENCE, 'masked': MASKED}
OLD = {'load': LOAD, 'importance': LOAD}


def write(work_dir, kinds=ALL, layer=LAYER):
    """The work directory of a training."""
    logs = work_dir / '20260101_000000' / 'vis_data'
    logs.mkdir(parents=True)
    with (logs / 'scalars.json').open('w') as file:
        for i, step in enumerate(STEPS):
            entry = {
                f'train/moe/{layer}/{kind}_{e}': share
                for kind, rows in kinds.items()
                for e, share in enumerate(rows[i])
            }
            file.write(json.dumps({**entry, 'step': step}) + '\n')
    return work_dir


@pytest.fixture
def history(tmp_path):
    return LayerHistory.from_history(read_history(write(tmp_path / 'run'))[LAYER])


@pytest.fixture
def old(tmp_path):
    return LayerHistory.from_history(read_history(write(tmp_path / 'old', OLD))[LAYER])


def test_who_is_dead_since_when(history, old):
    assert history.dead_since() == [None, None, 30]
    assert old.dead_since() == [None, None, 30]  # less than 1 % of a third of the load
    assert history.dead()[:, 1].tolist() == [False] * 4
    assert old.dead()[:, 1].tolist() == [False, True, False, False]  # all that it can know


def test_disagreement(history, old):
    # Half of the differences that the tables above have.
    assert history.disagreement() == pytest.approx([0.2, 0.4, 0.002, 0.3])
    assert history.verdict() == '1 of 3 dead, 30 % elsewhere at inference'
    assert old.disagreement() is None
    assert old.verdict() == '1 of 3 dead'


def test_early_iterations_are_shown_more_closely(history):
    steps = np.arange(5, 405, 5)
    long = LayerHistory(steps, np.ones((80, 2)) / 2, np.ones((80, 2)) / 2)
    assert early_steps({'a': history, 'b': long}) == [5, 15, 45, 135, 400]
    assert early_steps({'a': history}) == [10, 20, 30, 40]  # 14.1 and 28.3 are nearest to these


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def test_bars(history):
    short = LayerHistory(np.array([10]), history.load[:1], history.importance[:1])
    other = LayerHistory(np.array([8, 19, 40]), *[np.full((3, 3), 1 / 3)] * 2)
    with style():
        runs = {'run': history, 'short': short, 'other': other}
        figure = draw_steps('head', runs, [10, 20, 42])
    axes = np.array(figure.axes).reshape(3, 3)
    # 42 is nearest to 40, which has been logged.
    assert [panel.get_title() for panel in axes[0]] == [f'iteration {s}' for s in (10, 20, 40)]
    assert [texts(panel) for panel in axes[2]] == [['at 8'], ['at 19'], []]
    assert [texts(panel) for panel in axes[0]] == [[], [], []]
    # Loads are multiples of a third, which three bars are.
    for panel, row in zip(axes[0], (0, 1, 3), strict=True):
        heights = [bar.get_height() for bar in panel.containers[0]]
        assert heights == pytest.approx([3 * x for x in LOAD[row]])
        inference = [float(segment[0, 1]) for segment in panel.collections[0].get_segments()]
        assert inference == pytest.approx([3 * x for x in INFERENCE[row]])
    top = axes[0, 1].get_ylim()[1]
    masks = [bar.get_height() for bar in axes[0, 1].containers[1]]
    assert masks == pytest.approx([0, -top, 0])  # from above
    crosses = [panel.lines[0].get_xdata().tolist() for panel in axes[0]]
    assert crosses == [[], [], [2]]
    assert [texts(panel) for panel in axes[1]] == [[], ['no more'], ['no more']]
    assert axes[0, 0].get_ylabel().splitlines()[:2] == ['run', '1 of 3 dead']


def test_lanes(history, old):
    with style():
        figure = draw_training('head', {'run': history, 'old': old})
    lanes = np.array(figure.axes).reshape(4, 2)
    assert [texts(lane) for lane in lanes[:3, 0]] == [[], [], ['dead since 30']]
    assert [texts(lane) for lane in lanes[3]] == [['at most 40 %'], ['not logged']]
    load, masked, inference, importance = lanes[1, 0].patches
    for drawn, values in ((load, LOAD), (inference, INFERENCE), (importance, LOAD)):
        data = drawn.get_data()
        assert data.edges.tolist() == [0, *STEPS]  # the mean over the ten iterations before
        assert data.values == pytest.approx([3 * row[1] for row in values])
    top = lanes[1, 0].get_ylim()[1]
    assert masked.get_data().baseline == top
    assert masked.get_data().values == pytest.approx([top * (1 - row[1]) for row in MASKED])
    dead = lanes[2, 0].patches[0]
    assert (dead.get_x(), dead.get_width()) == (20, 20)  # those of its windows


def test_old_logs_alone_have_no_lane_for_inference(old):
    with style():
        figure = draw_training('head', {'old': old})
        figure.canvas.draw()
    assert len(figure.axes) == 3
    for axes, shown in zip(figure.axes, (False, False, True), strict=True):
        labels = [label for label in axes.get_xticklabels() if label.get_visible()]
        assert any(label.get_text() for label in labels) == shown


def test_bias_and_other_numbers_of_experts(history):
    load = np.full((4, 2), 0.5)
    biased = LayerHistory(np.array(STEPS), load, load, load, bias=np.array([[0, 0.01]] * 4))
    with style():
        figure = draw_training('head', {'run': history, 'biased': biased})
    lanes = np.array(figure.axes).reshape(4, 2)
    assert [texts(lane) for lane in lanes[:2, 1]] == [['bias +0.000'], ['bias +0.010']]
    assert not lanes[2, 1].axison  # it has no third expert


def test_animation(history):
    with style():
        content = animation('head', {'run': history})
    picture = Image.open(io.BytesIO(content))
    assert picture.n_frames == len(STEPS)
    assert len(content) < 1e6


def test_tool(tmp_path, capsys):
    runs = [write(tmp_path / method / 'seed0', kinds) for method, kinds in (('a', ALL), ('b', OLD))]
    write(tmp_path / 'other', OLD, layer='backbone.layer4')
    out = tmp_path / 'out'
    argv = [*map(str, runs), str(tmp_path / 'other'), '--out', str(out)]
    plot_balancing(parse([*argv, '--gif']))
    names = {str(path.relative_to(out)) for path in out.rglob('*.*')}
    assert names >= {f'{LAYER}/balancing.gif', 'backbone.layer4/balancing_training.png'}
    printed = capsys.readouterr().out
    assert 'a/seed0' in printed
    assert 'b/seed0' in printed
    assert '30 (expert 2)' in printed

    layer = ['--layer', 'backbone.layer4', '--names', 'x', 'y', 'z', '--until', '25']
    paths = plot_balancing(parse([*argv, *layer]))
    assert capsys.readouterr().out.splitlines()[1].endswith('20 (expert 1)')  # so far
    assert [path.name for path in paths] == [
        f'balancing_{kind}.{suffix}' for kind in ('steps', 'training') for suffix in ('png', 'pdf')
    ]


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (['{run}', '{run}'], 'is given twice'),
        (['{run}', 'nowhere'], "there is no folder 'nowhere'; name the work directory"),
        (['{run}', '{empty}'], 'has no loads of experts in */vis_data/scalars.json'),
        (['{run}', '--layer', 'neck'], f'--layer=neck: the runs have {LAYER}'),
        (['{run}', '--names', 'a', 'b'], '--names: give 1 different names'),
        (['{run}', '--steps', '0'], '--steps: 0 is no training iteration'),
        (['{run}', '--steps', '40', '--until', '20'], '--steps: 40 is after --until=20'),
        (['{run}', '--until', '9'], 'were logged at iteration 10; raise it'),
    ],
)
def test_mistakes(options, sentence, tmp_path, capsys):
    places = {'run': write(tmp_path / 'run'), 'empty': tmp_path / 'empty'}
    places['empty'].mkdir()
    argv = [option.format(**places) for option in options]
    with pytest.raises(SystemExit) as stop:
        run_tool(plot_balancing, parse(['--out', str(tmp_path / 'out'), *argv]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert sentence in error
    assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()
