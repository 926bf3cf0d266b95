"""The generated data against the formulas of arXiv 2208.02813."""

import math

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, FUNCTIONS
from torch.utils.data import DataLoader

from mmdet_moe.errors import ConfigError
from projects.cluster_theory import ClusterPatches, collate_batch

N = 8000


def patches_of(data):
    """(N, P, d) without the scale."""
    return data.inputs[:, :, 0].transpose(1, 2).double() / 10


def decomposed(data):
    """Each sample's four patches in the order of the definition, and the numbers in them.

    A patch is recognised by the direction that it lies along; the noise lies along none.
    """
    directions = torch.cat([data.features, data.centres]).double()
    patches = patches_of(data)
    along = patches @ directions.T
    residual = (patches - along @ directions).norm(dim=-1)
    noise = residual.argmax(1)
    strongest = along.abs().argmax(-1)
    strongest[torch.arange(len(data)), noise] = -1
    return patches, along, strongest, noise


@pytest.mark.parametrize(
    ('setting', 'sigma', 'gamma'),
    [('s1', 1, (0.5, 3)), ('s2', 2, (0.5, 3)), ('s3', 1, (0.5, 2)), ('s4', 2, (0.5, 2))],
)
def test_settings(setting, sigma, gamma):
    data = ClusterPatches(setting, num_samples=N)
    patches, along, strongest, noise = decomposed(data)
    rows = torch.arange(N)
    # Where the patches are: the four places are equally likely for each kind.
    places = {}
    for name, number in (('feature', data.clusters), ('centre', data.clusters + 4)):
        found = strongest == number[:, None]
        assert (found.sum(1) == 1).all(), name
        places[name] = found.int().argmax(1)
    places['noise'] = noise
    places['other'] = 6 - sum(places.values())
    for name, place in places.items():
        shares = torch.bincount(place, minlength=4) / N
        assert (shares - 0.25).abs().max() < 0.02, name
    # The feature has the label's sign and α ~ U(0.5, 2).
    signed = along[rows, places['feature'], data.clusters]
    assert torch.equal(signed > 0, data.labels == 1)
    check_uniform(signed.abs(), 0.5, 2)
    check_uniform(along[rows, places['centre'], data.clusters + 4], 1, 2)
    # The other feature is that of another cluster, equally often of each, with a random sign.
    other = strongest[rows, places['other']]
    assert (other < 4).all()
    assert (other != data.clusters).all()
    pairs = torch.bincount(data.clusters * 4 + other, minlength=16).view(4, 4) / N
    assert (pairs - (1 - torch.eye(4)) / 12).abs().max() < 0.015
    misleading = along[rows, places['other'], other]
    check_uniform(misleading.abs(), *gamma)
    assert (misleading > 0).double().mean() == pytest.approx(0.5, abs=0.03)
    assert ((misleading > 0) == (data.labels == 1)).double().mean() == pytest.approx(0.5, abs=0.03)
    # Normal noise of variance σ²/d in every direction.
    xi = patches[rows, noise]
    assert xi.std().item() == pytest.approx(sigma / 50**0.5, rel=0.01)
    assert (xi.std(0) * 50**0.5 / sigma - 1).abs().max() < 0.06
    assert xi.mean().abs() < 0.001 * sigma
    kurtosis = ((xi / xi.std()) ** 4).mean()
    assert kurtosis.item() == pytest.approx(3, abs=0.1)
    assert data.labels.double().mean() == pytest.approx(0.5, abs=0.02)
    assert (torch.bincount(data.clusters) / N - 0.25).abs().max() < 0.02


def check_uniform(x, low, high):
    """By Kolmogorov and Smirnov's distance of the distributions."""
    values = ((x - low) / (high - low)).sort().values
    assert values.min() >= -1e-6
    assert values.max() <= 1 + 1e-6
    expected = (torch.arange(len(values)) + 0.5) / len(values)
    assert (values - expected).abs().max() < 2 / len(values) ** 0.5


def test_shape_and_scale():
    data = ClusterPatches(num_samples=20)
    assert data.inputs.shape == (20, 50, 1, 4)
    assert (data.inputs.dtype, data.labels.dtype) == (torch.float32, torch.int64)
    unscaled = ClusterPatches(num_samples=20, scale=1.0)
    torch.testing.assert_close(data.inputs, 10 * unscaled.inputs)
    assert data.metainfo['classes'] == ('negative', 'positive')


def test_orthonormal_directions():
    data = ClusterPatches(num_samples=1, num_clusters=5, patch_dim=12)
    directions = torch.cat([data.features, data.centres]).double()
    torch.testing.assert_close(directions @ directions.T, torch.eye(10).double(), rtol=0, atol=1e-6)


def test_splits_share_the_directions_only():
    train, test = (ClusterPatches(split=split, num_samples=30) for split in ('train', 'test'))
    assert torch.equal(train.features, test.features)
    assert torch.equal(train.centres, test.centres)
    assert not torch.equal(train.inputs, test.inputs)
    again = ClusterPatches(num_samples=30)
    assert torch.equal(train.inputs, again.inputs)
    other = ClusterPatches(num_samples=30, seed=1)
    assert not torch.equal(train.features, other.features)


def test_every_parameter_can_be_given():
    data = ClusterPatches(
        's1', num_samples=500, alpha=(3.0, 3.0), beta=(4.0, 4.0), gamma=(5.0, 5.0), sigma=0.0,
        num_clusters=2, num_patches=6, patch_dim=8, scale=1.0,
    )  # fmt: skip
    lengths = data.inputs.norm(dim=1)[:, 0].double().sort(1).values
    expected = torch.tensor([0.0, 0, 0, 3, 4, 5]).double().expand(500, 6)
    torch.testing.assert_close(lengths, expected, rtol=0, atol=1e-5)
    assert set(data.clusters.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'setting': 's5'}, "setting='s5' is unknown"),
        ({'split': 'val'}, "split='val' is unknown"),
        ({'setting': ['s1']}, r"setting=\['s1'\] is unknown"),
        ({'num_samples': 0}, 'num_samples=0 must be an integer of at least 1'),
        ({'num_samples': 10.5}, 'num_samples=10.5 must be an integer of at least 1'),
        ({'seed': -1}, 'seed=-1 must be an integer of at least 0'),
        ({'num_clusters': 1}, 'num_clusters=1 must be an integer of at least 2'),
        ({'num_patches': 2}, 'num_patches=2 must be an integer of at least 3'),
        ({'patch_dim': 7}, 'patch_dim=7 must be an integer of at least 8'),
        ({'patch_dim': '50'}, "patch_dim='50' must be an integer of at least 8"),
        ({'sigma': -1.0}, 'sigma=-1.0 must be a finite number of at least 0'),
        ({'sigma': math.nan}, 'sigma=nan must be a finite number'),
        ({'scale': math.inf}, 'scale=inf must be a finite number greater than 0'),
        ({'alpha': 1}, r'alpha=1 must be a range \(low, high\)'),
        ({'alpha': None}, r'alpha=None must be a range'),
        ({'alpha': (2, 1)}, r'alpha=\(2, 1\) must be a range \(low, high\), low first'),
        ({'beta': '12'}, r"beta='12' must be a range"),
        ({'beta': (1, math.nan)}, r'beta\[1\]=nan must be a finite number'),
        ({'gamma': (1,)}, r'gamma=\(1,\) must be a range'),
        ({'gamma': ()}, r'gamma=\(\) must be a range'),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ClusterPatches(**options)


@pytest.mark.parametrize('batch_size', [7, 20])
def test_batches(batch_size):
    """What the DataLoader makes of whole batches is what it makes of single samples."""
    data = DATASETS.build(dict(type='mmdet_moe.ClusterPatches', num_samples=20))
    collate = FUNCTIONS.get('mmdet_moe.collate_batch')
    batches = list(DataLoader(data, batch_size, collate_fn=collate))
    assert [len(batch['gt_label']) for batch in batches] == [
        min(batch_size, 20 - start) for start in range(0, 20, batch_size)
    ]
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    single = collate_batch([data[i] for i in range(20)])
    assert set(whole) == {'inputs', 'gt_label', 'cluster'}
    for key, value in whole.items():
        assert torch.equal(value, single[key])
    chosen = data.__getitems__(np.array([3, 1]).tolist())
    assert torch.equal(chosen['cluster'], data.clusters[[3, 1]])
