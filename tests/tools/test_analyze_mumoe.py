"""``analyze_experts.py`` on classifiers whose head holds experts, against what is done by hand."""

import base64
import copy
import csv
import json
import zlib

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tiny_classifiers import FACTORISED, SPARSE, write_classifier
from torch import nn

from mmdet_moe.analysis import command, study
from mmdet_moe.analysis.report.verdict import spoken
from mmdet_moe.analysis.statistics import summary
from mmdet_moe.moe import MoELayer

IMAGES, CLASSES, LAYER = 100, 10, 'head.fc'
KINDS = {
    'sparse': SPARSE,
    'cp': FACTORISED.format(kind='CPMuMoE', experts=5, rank=12, activation='entmax15'),
    'levels': FACTORISED.format(kind='TRMuMoE', experts='(2, 3)', rank=4, activation='softmax'),
    'many': FACTORISED.format(kind='CPMuMoE', experts=100, rank=12, activation='entmax15'),
}


def unpack(packed):
    content = zlib.decompress(base64.b64decode(packed['data']))
    return np.frombuffer(content, packed['dtype']).reshape(packed['shape'])


class Run:
    """A classifier and its analysis."""

    def __init__(self, folder, kind):
        config, checkpoint, self.model = write_classifier(
            folder, KINDS[kind], IMAGES, noise=4 if kind == 'sparse' else 1
        )
        self.out, self.argv = folder / 'out', [str(config), str(checkpoint), '--device', 'cpu']
        self.kind, self.cfg = kind, Config.fromfile(config)
        batches = Runner.build_dataloader(self.cfg.val_dataloader)
        self.batches = [self.model.data_preprocessor(batch) for batch in batches]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, 'write_figures', lambda *_: None)  # takes the most time
            patch.setattr(summary.summarise, '__defaults__', (19,))
            self.experts = self(self.out)
        self.layer = self.experts['layers'][LAYER]

    def __call__(self, out):
        return command.analyse(command.parse([*self.argv, '--out', str(out)]))

    @torch.no_grad()
    def predict(self, model):
        """Classes that a model says, and the true ones."""
        found, truth = [], []
        for data in self.batches:
            for sample in model(**data, mode='predict'):
                found.append(int(sample.pred_score.argmax()))
                truth.append(int(sample.gt_label))
        return np.array(found), np.array(truth)

    @torch.no_grad()
    def coefficients(self):
        """(images, E), as the layer itself tells them."""
        layer, told = self.model.head.fc, []
        handle = layer.observe(lambda routing, _: told.append(routing.dense_weights()))
        self.predict(self.model)
        handle.remove()
        return torch.cat(told).numpy()


@pytest.fixture(scope='module', params=['sparse', 'cp', 'levels'])
def run(request, tmp_path_factory):
    torch.manual_seed(0)
    return Run(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    torch.manual_seed(0)
    return Run(tmp_path_factory.mktemp('many'), 'many')


def zeroed(model, kind, expert):
    """A copy of the model in whose weights the expert is 0."""
    model = copy.deepcopy(model)
    layer = model.head.fc
    if kind == 'sparse':
        for stacked in layer.experts.parameters():
            stacked.data[expert] = 0
    elif kind == 'cp':
        layer.experts.factors[0].data[expert] = 0
    else:  # in the whole tensor: of several levels no factor is one expert's alone
        weights = layer.experts.materialise().detach().flatten(end_dim=-3).clone()
        weights[expert] = 0

        def mix(x, coefficients):
            joint = (coefficients[0][:, :, None] * coefficients[1][:, None]).flatten(1)
            rows = torch.cat([x, x.new_ones(len(x), 1)], 1)
            return torch.einsum('tn,ti,nio->to', joint, rows, weights)

        layer.mix = mix
    return model


def test_polysemanticity_is_that_of_weights_set_to_zero(run):
    found = run.layer['polysemanticity']
    before, truth = run.predict(run.model)

    def accuracies(predicted):
        return np.array([(predicted[truth == c] == c).mean() for c in range(CLASSES)])

    usual, values = accuracies(before), []
    assert usual.mean() > 0.2
    for expert in range(run.layer['num_experts']):
        after = accuracies(run.predict(zeroed(run.model, run.kind, expert))[0])
        drops = [max(0, a - b) for a, b in zip(usual, after, strict=True)]
        most = max(drops)
        value = None
        if most > 0:
            hit = drops.index(most)
            squares = [(d / most - (c == hit)) ** 2 for c, d in enumerate(drops)]
            value = sum(squares) ** 0.5
            values.append(value)
            assert found['classes'][expert] == run.experts['run']['classes'][hit]
        assert found['values'][expert] == (None if value is None else pytest.approx(value))
        assert found['drops'][expert] == pytest.approx(most)
    assert values
    assert found['num_mattering'] == len(values)
    assert found['mean'] == pytest.approx(np.mean(values))
    with (run.out / 'tables' / 'polysemanticity.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [float(row['drop']) for row in rows] == found['drops']
    assert any(
        'class-level polysemanticity' in line for line in spoken(run.experts['verdict'], True)
    )


def test_kinds_of_interventions(run):
    kinds = {entry['kind'] for entry in run.experts['interventions']}
    sparse = run.kind == 'sparse'
    assert kinds == {'only', 'equal', 'random', 'zeroed'} | ({'without'} if sparse else set())
    assert run.layer['kind'] == ('sparse' if sparse else 'factorised')


def test_tables_are_of_the_coefficients(run):
    weights = run.coefficients()
    _, truth = run.predict(run.model)
    table = run.layer['associations']['objects']['class']
    expected = [weights[truth == c].sum(0) for c in range(CLASSES)]
    np.testing.assert_allclose(table['counts'], expected, atol=1e-5)
    np.testing.assert_allclose(run.layer['importance'], weights.mean(0), atol=1e-6)
    np.testing.assert_allclose(run.layer['active_share'], (weights > 0).mean(0))
    assert run.layer['coactivation_experts'] == list(range(weights.shape[1]))


def test_features_are_computed_once(run, tmp_path, monkeypatch):
    """With all interventions, and the predictions are those without sharing."""
    monkeypatch.setattr(command, 'write_results', lambda *_: None)
    monkeypatch.setattr(summary.summarise, '__defaults__', (1,))
    calls, found, backbone = [], [], type(run.model.backbone)
    usual = backbone.forward
    monkeypatch.setattr(backbone, 'forward', lambda self, x: calls.append(x) or usual(self, x))
    for is_in_head in (study._is_in_head, lambda name: False):
        monkeypatch.setattr(study, '_is_in_head', is_in_head)
        found.append(run(tmp_path / str(len(found)))['interventions'])
        calls.append(None)
    metrics = [[i['metrics'] for i in made] for made in (*found, run.experts['interventions'])]
    assert metrics[0] == metrics[1] == metrics[2]
    end = next(i for i, call in enumerate(calls) if call is None)
    once, many = calls[:end], calls[end + 1 : -1]
    batches = IMAGES // 50
    # To find out what is left out; statistics; interventions; every fourth image, to compare the
    # experts.
    assert len(once) == 1 + 2 * batches + 1
    assert len(many) == 1 + batches * (1 + len(found[0])) + 1


def test_features_that_the_head_changes_are_computed_again(run):
    class InPlace(nn.Module):
        def forward(self, feats):
            return run.model.head.fc(feats[-1].relu_().mul_(0.5))

    x = torch.rand(2, 1, 28, 28)
    features = study._Features(run.model, x)
    with torch.no_grad():
        expected = [InPlace()(run.model.extract_feat(x)) for _ in range(2)]
        found = [InPlace()(features(x)) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], expected[0])


def test_explorer_has_the_images_of_the_largest_coefficients(run, many):
    for one in (run, many):
        payload = json.loads((one.out / 'explorer.json').read_text())
        layer = payload['layers'][LAYER]
        weights = one.coefficients()
        shown = layer.get('experts', list(range(weights.shape[1])))
        packed = unpack(payload['columns']['weights'][LAYER])
        fine = packed.dtype == np.uint16
        steps = packed / (254 * 257 if fine else 254)
        # What is above 0 is at least a step.
        step = 1 / (254 * 257) if fine else 1 / 254
        np.testing.assert_allclose(steps, weights[:, shown], atol=1.001 * step, rtol=1e-5)
        assert ((steps > 0) == (weights[:, shown] > 0)).all()
        stored = unpack(payload['pool']['rows'])
        for place, expert in enumerate(shown):
            if (weights[:, expert] > 0).any():
                assert weights[:, expert].argmax() in stored or (
                    # Equal within a step of what travels: any of them will do.
                    steps[stored, place].max() == steps[:, place].max()
                )


def test_many_experts(many, tmp_path):
    """All are zeroed and counted; pictures and page show those with the most weight."""
    assert many.layer['num_experts'] == len(many.layer['load']) == 100
    assert many.layer['polysemanticity']['num_zeroed'] == 100
    shown = many.layer['coactivation_experts']
    importance = np.array(many.layer['importance'])
    assert len(shown) == 64
    assert importance[shown].min() >= np.delete(importance, shown).max()
    assert np.shape(many.layer['coactivation']) == (64, 64)
    kinds = [entry['kind'] for entry in many.experts['interventions']]
    assert kinds == ['equal', 'random'] + ['zeroed'] * 100
    payload = json.loads((many.out / 'explorer.json').read_text())
    assert payload['layers'][LAYER]['experts'] == shown
    assert '64 of 100 experts' in payload['layers'][LAYER]['left_out']
    assert len(payload['interventions']) == 2 + 16


def test_who_is_zeroed_outside_of_a_head(many, monkeypatch):
    """Where every expert costs a whole forward pass, those with the most weight are."""
    monkeypatch.setattr(study, '_is_in_head', lambda name: False)
    args = command.parse([*many.argv, '--out', str(many.out)])
    found = command.prepare(args, many.cfg).interventions
    zeroed = [entry.expert for entry in found if entry.kind == 'zeroed']
    weight = many.coefficients().mean(0)
    assert zeroed == sorted(zeroed)
    assert set(zeroed) == set(np.argsort(-weight, kind='stable')[: study.MANY_EXPERTS])


def test_sparse_layer_is_one(run):
    assert isinstance(run.model.head.fc, MoELayer) == (run.kind == 'sparse')
