"""Pictures for visualisation backends, and what all pictures share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdet_moe.drawing import draw_utilization, expert_ticks, wrapped
from research.plots import plot_overview


@pytest.mark.parametrize(('levels', 'experts', 'steps'), [(1, 1, 1), (5, 4, 30), (8, 64, 2)])
def test_picture_of_the_utilization(levels, experts, steps):
    rng = np.random.default_rng(0)
    shares = [rng.dirichlet(np.ones(experts), n).tolist() for n in (levels, steps, steps)]
    picture = draw_utilization('neck.moe', shares[0], range(50, 50 * steps + 1, 50), *shares[1:])
    alone = draw_utilization('neck.moe', shares[0])
    for image in (picture, alone):
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        assert image.min() < 50
        assert image.max() == 255
    assert picture.shape[1] > alone.shape[1] > 400


def test_lines_of_long_names():
    for text in (
        'backbone.layer4.a_module.with_a_long_name.and_another_one: what the experts see\nn = 1.5',
        'short',
        'w' * 200,
        'two words ' * 30,
    ):
        for width in (2.0, 4.5, 7.2):
            broken = wrapped(text, width)
            assert max(map(len, broken.split('\n'))) <= width * 72 / (0.57 * 8.5)
            assert ''.join(broken.split()) == ''.join(text.split())
    assert wrapped('short\nlines', 7) == 'short\nlines'
    assert wrapped('some_module.moe: which expert sees what', 2.0).startswith('some_module.')


def test_ticks_of_many_experts():
    assert expert_ticks(3) == ['0', '1', '2']
    shown = [tick for tick in expert_ticks(64) if tick]
    assert shown == [str(e) for e in range(0, 64, 4)]


@pytest.mark.parametrize('suffix', ['png', 'pdf'])
def test_overview(tmp_path, suffix):
    path = Path(tmp_path / f'overview.{suffix}')
    report = {'level_shares': [[0.25, 0.75], [1.0, 0.0]], 'mi_input': 0.5, 'mi_level': 0.4}
    images = [np.zeros((16, 16, 3), np.uint8)] * 2
    plot_overview(images, {'a.moe': report, 'b.moe': report}, path)
    if suffix == 'png':
        assert Image.open(path).width > 1000
    else:
        assert path.read_bytes().startswith(b'%PDF')
