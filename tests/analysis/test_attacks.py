"""Attacks against closed forms and a search by hand."""

from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mmdet_moe.analysis import attacks as module
from mmdet_moe.analysis.attacks import Attack, margins, noisy
from mmdet_moe.errors import ConfigError

EPS = 0.1
SHAPE = (3, 4, 4)


@pytest.fixture
def linear():
    """Two classes, so that the best perturbation is known: the sign of the weights' difference."""
    weight = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(1))
    x[:, 0, 0, :2] = torch.tensor([0.0, 1.0])  # where the range of the pixels ends
    logits = lambda x: x.flatten(1) @ weight.T  # noqa: E731
    return weight, logits, x, logits(x).argmax(1)


def pgd_by_hand(logits, x, labels, eps, steps):
    found = x.clone()
    for _ in range(steps):
        found.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(logits(found), labels), found)
        step = found.detach() + eps / 4 * gradient.sign()
        found = step.clamp(x - eps, x + eps).clamp(0, 1)
    return found


@pytest.mark.parametrize('kind', module.ATTACKS)
def test_the_best_perturbation_of_a_linear_model(linear, kind):
    weight, logits, x, labels = linear
    signs = (weight[1 - labels] - weight[labels]).sign().view(x.shape)
    best = (x + EPS * signs).clamp(0, 1)
    found = Attack(kind, EPS, 20)(logits, x, labels)
    torch.testing.assert_close(found, best)
    torch.testing.assert_close(found, pgd_by_hand(logits, x, labels, EPS, 20))
    one = Attack(kind, EPS, 20)(logits, x[:1], labels[:1])  # as many as the toolbox begins with
    torch.testing.assert_close(one, best[:1])


@pytest.fixture(scope='module')
def network():
    """A small one, trained on noise of three brightnesses, right about all of its images."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    x = (torch.rand(60, *SHAPE) * 0.5 + labels.view(-1, 1, 1, 1) * 0.25).clamp(0, 1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(net(x), labels).backward()
        optimizer.step()
    net.requires_grad_(False)
    assert (net(x).argmax(1) == labels).all()
    return net, x, labels


@pytest.mark.parametrize('kind', module.ATTACKS)
def test_no_masked_gradients(network, kind):
    """The loss rises, noise is weaker, more steps and more room never help the model."""
    net, x, labels = network
    found = {steps: Attack(kind, EPS, steps)(net, x, labels) for steps in (5, 20)}
    for attacked in found.values():
        assert (attacked - x).abs().max() <= EPS + 1e-6
        assert ((attacked >= 0) & (attacked <= 1)).all()
    by_noise, weak, strong = (
        margins(net(images), labels) for images in (noisy(x, EPS), found[5], found[20])
    )
    assert (strong > margins(net(x), labels)).all()
    assert (strong > by_noise).all()
    assert strong.mean() >= weak.mean()
    if kind == 'pgd':  # whose first 5 of 20 steps are the 5
        assert (strong >= weak).all()
    accuracies = [
        (net(Attack(kind, eps, 20)(net, x, labels)).argmax(1) == labels).float().mean()
        for eps in (0.01, 0.05, 0.2, 1)
    ]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[-1] == 0


def test_nothing_to_do(network):
    net, x, labels = network
    assert Attack('pgd', 0, 5)(net, x, labels) is x
    assert Attack('apgd', EPS, 5)(net, x[:0], labels[:0]).shape == (0, *SHAPE)


def test_random_numbers(network):
    """The same seed gives the same image, whatever was drawn before; NumPy goes on as it would."""
    net, x, labels = network
    attack = Attack('pgd', EPS, 2)
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = attack(net, x, labels, seed=1)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    np.random.random()  # noqa: NPY002
    assert torch.equal(attack(net, x, labels, seed=1), first)
    assert not torch.equal(attack(net, x, labels, seed=2), first)


def test_noise_is_as_large_as_it_can_be():
    x = torch.linspace(0, 1, 48).view(1, *SHAPE)
    noise = noisy(x, EPS, 3) - x
    inner = (x >= EPS) & (x <= 1 - EPS)
    torch.testing.assert_close(noise[inner].abs(), torch.full((int(inner.sum()),), EPS))
    assert 0.2 < (noise[inner] > 0).float().mean() < 0.8
    assert ((x + noise >= 0) & (x + noise <= 1)).all()
    assert torch.equal(noisy(x, 0), x)
    assert not torch.equal(noisy(x, EPS, 4), x + noise)


def test_margins():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    assert margins(logits, torch.tensor([1, 0])).tolist() == [-1, 2]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('fgsm', EPS, 1), "--attack=fgsm is unknown; use one of ('pgd', 'apgd')"),
        (('pgd', 8, 1), '--eps=8 must lie in 0..1, for pixels do; write 8/255 for 8 of 255'),
        (('pgd', EPS, 0), '--steps=0 must be at least 1'),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ConfigError) as error:
        Attack(*arguments)
    assert str(error.value) == message


def test_without_the_toolbox(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, 'version', version)
    with pytest.raises(ConfigError, match=r"missing: pip install 'mmdet_moe\[attacks\]'$"):
        Attack('pgd', EPS, 1)
