"""The whole tool on a tiny trained classifier, sparse, dense and factorised."""

import json
import re
from itertools import groupby
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from scipy.stats import binomtest
from tiny_classifiers import FACTORISED, SPARSE, write_classifier
from tiny_tools import DETECTOR, Tool
from torch import nn

from mmdet_moe.analysis import measuring
from mmdet_moe.analysis.attacks import MAX_BATCH, Attack
from mmdet_moe.analysis.data import AnalysisData, drawn
from mmdet_moe.analysis.robustness import (
    COLUMNS,
    TITLES,
    Robustness,
    _batches,
    attack_checkpoint,
    changed,
    parse,
    table,
    wilson,
)
from mmdet_moe.cli import load_config, set_loader_defaults
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.routing import Routing

IMAGES = 24


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('classifier')
    return write_classifier(folder, SPARSE, IMAGES, steps=40, noise=0.3)


def argv(classifier, out, *more):
    config, checkpoint, _ = classifier
    return [str(config), str(checkpoint), '--out', str(out), '--device', 'cpu', *more]


def images_of(config, total=None):
    cfg = load_config(str(config))
    set_loader_defaults(cfg)
    init_default_scope(cfg.default_scope)
    return AnalysisData(cfg, 'val', total)


def images(classifier, total=None):
    data = images_of(classifier[0], total)
    (batch,) = _batches(data, torch.device('cpu'))
    return batch


def by_name(rows):
    found = {}
    for row in rows:
        for column in COLUMNS:
            if row[column] is not None:
                found[row['what'], row['expert'], column] = row[column]['mean']
    return found


def test_tool(classifier, tmp_path, capsys):
    out = tmp_path / 'attack.json'
    result = attack_checkpoint(parse(argv(classifier, out, '--eps', '16/255', '--steps', '3')))
    assert json.loads(out.read_text()) == result
    assert (result['eps'], result['images']) == (16 / 255, IMAGES)
    found = by_name(result['rows'])
    accuracy = {column: found['model', None, column] for column in COLUMNS}
    assert accuracy['attacked'] < accuracy['noise'] <= accuracy['clean']
    assert found['loss', None, 'attacked'] > found['loss', None, 'noise']
    assert found['changed', None, 'attacked'] > found['changed', None, 'noise']
    # Whoever sees the clean image is as good as before, or hardly worse; held, it is still fooled.
    assert found['clean_image', None, 'attacked'] > found['clean_routing', None, 'attacked']
    assert found['held', None, 'attacked'] < accuracy['clean']
    for expert in range(4):
        assert found['alone', expert, 'attacked'] < found['alone', expert, 'clean']
    printed = capsys.readouterr().out
    assert f'{IMAGES} of {IMAGES} images of val; PGD, 3 steps, eps = 16/255 (16 of 255)' in printed
    (line,) = [x for x in printed.splitlines() if x.startswith('accuracy  ')]
    assert line.split()[1] == f'{accuracy["clean"]:.3f}'
    with pytest.raises(ConfigError, match=r"attack.json' exists; .* or use --overwrite"):
        attack_checkpoint(parse(argv(classifier, out)))


def test_each_batch_has_random_numbers_of_its_own(classifier, tmp_path, monkeypatch):
    """Whether a progress bar counts or, where no terminal is, does not."""
    add, seeds = Robustness.add, []

    def noted(self, x, labels, seed=0):
        seeds.append((len(x), seed))
        add(self, x, labels, seed)

    monkeypatch.setattr(Robustness, 'add', noted)
    small = ('--steps', '1', '--cfg-options', 'val_dataloader.batch_size=8')
    attack_checkpoint(parse(argv(classifier, tmp_path / 'attack.json', *small)))
    assert seeds == [(8, 0), (8, 8), (8, 16)]


def test_without_room_nothing_changes(classifier):
    """Held and other routings are then the model's own; and in the whole range nothing is left."""
    x, labels = images(classifier)
    for eps in (0, 1):
        robustness = Robustness(classifier[2], Attack('pgd', eps, 4))
        robustness.add(x, labels)
        found = by_name(robustness.rows())
        assert {what for what, _, _ in found} == set(TITLES)
        if eps:
            assert found['model', None, 'attacked'] == found['held', None, 'attacked'] == 0
            continue
        clean = found['model', None, 'clean']
        for (what, expert, _), value in found.items():
            if what == 'changed':
                assert value == 0
            elif what == 'alone':
                assert value == found[what, expert, 'clean']
            elif what != 'loss':
                assert value == clean
        assert len({value for (what, *_), value in found.items() if what == 'loss'}) == 1
        assert robustness.notes() == []


def test_pixels_are_those_that_the_model_is_tested_on(classifier):
    model = classifier[2]
    data = images_of(classifier[0])
    batch = next(data.batches())
    x, labels = images(classifier)
    assert torch.equal((255 * x).round().to(torch.uint8), batch['inputs'])
    assert labels.tolist() == [data.label(i) for i in range(IMAGES)]
    scores = torch.stack([sample.pred_score for sample in model.test_step(batch)])
    robustness = Robustness(model, Attack('pgd', 0, 1))
    torch.testing.assert_close(robustness.logits(x).softmax(1), scores)
    few, of_few = images(classifier, 7)
    chosen = drawn(IMAGES, 7)
    assert chosen != list(range(7))
    assert torch.equal(few, x[chosen])
    assert torch.equal(of_few, labels[chosen])
    assert MAX_BATCH <= 128  # the toolbox predicts as many at once


def test_other_models(tmp_path, capsys):
    """A dense one has accuracies alone; a factorised layer chooses nobody, and it is said."""
    sparse = write_classifier(tmp_path, SPARSE, IMAGES, steps=1)[0].read_text()
    options = ('--eps', '0.1', '--steps', '1', '--max-images', '9')
    dense = tmp_path / 'dense.py'
    dense.write_text(
        sparse.replace('mmdet_moe.WithExperts', 'ImageClassifier')
        .replace(" of='ImageClassifier',", '')
        .replace(f"    experts=[dict(at='head.fc', {SPARSE})],\n", '')
    )
    factorised = tmp_path / 'factorised.py'
    text = FACTORISED.format(kind='CPMuMoE', experts=3, rank=4, activation='softmax')
    factorised.write_text(sparse.replace(SPARSE, text))
    two = tmp_path / 'two.py'
    stage = "dict(at='backbone.layer4', num_experts=2, top_k=1), "
    two.write_text(sparse.replace('experts=[', f'experts=[{stage}'))
    expected = {dense: [None], factorised: [None], two: [None, 'backbone.layer4', 'head.fc', 'all']}
    for path, layers in expected.items():
        cfg = load_config(str(path))
        model = MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
        torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
        arguments = argv((path, tmp_path / 'model.pth', None), tmp_path / f'{path.stem}.json')
        rows = attack_checkpoint(parse([*arguments, *options]))['rows']
        assert [name for name, _ in groupby(row['layer'] for row in rows)] == layers
        assert [row['what'] for row in rows if row['layer'] is None] == ['model', 'loss']
        said = 'note: layer head.fc is left out: it chooses nobody' in capsys.readouterr().out
        assert said == (path == factorised)


class NoScores(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change, self.head = model, change, nn.Identity()
        self.data_preprocessor = model.data_preprocessor

    def forward(self, x, mode):
        y = self.model(x, mode=mode)
        return self.change(y) if mode == 'tensor' else y


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda y: (y,), "Identity: with mode='tensor' the model gives no scores of classes"),
        (torch.neg, 'Identity predicts other classes than those with the largest scores'),
        (torch.detach, 'no gradient reaches the images'),
    ],
)
def test_models_that_cannot_be_attacked(classifier, change, message):
    with pytest.raises(ConfigError, match=message):
        Robustness(NoScores(classifier[2], change), Attack('pgd', 0.1, 1)).add(*images(classifier))


def test_signs_of_masked_gradients(classifier, monkeypatch):
    """Scores that are rounded have no gradient; noise finds what the attack does not."""
    x, labels = images(classifier)
    robustness = Robustness(classifier[2], Attack('pgd', 0.5, 1))
    smooth = robustness.logits
    monkeypatch.setattr(robustness, 'logits', lambda x: smooth(x).round().detach() + 0 * smooth(x))
    monkeypatch.setattr(robustness, '_attacked', lambda x, labels, seed: x)
    monkeypatch.setattr(robustness, '_begin', lambda x, labels: None)
    robustness._layers = {}
    robustness.add(x, labels)
    blind, missed = robustness.notes()
    assert blind.startswith('note: 100.0% of the images have no gradient at all')
    assert missed.endswith('in which the attack does not: take more --steps')


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (('--eps', '8'), '--eps=8 must lie in 0..1'),
        (('--eps', 'much'), '--eps=much must be a number or a fraction, such as 8/255'),
        (('--eps', '1/0'), '--eps=1/0 must be a number or a fraction'),
        (('--steps', '0'), '--steps=0 must be at least 1'),
        (('--max-images', '0'), '--max-images=0 must be at least 1'),
    ],
)
def test_mistakes(classifier, tmp_path, more, message, capsys):
    arguments = parse(argv(classifier, tmp_path / 'attack.json', *more))
    with pytest.raises(SystemExit) as exit_:
        measuring.run_tool(attack_checkpoint, arguments)
    assert exit_.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    assert re.search(message, line)
    assert not list(tmp_path.iterdir())


def test_a_detector_is_refused(tmp_path, digit_scenes_folder):
    tool = Tool(tmp_path, DETECTOR, digit_scenes_folder)
    with pytest.raises(ConfigError, match=r'^RetinaNet is no classifier of MMPretrain'):
        attack_checkpoint(parse(tool.argv(tmp_path / 'attack.json')))


class Data:
    """A data set that gives one batch."""

    loader_cfg = {}

    def __init__(self, inputs, label):
        self.inputs, self.label = inputs, label

    def __len__(self):
        return 2

    def batches(self, **_):
        samples = [DataSample() for _ in range(2)]
        for sample in samples if self.label is not None else ():
            sample.set_gt_label(self.label)
        yield {'inputs': self.inputs, 'data_samples': samples}


def pixels(*shape):
    return torch.full(shape, 51, dtype=torch.uint8)


@pytest.mark.parametrize(
    ('inputs', 'label', 'message'),
    [
        (torch.zeros(2, 1, 4, 4), 1, r'gives torch.float32 instead of pixels in 0..255 \(uint8\)'),
        ([pixels(1, 4, 4), pixels(1, 5, 4)], 1, 'images of several sizes'),
        (pixels(2, 1, 4, 4), [0, 1], 'only images of one class each'),
        (pixels(2, 1, 4, 4), None, 'only images of one class each'),
    ],
)
def test_data_that_cannot_be_attacked(inputs, label, message):
    with pytest.raises(ConfigError, match=message):
        next(_batches(Data(inputs, label), torch.device('cpu')))


def test_images_that_are_not_collated():
    ((x, labels),) = _batches(Data([pixels(1, 4, 4)] * 2, 1), torch.device('cpu'))
    assert torch.equal(x, torch.full((2, 1, 4, 4), 0.2))
    assert labels.tolist() == [1, 1]


def test_default_file():
    with pytest.raises(ConfigError, match='--out: say where to, for the checkpoint is an address'):
        attack_checkpoint(parse(['c.py', 'https://host/b.pth']))
    assert parse(['c.py', 'a/b.pth', '--attack', 'apgd']).out == Path('a/attack_apgd_b_val.json')


def test_changed_decisions():
    """Two images with two decisions each; the order of the chosen does not matter, a 0 does."""

    def routing(ids, weights):
        return Routing(
            torch.tensor(ids), torch.tensor(weights), torch.zeros(4, 3), (4,), num_images=2
        )

    half = [[0.5, 0.5]] * 4
    before = [routing([[0, 1], [0, 1], [0, 1], [0, 1]], half)]
    assert changed(before, before).tolist() == [0, 0]
    after = [routing([[1, 0], [0, 2], [0, 1], [0, 1]], [*half[:3], [1.0, 0.0]])]
    assert changed(before, after).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(('wrong', 'count'), [(0, 10), (3, 10), (250, 500), (500, 500)])
def test_intervals(wrong, count):
    ends = binomtest(wrong, count).proportion_ci(method='wilson')
    assert wilson(wrong / count, count) == pytest.approx([ends.low, ends.high])


def test_table():
    entry = {'mean': 0.25, 'interval': [0.1, 0.5], 'images': 8}
    rows = [
        {'what': 'model', 'layer': None, 'expert': None, **dict.fromkeys(COLUMNS, entry)},
        {'what': 'alone', 'layer': 'a.b', 'expert': 3, **dict.fromkeys(COLUMNS)},
        {'what': 'held', 'layer': 'all', 'expert': None, **dict.fromkeys(COLUMNS)},
    ]
    assert table(rows) == [
        ('', 'clean', 'noise', 'attacked'),
        ('accuracy', *['0.250 (0.100 to 0.500)'] * 3),
        ('layer a.b', '', '', ''),
        ('accuracy of expert 3 alone, attacked itself', '-', '-', '-'),
        ('all layers together', '', '', ''),
        ('accuracy, attacked with the routing held', '-', '-', '-'),
    ]
