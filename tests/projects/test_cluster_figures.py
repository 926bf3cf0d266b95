"""What is drawn of the cluster mixtures, read back from the figures."""

import math

import numpy as np
import pytest
from PIL import Image

from projects.cluster_theory import figures as cluster_figures
from projects.cluster_theory.figures import (
    plot_alignment,
    plot_dispatch_entropy,
    plot_routing_plane,
)

S, E, K = 12, 3, 4


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = cluster_figures._save
    monkeypatch.setattr(
        cluster_figures, '_save', lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


def record():
    rng = np.random.default_rng(0)
    arrays = {
        f'{part}_{kind}': rng.normal(size=(S, E, K))
        for part in ('expert', 'router')
        for kind in ('features', 'centres')
    }
    load = np.full((S, E), np.nan)
    load[-1] = [0.25, 0.0, 0.75]
    return {'steps': np.arange(0, 10 * S, 10), 'load': load, **arrays}


@pytest.mark.parametrize('suffix', ['png', 'pdf'])
def test_alignment(drawn, tmp_path, suffix):
    data = record()
    path = tmp_path / f'alignment.{suffix}'
    plot_alignment(data, path)
    axes = np.array(drawn[0].axes).reshape(2, E)
    titles = [panel.get_title() for panel in axes[0]]
    # The experts with the largest load first.
    assert titles == ['expert 2\nload 0.75', 'expert 0\nload 0.25', 'expert 1\nload 0.00']
    for row, part in enumerate(('expert', 'router')):
        for column, e in enumerate((2, 0, 1)):
            lines = axes[row, column].get_lines()
            for i, kind in enumerate(('features', 'centres')):
                for k in range(K):
                    line = lines[i * K + k]
                    assert line.get_ydata().tolist() == data[f'{part}_{kind}'][:, e, k].tolist()
                    assert line.get_linestyle() == ('-', '--')[i]
    if suffix == 'png':
        assert Image.open(path).width > 1000
    else:
        assert path.read_bytes().startswith(b'%PDF')


def test_routing_plane(drawn, tmp_path):
    strengths = np.array([[2.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 3.0]])
    clusters, experts = np.array([0, 1, 0, 3]), np.array([5, 1, 1, 5])
    path = tmp_path / 'plane.png'
    plot_routing_plane({'a': (strengths, clusters, experts)}, path, max_points=3)
    (axes,) = drawn[0].axes
    first, second = axes.get_lines()  # experts 1 and 5
    half = math.sqrt(0.5)
    np.testing.assert_allclose(first.get_xydata(), [[-half, half], [half, half]])
    np.testing.assert_allclose(second.get_xydata(), [[2 * half, 2 * half]])
    assert first.get_marker() != second.get_marker()
    assert [text.get_text() for text in axes.texts] == [f'cluster {k}' for k in range(4)]
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ['expert 1', 'expert 5']
    assert Image.open(path).width > 1000


def test_dispatch_entropy(drawn, tmp_path):
    long = (np.array([0, 10, 20, 30]), np.array([np.nan, 1.0, 0.5, 0.1]))
    short = (np.array([0, 10, 15]), np.array([np.nan, 1.2, 0.7]))
    path = tmp_path / 'entropy.png'
    plot_dispatch_entropy({'mixture': [long, short]}, path, num_clusters=4)
    (axes,) = drawn[0].axes
    *runs, mean, limit = axes.get_lines()
    assert [line.get_xdata().tolist() for line in runs] == [[10, 20, 30], [10, 15]]
    assert mean.get_xdata().tolist() == [10, 15, 20, 30]
    # A run that has ended counts with its last value.
    expected = [1.1, (0.75 + 0.7) / 2, (0.5 + 0.7) / 2, (0.1 + 0.7) / 2]
    assert mean.get_ydata().tolist() == pytest.approx(expected)
    assert set(limit.get_ydata()) == {math.log(4)}
    assert Image.open(path).width > 500
