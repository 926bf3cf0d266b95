"""The pictures of the README and of docs/results.md."""

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from research.plots import plot_specialisation


def run(expert_given_bin, mi):
    size = {'edges': [8, 16, 32, 64], 'expert_given_bin': expert_given_bin, 'mi': mi}
    layer = {'associations': {'objects': {'size': size}}}
    return {'layers': {'cls': layer, 'reg': layer}}


def test_areas_are_the_shares(tmp_path, monkeypatch):
    shares = [[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]]
    drawn = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', keep)
    path = tmp_path / 'picture.png'
    plot_specialisation({'soft': run(shares, 0.31), 'hard': run(shares, 0.02)}, path)
    assert cv2.imread(str(path)).shape[2] == 3
    panels = drawn[0].axes
    assert [axes.get_title() for axes in panels] == [
        f'{layer}: {mi} nats' for mi in ('0.31', '0.02') for layer in ('cls', 'reg')
    ]
    for axes in panels:
        lower, upper = (patch.get_data() for patch in axes.patches)
        np.testing.assert_allclose(lower.values, [0.75, 0.5, 0])
        np.testing.assert_allclose(upper.values, 1)
        np.testing.assert_allclose(upper.baseline, lower.values)
        assert lower.edges == pytest.approx([8, 16, 32, 64])
