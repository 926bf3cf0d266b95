"""Similarity of experts against formulas written out with Gram matrices and flat vectors."""

import copy

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from tiny_models import build_single, make_batch
from torch import nn

from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.analysis.data import drawn
from mmdet_moe.analysis.statistics import similarity
from mmdet_moe.analysis.statistics.similarity import (
    cosines,
    expert_similarity,
    linear_cka,
    mean_between,
    outputs_of,
    weight_cosines,
)
from mmdet_moe.moe import ConvExperts, LinearExperts, MLPExperts, MoELayer, add_experts
from mmdet_moe.moe.mumoe import CPMuMoE, MuMoEMLP, TRMuMoE


def cka_of(x, y):
    """With H K H, as the paper has it: HSIC(K, L) = tr(K H L H) / (n − 1)²."""
    n = len(x)
    h = np.eye(n) - 1 / n

    def hsic(k, m):
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def unbiased_cka_of(x, y):
    """HSIC_1 of Song et al., term by term."""
    n = len(x)

    def hsic(k, m):
        k, m, one = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
        terms = np.trace(k @ m)
        terms += (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        terms -= 2 / (n - 2) * (one @ k @ m @ one)
        return terms / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize(('examples', 'formula'), [(90, cka_of), (12, unbiased_cka_of)])
def test_cka(examples, formula):
    """Of four experts: itself turned and scaled, a noisy copy, and something else."""
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, (examples, 5)) * [1, 2, 3, 1, 1] + 4
    turned = 3 * first @ np.linalg.qr(rng.normal(0, 1, (5, 5)))[0] - 7
    noisy = first + rng.normal(0, 1, first.shape)
    other = rng.normal(0, 1, first.shape)
    experts = np.stack([first, turned, noisy, other])
    found = linear_cka(torch.from_numpy(experts))
    expected = [[formula(x, y) for y in experts] for x in experts]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 3] < 0.4 < found[0, 2] < 0.99


def test_cka_of_few_examples_is_not_above_chance():
    """The biased estimate of independent features would be far above 0."""
    rng = np.random.default_rng(1)
    found = [linear_cka(torch.from_numpy(rng.normal(0, 1, (2, 30, 60))))[0, 1] for _ in range(40)]
    assert abs(np.mean(found)) < 0.02
    assert cka_of(*rng.normal(0, 1, (2, 30, 60))) > 0.5


def test_constant_outputs_are_unknown():
    features = torch.randn(3, 200, 4)
    features[1] = 1000 + torch.randn(4)
    found = linear_cka(features)
    assert np.isnan(found[1, [0, 2]]).all()
    assert np.isfinite(found[0, 2])
    assert np.diag(found).tolist() == [1, 1, 1]
    vectors = torch.tensor([[1.0, 0], [0, 0], [-1, 0]], dtype=torch.float64)
    assert np.isnan(cosines(vectors @ vectors.T)[0, 1])
    assert cosines(vectors @ vectors.T)[0, 2] == -1


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def layers():
    conv = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1))
    return {
        'conv': MoELayer(ConvExperts(4, 4, 3, 3), 3, 2, in_channels=4),
        'linear': MoELayer(LinearExperts(4, 4, 3), 3, 2, in_channels=4),
        'mlp': MoELayer(MLPExperts(4, 6, 4, 3), 3, 2, in_channels=4),
        'modules': MoELayer(conv, 3, 2, in_channels=4),
        'cp': CPMuMoE(4, 5, 3, 2),
        'tr': TRMuMoE(4, 5, (2, 2), 2),
        'mumlp': MuMoEMLP(4, 6, 4, 3, 2),
    }


def flat_weights(name, layer):
    """(E, P): what is a kernel or a matrix, one expert after the other."""
    if name in ('cp', 'tr', 'mumlp'):
        factors = [layer.hidden, layer.experts] if name == 'mumlp' else [layer.experts]
        whole = [f.materialise().detach().flatten(0, -3)[:, :-1].flatten(1) for f in factors]
        return torch.cat(whole, 1).numpy()
    experts = layer.experts
    if name == 'modules':
        kernels = [torch.cat([e[0].weight.flatten(), e[2].weight.flatten()]) for e in experts]
        return torch.stack(kernels).detach().numpy()
    parts = [experts.weight] if name != 'mlp' else [layer.weight for layer in experts.layers]
    return torch.cat([part.flatten(1) for part in parts], 1).detach().numpy()


@pytest.mark.parametrize('name', layers())
def test_cosines_of_weights(name):
    layer = layers()[name]
    vectors = flat_weights(name, layer)
    expected = [[cosine(a, b) for b in vectors] for a in vectors]
    np.testing.assert_allclose(weight_cosines(layer), expected, atol=1e-6)


def test_copies_of_a_dense_layer_are_alike(randomise):
    """Weights and outputs, at the start of a training from a dense model."""
    layer = randomise(layers()['modules']).eval()
    layer.experts.share_weights()
    np.testing.assert_allclose(weight_cosines(layer), 1, atol=1e-6)
    model = Model(layer)
    found = expert_similarity(model, {'a': layer}, Data())['a']
    for matrix in (found['weights']['cosine'], found['outputs']['cosine'], found['outputs']['cka']):
        np.testing.assert_allclose(matrix, 1, atol=1e-6)


class Model(nn.Module):
    """Runs one layer on maps or rows."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.data_preprocessor = lambda batch, _: batch

    def forward(self, inputs, mode):
        return self.layer(inputs)


ALL = list(range(6))


class Data:
    """Six images of 4 channels, in batches of 2."""

    def __init__(self, shape=(6, 6)):
        torch.manual_seed(1)
        self.images = torch.randn(6, 4, *shape)
        self.wanted = ALL

    def __len__(self):
        return 6

    def batches(self, images, num_workers):
        assert (images, num_workers) == (self.wanted, 0)
        return ({'inputs': part} for part in self.images[images].split(2))


@pytest.mark.parametrize('name', ['conv', 'modules', 'linear', 'mlp', 'tr', 'mumlp'])
def test_outputs_of_every_expert_on_the_same_inputs(name, randomise, monkeypatch):
    """Whoever was chosen; the layer's own output stays what it was."""
    monkeypatch.setattr(similarity, 'MAX_POSITIONS', 100)
    layer = randomise(layers()[name]).eval()
    is_map = name in ('conv', 'modules')
    data = Data((6, 6) if is_map else ())
    model = Model(layer)
    before = model(data.images, 'predict')
    features = outputs_of(model, {'a': layer}, data.batches(ALL, 0))['a']
    assert torch.equal(before, model(data.images, 'predict'))
    assert not {'run_experts', 'mix'} & set(vars(layer))
    expected = []
    for e in range(layer.num_experts):
        if name == 'conv':
            y = nn.functional.conv2d(data.images, layer.experts.weight[e], layer.experts.bias[e])
        elif name == 'modules':
            y = layer.experts[e](data.images)
        elif name == 'linear':
            y = data.images @ layer.experts.weight[e].T + layer.experts.bias[e]
        elif name == 'mlp':
            one, two = layer.experts.layers
            y = (data.images @ one.weight[e].T + one.bias[e]).relu() @ two.weight[e].T
            y = y + two.bias[e]
        else:
            y = layer.experts.expert_output(
                layer.act(layer.hidden.expert_output(data.images, e))
                if name == 'mumlp'
                else data.images,
                e,
            )
        expected.append(y.permute(0, 2, 3, 1).flatten(0, 2) if is_map else y)
    torch.testing.assert_close(features, torch.stack(expected).detach(), atol=1e-5, rtol=1e-4)
    found = expert_similarity(model, {'a': layer}, data)['a']
    vectors = features.flatten(1).numpy().astype(float)
    alike = [[cosine(a, b) for b in vectors] for a in vectors]
    np.testing.assert_allclose(found['outputs']['cosine'], alike, atol=1e-6)
    cka = linear_cka(features)
    np.testing.assert_allclose(found['outputs']['cka'], cka, atol=1e-9)
    upper = np.triu_indices(len(cka), 1)
    np.testing.assert_allclose(found['linkage'], linkage(1 - cka[upper], 'average'))
    assert found['linkage_of'] == 'outputs'
    assert mean_between(found['outputs']['cka']) == pytest.approx(cka[upper].mean())


def test_examples_are_bounded(randomise, monkeypatch):
    """A uniform sample, the same for every expert and in every run."""
    monkeypatch.setattr(similarity, 'MAX_EXAMPLES', 7)
    layer = randomise(layers()['conv']).eval()
    model, data = Model(layer), Data()
    first = outputs_of(model, {'a': layer}, data.batches(ALL, 0))['a']
    assert first.shape == (3, 7, 4)
    assert torch.equal(first, outputs_of(model, {'a': layer}, data.batches(ALL, 0))['a'])
    # Or by the size of what they hold: 3 experts, 4 channels.
    monkeypatch.setattr(similarity, 'MAX_EXAMPLES', 4096)
    monkeypatch.setattr(similarity, 'MAX_VALUES', 7 * 3 * 4)
    monkeypatch.setattr(similarity, '_LEAST', 1)
    assert torch.equal(first, outputs_of(model, {'a': layer}, data.batches(ALL, 0))['a'])
    monkeypatch.setattr(similarity, 'MAX_VALUES', 1 << 26)
    every = outputs_of(model, {'a': layer}, data.batches(ALL, 0))['a']
    assert every.shape == (3, 6 * 16, 4)
    for example in first.unbind(1):
        assert (every == example[:, None]).all(2).all(0).any()


def test_images_are_drawn(monkeypatch):
    monkeypatch.setattr(similarity, 'IMAGES', 3)
    layer = MoELayer(nn.Conv2d(4, 5, 1), 3, 2, in_channels=4, granularity='image').eval()
    data = Data()
    data.wanted = drawn(6, 3)
    found = expert_similarity(Model(layer), {'a': layer}, data)['a']
    assert found['outputs']['num_examples'] == 3 * 16


def test_whole_maps_are_looked_at_once(monkeypatch):
    """And not once for each expert that has a say in them."""
    monkeypatch.setattr(similarity, 'MAX_POSITIONS', 100)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    layer = MoELayer(conv, 3, 2, in_channels=4, granularity='pixel', whole_maps=True).eval()
    data = Data()
    features = outputs_of(Model(layer), {'a': layer}, data.batches(ALL, 0))['a']
    assert len(layer.routing.expert_ids.unique()) > 1
    expected = [expert(data.images).permute(0, 2, 3, 1).flatten(0, 2) for expert in layer.experts]
    torch.testing.assert_close(features, torch.stack(expected).detach())


def test_subnets_of_a_detector(randomise):
    """On all levels; the experts of the classification and of the regression apart."""
    model = randomise(build_single('moe retina')).eval()
    found = Tracer(model).layers
    batch = make_batch()
    features = outputs_of(model, found, iter([copy.deepcopy(batch)]))
    for name, layer in found.items():
        # 3 images of 16 positions at most, of levels of 8 x 12, 4 x 6 and 2 x 3 cells.
        channels = 12 if 'cls' in name else 16
        assert features[name].shape == (layer.num_experts, 3 * (16 + 16 + 6), channels)


def test_layers_that_are_not_compared():
    model = build_single('retina')
    many = dict(type='mmdet_moe.CPMuMoE', num_experts=33, rank=2)
    add_experts(model, [dict(at='neck.lateral_convs.0.conv', **many)])
    found = expert_similarity(model, Tracer(model).layers, None)
    assert found == {
        'neck.lateral_convs.0.conv': {'reason': '33 experts are more than the 32 that are compared'}
    }
