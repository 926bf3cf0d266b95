"""One classifier for two data sets: planted features, the table, and all of it in miniature."""

import json

import numpy as np
import pytest
import torch
from miniature import expect_cifar, expect_fashion_mnist, write_cifar100, write_fashion_mnist
from tables_by_hand import cells

from mmdet_moe.errors import ConfigError
from mmdet_moe.models import EfficientNetLite0
from research.experiments import domains
from research.experiments import experiment as experiment_module
from research.experiments.domains import DENSE, METHODS, TRUNKS, DomainsExperiment, markdown_table
from research.heads import Data, Recipe

RECIPE = Recipe(lr=3e-3, epochs=4, batch_size=64)
FEATURES = 1280  # both trunks get as many
POOLED, MAPS = TRUNKS['domains'], TRUNKS['domains-maps']


def planted(num_images, seed):
    """Two sources that lie apart, each with ten classes of its own."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, FEATURES, generator=generator)
    apart = 3 * torch.randn(2, FEATURES, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(20, (num_images,), generator=generator)
    noise = torch.randn(num_images, FEATURES, generator=generator)
    sources = labels // 10
    return Data(centres[labels] + apart[sources] + noise, labels, sources=sources)


@pytest.mark.parametrize(
    ('trunk', 'name'),
    [
        (POOLED, '4 experts: clustered, Switch'),
        (POOLED, '4 experts: DAMEX'),
        (POOLED, '4 experts: loss-free'),
        (MAPS, '4 experts: clustered, Switch'),
    ],
)
def test_measured_by_hand(trunk, name):
    train, test = planted(640, seed=1), planted(200, seed=2)
    method = next(m for m in trunk.methods if m.name == name)
    found = domains.measure(trunk, method, 0, RECIPE, train, test)
    routing = found['routing']
    counts = np.array(routing['counts'])
    assert counts.sum(1).tolist() == torch.bincount(test.sources).tolist()
    p = counts / counts.sum()
    independent = p.sum(0) * p.sum(1, keepdims=True)
    expected = (p[p > 0] * np.log(p[p > 0] / independent[p > 0])).sum()
    assert routing['information'] == pytest.approx(expected)
    assert routing['dead'] == (counts.sum(0) < 0.01 / 4 * counts.sum()).sum()
    if 'clustered' in name:
        assert expected == pytest.approx(np.log(2), abs=0.05)  # the sources are told apart
        assert routing['disagreement'] < 0.1


def test_costs_by_hand():
    """Multiply and add, of one image: the router, one expert and the classifier."""
    test = planted(20, seed=2)
    costs = {}
    for method in METHODS:
        head = domains.build_head(POOLED, method, 0)
        costs[method.name] = domains.count_flops(head, test.features[:1])
    f, w, c = FEATURES, domains.WIDTH, 110
    assert costs['4 experts: Switch'] == 2 * (4 * f + f * w + 2 * w * w + 2 * w * c)
    wider = w + 4
    assert costs[DENSE.name] == 2 * (f * wider + 2 * wider * wider + 2 * wider * c)
    assert costs[DENSE.name] >= costs['4 experts: Switch']


def test_costs_on_maps_by_hand():
    """The same for convolutions on 2 × 2 places."""
    image = planted(1, seed=2).features
    costs = {
        method.name: domains.count_flops(domains.build_head(MAPS, method, 0), image)
        for method in MAPS.methods
    }
    w, c = domains.WIDTH, 110
    expert = 4 * (320 * w + w * 9 * w + w * 2 * w)
    assert costs['4 experts: Switch'] == 2 * (4 * 320 + expert + 2 * w * c)
    assert costs['4 experts: Switch'] <= costs[DENSE.name] < 1.05 * costs['4 experts: Switch']


def test_experts_of_one_weight_have_their_own_norms():
    method = next(m for m in MAPS.methods if m.one_for_all)
    head = domains.build_head(MAPS, method, 0)
    convolutions = {m.weight for m in head.modules() if isinstance(m, torch.nn.Conv2d)}
    norms = [m for m in head.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert (len(convolutions), len(norms)) == (3, 3 * method.experts)


def test_the_recipe_is_chosen_on_images_of_all_classes(tmp_path, monkeypatch):
    data = Data(torch.randn(2000, FEATURES), torch.arange(2000) % 10, sources=torch.zeros(2000))
    trained, judged = [], []
    monkeypatch.setattr(domains, 'load', lambda *_: data)
    monkeypatch.setattr(domains, 'train_head', lambda _, part, *__, **___: trained.append(part))
    monkeypatch.setattr(
        domains, 'accuracy', lambda _, labels: judged.append(labels) or len(judged) / 10
    )
    DomainsExperiment(tmp_path, tmp_path, [0], 1, tmp_path).tune()
    assert json.loads((tmp_path / 'recipe.json').read_text())['best'] == vars(domains.RECIPES[-1])
    for part, labels in zip(trained, judged, strict=True):
        assert len(part) == 1800
        assert torch.bincount(part.labels).min() > 150
        assert torch.bincount(labels).min() > 5


def test_table_and_picture(tmp_path):
    def run(accuracy, counts=None):
        found = {'accuracy': accuracy, 'flops': 123_456, 'parameters': 54_321}
        if counts is not None:
            found['routing'] = {
                'counts': counts, 'information': 0.25, 'dead': 1, 'disagreement': 0.5
            }  # fmt: skip
        return found

    results = {
        DENSE: {0: run([0.4, 0.8]), 1: run([0.42, 0.8])},
        METHODS[3]: {1: run([0.5, 0.9], [[1, 0]]), 2: run([0.42, 0.8], [[1, 0]])},
        METHODS[4]: {},
    }
    dense, switch = cells(markdown_table(results))
    assert dense[:8] == [
        'dense, equal cost', '2', '60.50 ± 0.71', '–', '41.0', '80.0', '123', '54 k'
    ]  # fmt: skip
    assert switch[2:6] == ['65.50 ± 6.36', '+9.00', '46.0', '85.0']
    assert switch[8:] == ['0.25 ± 0.00', '2 of 8', '0.50']
    domains.plot(results, tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').stat().st_size > 1000


@pytest.mark.sweep(keep=1 / 2)
@pytest.mark.parametrize('trunk', [POOLED, MAPS])
def test_all_in_miniature(tmp_path, monkeypatch, trunk):
    """Two tiny data sets through the real backbone; then it goes on where it stopped."""
    monkeypatch.setattr(experiment_module, 'RESULTS', tmp_path / 'results.md')
    monkeypatch.setattr(domains, 'RECIPES', (Recipe(epochs=1, batch_size=16),))
    weights = tmp_path / 'weights.pth'
    torch.save(EfficientNetLite0().state_dict(), weights)
    monkeypatch.setenv('EFFICIENTNET_LITE0', str(weights))
    folder = write_cifar100(tmp_path / 'cifar', num_train=120, num_test=100)
    expect_cifar(monkeypatch, folder)
    fashion = tmp_path / 'fashion'
    write_fashion_mnist(fashion, num_train=120, num_test=20)
    expect_fashion_mnist(monkeypatch, fashion)
    made = DomainsExperiment(
        folder.parent, tmp_path / 'runs', [0], 1, fashion, trunk, trunk.methods[:4], 100
    )
    domains.load.cache_clear()
    made.run()
    train = domains.load(made.where, 'train')
    assert torch.bincount(train.sources).tolist() == [100, 100]
    assert train.labels[train.sources == 1].min() == 100
    assert train.features.shape == (200, FEATURES)
    table = (made.written / f'{trunk.name}.md').read_text()
    assert table.count('\n| ') == 6  # two lines of the head
    path = made.path(DENSE, 0)
    first = path.stat().st_mtime_ns
    made.run()
    assert path.stat().st_mtime_ns == first
    content = json.loads(path.read_text())
    content['settings']['images'] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match='was made with other settings'):
        made.run(table_only=True)
