"""The whole tool on a tiny RetinaNet and a tiny classifier."""

import copy
import errno
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_tools
import torch
from mmdet.models.detectors import SingleStageDetector
from mmengine.registry import MODELS, init_default_scope
from running import failure
from synthetic import information_of
from torch import nn

from mmdet_moe import cli
from mmdet_moe.analysis import command, study
from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.analysis.command import run_analysis
from mmdet_moe.analysis.data import AnalysisData, drawn
from mmdet_moe.analysis.recorder import Recorder
from mmdet_moe.analysis.records.contents import BoxRecords
from mmdet_moe.analysis.records.files import RecordFiles
from mmdet_moe.analysis.report import figures
from mmdet_moe.analysis.statistics import summary
from mmdet_moe.analysis.statistics.matching import CORRECT
from mmdet_moe.analysis.statistics.outcomes import outcomes_of
from mmdet_moe.analysis.statistics.similarity import mean_between
from mmdet_moe.errors import ConfigError

EXPERTS, LEVELS, IMAGES, BATCH, PER_FILE = 3, 5, 8, 2, 3
HALF = ('--max-images', '4')
ALIKE = ('cosine', 'cka')
THRESHOLD = 0.87  # about half of the tiny model's detections
LAYERS = ['bbox_head.cls_moe', 'bbox_head.reg_moe']
DETECTOR = f"""{tiny_tools.DETECTOR}
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(
    batch_size={BATCH}, num_workers=0, persistent_workers=False, dataset=dict(pipeline=pipeline)
)
test_dataloader = val_dataloader
"""
CLASSIFIER = """
default_scope = 'mmpretrain'
data_root = 'ROOT'
loader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='images',
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]),
)
train_dataloader = val_dataloader = test_dataloader = loader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.001))
visualizer = dict(type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdet_moe.MoEResNet', depth=18, stem_channels=8, base_channels=8,
                  out_indices=(3,), norm_eval=False, moe_stages=4, num_experts=3, top_k=2,
                  granularity='patch', grid_size=2),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=64,
              loss=dict(type='CrossEntropyLoss')),
)
"""


def save_checkpoint(config, path, seed=0, std=None):
    """Of a model with random weights, routers that choose by what they see, scores around 0.5."""
    torch.manual_seed(seed)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        if '.router.fc' in name:
            nn.init.normal_(parameter, 0, 2.0 if parameter.dim() > 1 else 0.1)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, 0, (0.05 if 'retina_reg' in name else 1) * fan_in**-0.5)
        elif 'retina' in name:
            nn.init.zeros_(parameter)
    torch.save({'state_dict': model.state_dict()}, path)
    return model.eval()


class Tool:
    """A config and its checkpoint, and how the tool is run on them."""

    def __init__(self, folder, text, data_root, seed=0):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.config = folder / 'tiny.py'
        self.config.write_text(text)
        self.checkpoint = folder / 'tiny.pth'
        self.options = [f'data_root={data_root}']
        self.data_root = data_root
        self.model = save_checkpoint(self.read(), self.checkpoint, seed)

    def read(self):
        options = dict(option.split('=') for option in self.options)
        return cli.load_config(str(self.config), options)

    def argv(self, out, *arguments, checkpoint=None, options=()):
        return [
            str(self.config), str(checkpoint or self.checkpoint), '--out', str(out),
            '--device', 'cpu', '--score-thr', str(THRESHOLD), *arguments,
            '--cfg-options', *self.options, *options,
        ]  # fmt: skip

    def __call__(self, out, *arguments, **kwargs):
        run_analysis(self.argv(out, *arguments, **kwargs))
        return json.loads((Path(out) / 'experts.json').read_text())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figures, few permutations, files of few images."""
    _make_quick(monkeypatch)


def _make_quick(monkeypatch):
    monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)
    monkeypatch.setattr(command, 'write_figures', lambda *_: None)
    monkeypatch.setattr(study, 'IMAGES_PER_FILE', PER_FILE)
    monkeypatch.setattr(summary.summarise, '__defaults__', (19,))


@pytest.fixture(scope='module')
def detector(tmp_path_factory, digit_scenes_folder):
    return Tool(tmp_path_factory.mktemp('detector'), DETECTOR, digit_scenes_folder)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classifier')
    rng = np.random.default_rng(0)
    for i in range(7):
        images = folder / 'data' / 'images' / 'ab'[i % 2]
        images.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(images / f'{i}.png'), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    return Tool(folder, CLASSIFIER.replace('ROOT', str(folder / 'data')), folder / 'data')


def _finish(tool, out):
    with pytest.MonkeyPatch.context() as monkeypatch:
        _make_quick(monkeypatch)
        tool(out)
    return out


@pytest.fixture(scope='module')
def finished(detector):
    """The folder of an uninterrupted run; not to be changed."""
    return _finish(detector, detector.folder / 'finished')


@pytest.fixture(scope='module')
def finished_half(detector):
    """Four images, two files of records."""
    out = detector.folder / 'half'
    with pytest.MonkeyPatch.context() as monkeypatch:
        _make_quick(monkeypatch)
        detector(out, *HALF)
    return out


@pytest.fixture(scope='module')
def finished_classifier(classifier):
    return _finish(classifier, classifier.folder / 'finished')


def content(out):
    return (Path(out) / 'experts.json').read_bytes()


def files_in(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()
    }


# Results ------------------------------------------------------------------------------------------


def check_association(table, experts, total=None):
    numbers = {
        *('mi', 'chance', 'interval', 'p_value', 'p_adjusted', 'permutations', 'num_units'),
        *('num_images', 'mi_max'),
    }
    assert set(table['given']) <= {'level', 'class'}
    assert {'edges', 'unit'} <= set(table)
    for found in (table, *table['given'].values()):
        assert numbers <= set(found)
        assert found['permutations'] == 19
        assert 0 <= found['mi'] <= found['mi_max'] + 1e-9
        assert 1 / 20 <= found['p_value'] <= found['p_adjusted'] <= 1
        assert 0 <= found['interval'][0] <= found['interval'][1]
        assert found['num_images'] <= found['num_units']
    counts = np.array(table['counts'])
    assert counts.shape == (len(table['bins']), experts)
    assert len(set(table['bins'])) == len(table['bins'])
    if total is not None:
        assert counts.sum() == pytest.approx(total)
    for key, axis in (('bin_given_expert', 0), ('expert_given_bin', 1)):
        share = np.array(table[key])
        sums = counts.sum(axis, keepdims=True)
        expected = np.divide(counts, sums, out=np.zeros_like(counts), where=sums > 0)
        np.testing.assert_allclose(share, expected, atol=1e-12)


def check_controls(table, attribute, task):
    """Of each draw, and their means; the level is a control where there are several."""
    if not table['num_units']:
        assert 'controls' not in table
        return
    controls = table['controls']
    assert set(controls) == ({'random', 'level'} if task == 'detection' else {'random'})
    random = controls['random']
    assert random['mi'] == pytest.approx(np.mean(random['draws']))
    assert all(0 <= mi <= np.log(EXPERTS) for mi in random['draws'])
    if task == 'detection':
        # Where all things are on one level, there is none to be given.
        assert set(random['given']) <= ({'level'} if attribute != 'level' else set())
        for name, value in random['given'].items():
            assert value == pytest.approx(np.mean(random['draws_given'][name]))
            assert controls['level']['given'][name] == pytest.approx(0, abs=1e-6)


def check_schema(experts, task):
    assert list(experts)[:2] == ['schema', 'version']
    assert (experts['schema'], experts['version']) == ('mmdet_moe.experts', 4)
    assert set(experts) == {
        'schema', 'version', 'run', 'metrics', 'metrics_interval', 'layers', 'interventions',
        'history', 'flows', 'stability', 'verdict',
    }  # fmt: skip
    run = experts['run']
    assert set(run) == {
        'config', 'checkpoint', 'task', 'split', 'num_images', 'images', 'num_objects',
        'num_detections', 'score_thr', 'classes', 'superclasses', 'num_levels',
    }  # fmt: skip
    assert (run['task'], run['config'], run['checkpoint']) == (task, 'tiny', 'tiny.pth')
    names = {'AP', 'AP50', 'AP small', 'AP medium', 'AP large'}
    names = names if task == 'detection' else {'accuracy'}
    for metrics in [experts['metrics'], *(i['metrics'] for i in experts['interventions'])]:
        assert set(metrics) == {*names, 'per_class'}
        assert list(metrics['per_class']) == run['classes']
    assert set(experts['metrics_interval']) == names
    for ends in filter(None, experts['metrics_interval'].values()):
        assert 0 <= ends[0] <= ends[1] <= 1
    for intervention in experts['interventions']:
        for name, known in intervention['difference'].items():
            change = intervention['metrics'][name] - experts['metrics'][name]
            assert known['value'] == change
            if run['num_images'] < 5:
                assert known['interval'] is None
            else:
                assert known['interval'][0] <= known['interval'][1]
    for layer in experts['layers'].values():
        experts_ = layer['num_experts']
        assert layer['kind'] == 'sparse'
        assert len(layer['load']) == len(layer['importance']) == experts_
        assert np.diag(layer['coactivation']).tolist() == layer['active_share']
        assert layer['coactivation_experts'] == list(range(experts_))
        hangs = layer['polysemanticity']
        assert hangs['num_zeroed'] == len(hangs['values']) == len(hangs['drops']) == experts_
        assert hangs['num_mattering'] == sum(value is not None for value in hangs['values'])
        assert set(hangs['classes']) <= {None, *run['classes']}
        assert sum(layer['load']) == pytest.approx(1)
        assert sum(layer['importance']) == pytest.approx(1)
        for key in ('load_cv2', 'usage_entropy', 'decision_entropy', 'mi_input'):
            assert layer[key] >= 0
        assert isinstance(layer['collapsed'], bool)
        assert set(layer['associations']) <= {'decisions', 'objects', 'detections'}
        for tables in layer['associations'].values():
            for table in tables.values():
                check_association(table, experts_)
            for attribute, table in tables.items():
                check_controls(table, attribute, task)
        similarity = layer['similarity']
        for matrix in (similarity['weights']['cosine'], *map(similarity['outputs'].get, ALIKE)):
            assert np.array(matrix).shape == (experts_, experts_)
            np.testing.assert_allclose(np.diag(matrix), 1)
        assert np.array(similarity['linkage']).shape == (experts_ - 1, 4)
        assert similarity['outputs']['num_examples'] > 50
        assert (similarity['reason'], similarity['training']) == (None, None)
    said = {entry['layer']: entry for entry in experts['verdict']}
    assert said.keys() == {*experts['layers'], None}
    for entry in said.values():
        assert entry['name']
        assert all(isinstance(sentence, str) for sentence in entry['lines'] + entry['details'])
    assert all(1 <= len(said[layer]['lines']) <= 3 for layer in experts['layers'])


def test_schema(detector, finished):
    experts = json.loads(content(finished))
    check_schema(experts, 'detection')
    run = experts['run']
    annotations = json.loads(
        (detector.data_root / 'annotations' / 'instances_val2017.json').read_text()
    )
    assert run['num_images'] == IMAGES
    assert run['num_objects'] == len(annotations['annotations'])
    assert (run['split'], run['score_thr'], run['num_levels']) == ('val', THRESHOLD, LEVELS)
    assert run['classes'] == list('0123456789')
    assert list(experts['layers']) == LAYERS
    for layer in experts['layers'].values():
        assert (layer['num_experts'], layer['top_k'], layer['granularity']) == (3, 2, 'image')
        assert layer['num_decisions'] == IMAGES * LEVELS
        objects = layer['associations']['objects']
        for name in ('class', 'size', 'size_coco', 'position', 'level'):
            check_association(objects[name], EXPERTS)
            # Training leaves an object without anchors if its best ones are better for another.
            total = np.array(objects[name]['counts']).sum()
            assert run['num_objects'] - 1.001 <= total <= run['num_objects'] + 0.001
    kinds = [(i['layer'], i['kind'], i['expert']) for i in experts['interventions']]
    assert len(kinds) == len(set(kinds)) == 2 * (3 * EXPERTS + 2) + 2
    assert {i['metrics']['AP'] for i in experts['interventions']} != {experts['metrics']['AP']}
    for name in ('experts.json', 'explorer.json', 'report.html'):
        assert (finished / name).stat().st_size > 0
    assert list((finished / 'tables').glob('*.csv'))
    assert not list(finished.rglob('*.tmp'))


def test_figures(detector, tmp_path, monkeypatch, request):
    """The one run with figures, all drawn and, without --all, every sixth written.

    Few images, no interventions.
    """
    draw, step = figures.draw_figures, 1 if request.config.getoption('--all') else 6
    monkeypatch.setattr(figures, 'draw_figures', lambda experts: [*draw(experts)][::step])
    monkeypatch.setattr(command, 'write_figures', figures.write_figures)
    detector(tmp_path / 'out', '--no-interventions', '--max-images', '4')
    paths = [path for path in (tmp_path / 'out' / 'figures').rglob('*') if path.is_file()]
    assert {path.parent.name for path in paths} == set(LAYERS)
    assert {path.suffix for path in paths} == {'.png', '.pdf'}
    assert all(path.stat().st_size > 1000 for path in paths)


def test_ap_is_that_of_the_test_tool(detector, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(detector.config), str(detector.checkpoint), '--work-dir', str(tmp_path / 'w')]
    cli.run_test([*argv, '--cfg-options', *detector.options, 'test_evaluator.classwise=True'])
    found = json.loads(next((tmp_path / 'w').glob('*/*.json')).read_text())
    metrics = json.loads(content(finished))['metrics']
    assert metrics['AP'] > 0
    for name, key in (
        ('AP', 'mAP'), ('AP50', 'mAP_50'), ('AP small', 'mAP_s'), ('AP medium', 'mAP_m'),
        ('AP large', 'mAP_l'),
    ):  # fmt: skip
        value = found[f'coco/bbox_{key}']
        assert (-1 if metrics[name] is None else metrics[name]) == pytest.approx(value, abs=6e-4)
    for name, value in metrics['per_class'].items():
        expected = found[f'coco/{name}_precision']
        assert (math.nan if value is None else value) == pytest.approx(
            expected, abs=6e-4, nan_ok=True
        )


def loops(detector, images=range(IMAGES), threshold=THRESHOLD):
    """Every image by itself: what is found, with the weights behind it, as lists of rows."""
    cfg = detector.read()
    init_default_scope('mmdet')
    data = AnalysisData(cfg, 'val')
    model = copy.deepcopy(detector.model)
    annotations = json.loads(
        (detector.data_root / 'annotations' / 'instances_val2017.json').read_text()
    )
    rows = {name: {'decisions': [], 'objects': [], 'detections': []} for name in LAYERS}
    count = 0
    with Tracer(model) as tracer:
        for index in images:
            sample = data.dataset[index]
            batch = {'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]}
            (result,) = tracer.predict(batch)
            truth = [a for a in annotations['annotations'] if a['image_id'] == result.img_id]
            boxes = [[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in truth)]
            labels = [a['category_id'] - min(c['id'] for c in annotations['categories'])
                      for a in truth]  # fmt: skip
            height, width = result.ori_shape
            found = result.pred_instances
            shown = [d for d in range(len(found)) if found.scores[d] >= threshold]
            count += len(shown)
            places = tracer.detection_places(0, found)
            held, owner = tracer.object_places(
                0, result.metainfo, torch.tensor(boxes).reshape(-1, 4).float()
            )
            for name in LAYERS:
                decisions = tracer.decisions(name, 1)
                weights = decisions.weights.double().numpy()
                for level in range(LEVELS):
                    rows[name]['decisions'].append((index, level, 1.0, weights[level], None))
                for d in shown:
                    box, level = found.bboxes[d].tolist(), places.level[d].item()
                    rows[name]['detections'].append(
                        (index, level, 1.0, weights[level], (box, found.labels[d].item(), height,
                                                            width))
                    )  # fmt: skip
                for j, box in enumerate(boxes):
                    levels = held.level[owner == j].tolist()
                    for level in levels:
                        rows[name]['objects'].append(
                            (index, level, 1 / len(levels), weights[level],
                             (box, labels[j], height, width))
                        )  # fmt: skip
    return rows, count


def bin_of(attribute, row, edges):
    _, level, _, _, thing = row
    if attribute == 'level':
        return level
    box, label, height, width = thing
    size = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    if attribute == 'class':
        return label
    if attribute == 'size_coco':
        return (size >= 32) + (size >= 96)
    if attribute == 'size':
        return sum(size >= edge for edge in edges[1:-1])
    x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    return 3 * min(int(3 * y), 2) + min(int(3 * x), 2)


def test_statistics_are_those_of_loops_over_the_images(detector, finished):
    experts = json.loads(content(finished))
    rows, count = loops(detector)
    assert experts['run']['num_detections'] == count > 0
    for name in LAYERS:
        layer = experts['layers'][name]
        weights = np.array([row[3] for row in rows[name]['decisions']])
        chosen = weights > 0
        np.testing.assert_allclose(layer['load'], chosen.sum(0) / chosen.sum())
        np.testing.assert_allclose(layer['importance'], weights.mean(0), atol=1e-6)
        together = [[np.mean(chosen[:, a] & chosen[:, b]) for b in range(3)] for a in range(3)]
        np.testing.assert_allclose(layer['coactivation'], together)
        for source, attributes in (
            ('decisions', ('level',)),
            ('objects', ('class', 'size', 'size_coco', 'position', 'level')),
            ('detections', ('class', 'size', 'size_coco', 'position', 'level')),
        ):
            mine = rows[name][source]
            assert len(mine) > 1
            units = len({row[:2] for row in mine})
            for attribute in attributes:
                table = layer['associations'][source][attribute]
                counts = np.zeros((len(table['bins']), EXPERTS))
                for row in mine:
                    counts[bin_of(attribute, row, table['edges'])] += row[2] * row[3]
                np.testing.assert_allclose(table['counts'], counts, atol=1e-5)
                assert table['mi'] == pytest.approx(information_of(counts), abs=1e-6)
                assert table['num_units'] == units
                assert table['num_images'] == len({row[0] for row in mine})
                if 'level' not in table['given']:
                    continue
                expected = things = 0.0
                for level in range(LEVELS):
                    counts, of_image = np.zeros((len(table['bins']), EXPERTS)), Counter()
                    for row in mine:
                        if bin_of('level', row, None) == level:
                            counts[bin_of(attribute, row, table['edges'])] += row[2] * row[3]
                            of_image[row[0]] += row[2]
                    # Levels that live on fewer than five images are left out.
                    if counts.sum() ** 2 >= 5 * sum(v**2 for v in of_image.values()) > 0:
                        expected += counts.sum() * information_of(counts)
                        things += counts.sum()
                expected /= max(things, 1)
                left_out = 1 - things / sum(row[2] for row in mine)
                assert table['given']['level']['left_out'] == pytest.approx(left_out, abs=1e-6)
                assert table['given']['level']['mi'] == pytest.approx(expected, abs=1e-6)


def test_outcomes(detector, finished, monkeypatch):
    """Every object once and every detection once; what is said of them are the predictions."""
    kept = []
    monkeypatch.setattr(command, 'write_results', lambda study, *_: kept.append(study))
    monkeypatch.setattr(command, '_print_results', lambda *_: None)
    command.run_analysis(detector.argv(finished))
    records, layers = kept[0].records, list(kept[0].layers)
    outcomes = outcomes_of(records, layers, kept[0].score_thr)
    experts = json.loads(content(finished))
    is_object = ~outcomes.is_detection
    assert is_object.sum() == experts['run']['num_objects']
    assert (~is_object).sum() == experts['run']['num_detections']
    correct = outcomes.kind == CORRECT
    assert correct[is_object].sum() == correct[~is_object].sum() > 1
    assert (outcomes.true_label[correct] == outcomes.label[correct]).all()
    assert (outcomes.score[~is_object] >= THRESHOLD).all()
    rows, _ = loops(detector)
    for name in LAYERS:
        weights = outcomes.weights[name]
        assert weights.shape == (len(outcomes), EXPERTS)
        sums = weights.sum(1)
        known = ~np.isnan(sums)
        assert (~known).sum() <= 1
        np.testing.assert_allclose(sums[known], 1, atol=1e-5)
        # Objects: the mean over their anchors.
        for r in np.flatnonzero(is_object):
            mine = [
                row for row in rows[name]['objects']
                if row[0] == outcomes.image[r] and np.allclose(row[4][0], outcomes.box[r])
            ]  # fmt: skip
            if not mine:  # an object without anchors
                assert np.isnan(weights[r]).all()
                assert outcomes.level[r] == -1
                continue
            expected = sum(row[2] * row[3] for row in mine)
            np.testing.assert_allclose(weights[r], expected, atol=1e-5)
            levels = [row[1] for row in mine]
            assert levels.count(outcomes.level[r]) == max(map(levels.count, levels))


def test_interventions_are_those_of_a_changed_model(detector, finished):
    """One of each kind, by setting the router's bias in a copy of the model."""
    experts = json.loads(content(finished))
    found = {(i['layer'], i['kind'], i['expert']): i['metrics'] for i in experts['interventions']}
    cfg = detector.read()
    init_default_scope('mmdet')
    data = AnalysisData(cfg, 'val')
    from mmdet_moe.analysis.statistics.evaluation import DetectionMetrics

    metrics = DetectionMetrics(data, IMAGES)
    for key in (
        ('bbox_head.cls_moe', 'without', 1),
        ('bbox_head.reg_moe', 'only', 2),
        ('bbox_head.cls_moe', 'zeroed', 0),
    ):
        model = copy.deepcopy(detector.model)
        layer = model.get_submodule(key[0])
        if key[1] == 'only':
            for expert in layer.experts:
                expert.load_state_dict(detector.model.get_submodule(key[0]).experts[2].state_dict())
        elif key[1] == 'zeroed':
            for parameter in layer.experts.parameters_of(key[2]):
                nn.init.zeros_(parameter)
        else:
            layer.router.fc.bias.data[key[2]] = -1e6
        columns = []
        for first in range(0, IMAGES, BATCH):
            samples = [data.dataset[i] for i in range(first, first + BATCH)]
            batch = {k: [s[k] for s in samples] for k in ('inputs', 'data_samples')}
            for i, result in enumerate(model.test_step(batch)):
                p = result.pred_instances
                columns.append((np.full(len(p), first + i), p.bboxes, p.scores, p.labels))
        expected = metrics(BoxRecords(*(np.concatenate(c) for c in zip(*columns, strict=True))))
        for name in ('AP', 'AP50', 'AP small', 'AP medium'):
            assert found[key][name] == pytest.approx(expected[name], rel=1e-4)
        for name, value in expected['per_class'].items():
            value = None if value is None else pytest.approx(value, rel=1e-4)
            assert found[key]['per_class'][name] == value


# Interruptions ------------------------------------------------------------------------------------


def stop_at(monkeypatch, owner, name, call, error):
    """The given call of a method raises."""
    calls, before = [0], getattr(owner, name)

    def method(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise error
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return calls


@pytest.mark.parametrize(
    ('owner', 'name', 'call'),
    [
        (SingleStageDetector, 'predict', 1),
        (SingleStageDetector, 'predict', 2),  # in the second file of the statistics
        (SingleStageDetector, 'predict', 4),  # in the first file of the interventions
        (SingleStageDetector, 'predict', 30),
        (RecordFiles, 'write', 2),
        (RecordFiles, 'write', 4),
        (Recorder, 'take', 2),
    ],
)
def test_interrupted_run_goes_on(owner, name, call, detector, finished_half, tmp_path, capsys):
    out = tmp_path / 'out'
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, owner, name, call, KeyboardInterrupt())
        with pytest.raises(SystemExit) as exit_:
            detector(out, *HALF)
    assert exit_.value.code == 130
    assert f'goes on from here ({out})' in capsys.readouterr().out
    assert not (out / 'experts.json').exists()
    detector(out, *HALF)
    assert content(out) == content(finished_half)
    assert files_in(out / 'tables') == files_in(finished_half / 'tables')


def test_error_in_the_middle(detector, tmp_path):
    """What is no mistake of the user is raised; the records are as after an interruption."""
    out = tmp_path / 'out'
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, SingleStageDetector, 'predict', 4, ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            detector(out, '--no-interventions')
    with pytest.MonkeyPatch.context() as patch:
        calls = stop_at(patch, SingleStageDetector, 'predict', 0, None)
        experts = detector(out, '--no-interventions')
    assert calls == [2 + IMAGES // BATCH]  # the other half, and to compare the experts
    assert experts['run']['num_images'] == IMAGES


@pytest.mark.parametrize('damage', ['missing', 'truncated'])
def test_damaged_image_in_the_middle(damage, detector, tmp_path, capsys):
    """It is named, and the analysis goes on once it is mended."""
    root, out = tmp_path / 'data', tmp_path / 'out'
    shutil.copytree(detector.data_root, root)
    image = sorted((root / 'val2017').iterdir())[drawn(IMAGES, 4)[2]]
    arguments = (out, *HALF, '--no-interventions')
    kept = image.read_bytes()
    image.write_bytes(kept[:20])
    if damage == 'missing':
        image.unlink()
    sentence = failure(capsys, detector, *arguments, options=[f'data_root={root}'])
    assert sentence.startswith(f"cannot read the image '{image}': ")
    # Nothing before it is lost: the files of records end at the image.
    ends = [int(path.stem[9:]) for path in (out / 'records' / 'statistics').glob('*.npz')]
    assert max(ends) == 2
    first = next((out / 'records' / 'statistics').glob('*.npz'))
    written = first.stat().st_mtime_ns
    image.write_bytes(kept)
    mended = detector(*arguments, options=[f'data_root={root}'])
    assert first.stat().st_mtime_ns == written
    assert mended == detector(tmp_path / 'whole', *HALF, '--no-interventions')


def test_summary_that_was_cut_short(detector, finished_half, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(finished_half, out)
    (out / 'experts.json').unlink()
    for path in out.glob('report.html'):
        path.unlink()
    detector(out, *HALF)
    assert content(out) == content(finished_half)


def test_finished_run_does_not_run_the_model_again(detector, finished_half, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    shutil.copytree(finished_half, out)
    calls = stop_at(monkeypatch, SingleStageDetector, 'extract_feat', 0, None)
    calls_of_head = stop_at(monkeypatch, SingleStageDetector, 'predict', 0, None)
    detector(out, *HALF)
    assert (calls, calls_of_head) == ([0], [0])
    assert content(out) == content(finished_half)
    # Another threshold is another summary of the same predictions.
    experts = detector(out, *HALF, '--score-thr', '0.92')
    assert calls == [0]
    before = json.loads(content(finished_half))
    assert experts['run']['num_detections'] < before['run']['num_detections']
    assert experts['metrics'] == before['metrics']


def test_few_images_are_in_memory(detector, tmp_path, monkeypatch):
    sizes, before = [], Recorder.take

    def take(self):
        records = before(self)
        sizes.append(len(records.images.index))
        assert not self._parts
        return records

    monkeypatch.setattr(Recorder, 'take', take)
    detector(tmp_path / 'out', '--no-interventions')
    assert sum(sizes) == IMAGES
    assert max(sizes) <= PER_FILE
    for path in (tmp_path / 'out' / 'records').rglob('*.npz'):
        first, end = map(int, path.stem.split('-'))
        assert 0 < end - first <= PER_FILE


# Options ------------------------------------------------------------------------------------------


def test_some_images_only(detector, tmp_path):
    experts = detector(tmp_path / 'out', '--max-images', '3', '--no-interventions')
    rows, count = loops(detector, drawn(IMAGES, 3))
    assert (experts['run']['num_images'], experts['run']['images']) == (3, drawn(IMAGES, 3))
    assert experts['run']['num_detections'] == count
    assert experts['interventions'] == []
    layer = experts['layers'][LAYERS[0]]
    assert layer['num_decisions'] == 3 * LEVELS
    counts = sum(row[2] * row[3] for row in rows[LAYERS[0]]['objects'])
    found = np.array(layer['associations']['objects']['class']['counts']).sum(0)
    np.testing.assert_allclose(found, counts, atol=1e-5)
    # More than there are is all.
    experts = detector(tmp_path / 'all', '--max-images', '100', '--no-interventions')
    assert (experts['run']['num_images'], experts['run']['images']) == (IMAGES, None)


def test_interventions_can_follow_later(detector, finished_half, tmp_path):
    out = tmp_path / 'out'
    assert detector(out, '--no-interventions', *HALF)['interventions'] == []
    detector(out, *HALF)
    assert content(out) == content(finished_half)


def test_training_images(detector, tmp_path):
    experts = detector(tmp_path / 'out', '--split', 'train', '--no-interventions')
    annotations = json.loads(
        (detector.data_root / 'annotations' / 'instances_train2017.json').read_text()
    )
    assert experts['run']['split'] == 'train'
    assert experts['run']['num_images'] == len(annotations['images']) == 16
    assert experts['run']['num_objects'] == len(annotations['annotations'])


def test_comparison(detector, finished, tmp_path, capsys):
    out = tmp_path / 'out'
    detector(out, '--max-images', '3', '--no-interventions', '--compare', str(finished))
    assert (out / 'report.html').stat().st_size > (
        (out / 'explorer.json').stat().st_size + (finished / 'explorer.json').stat().st_size
    )
    matters = [
        layer['polysemanticity']['num_mattering']
        for layer in json.loads(content(finished))['layers'].values()
    ]
    assert (out / 'figures' / 'polysemanticity.png').exists() == any(matters)
    (same,) = json.loads(content(out))['stability']
    assert (same['run'], same['reason'], list(same['layers'])) == ('finished', None, LAYERS)
    for shares in same['layers'].values():  # the three images are the same ones
        assert (shares['num_decisions'], shares['changed']) == (3 * LEVELS, 0)
    before = files_in(tmp_path)
    (tmp_path / 'nothing').mkdir()
    for other in (tmp_path / 'nothing', tmp_path / 'missing', detector.config):
        sentence = failure(capsys, detector, tmp_path / 'new', '--compare', str(other))
        assert str(other) in sentence
    assert files_in(tmp_path) == before
    # The second one, of which no report is read.
    old = {**json.loads(content(finished)), 'version': 3}
    (tmp_path / 'nothing' / 'experts.json').write_text(json.dumps(old))
    two = ('--compare', str(finished), '--compare', str(tmp_path / 'nothing'))
    assert 'has version 3' in failure(capsys, detector, tmp_path / 'new', *two)
    assert not (tmp_path / 'new').exists()


def test_two_checkpoints_of_a_training(detector, finished, tmp_path, capsys):
    """Who decides otherwise, and how alike the weights are in each."""
    work = tmp_path / 'work'
    work.mkdir()
    shutil.copy(detector.checkpoint, work / 'iter_20.pth')
    save_checkpoint(detector.read(), work / 'iter_3.pth', seed=1)
    arguments = ('--no-interventions', '--over-training', '--compare', str(finished))
    experts = detector(tmp_path / 'out', *arguments, checkpoint=work / 'iter_3.pth')
    (other,) = experts['stability']
    (other_images,) = detector(
        tmp_path / 'train', '--no-interventions', '--split', 'train', '--compare', str(finished)
    )['stability']
    assert other_images['reason'] == 'it is of another data set'
    for number, name in enumerate(LAYERS):
        main = []
        for folder in (finished, tmp_path / 'out'):
            found = {}
            for file in (folder / 'records' / 'statistics').glob('*.npz'):
                arrays = np.load(file)
                units, weights = (
                    arrays[f'layers/{number}/decisions/{key}'] for key in ('unit', 'weights')
                )
                found |= dict(zip(units.tolist(), weights.argmax(1).tolist(), strict=True))
            main.append(found)
        changed = np.mean([main[0][unit] != expert for unit, expert in main[1].items()])
        assert other['layers'][name]['changed'] == pytest.approx(changed)
        assert changed > 0
        assert len(main[0]) == other['layers'][name]['num_decisions']
        (said,) = [entry for entry in experts['verdict'] if entry['layer'] == name]
        assert any(s.startswith('against finished, ') for s in said['details'])
        similarity = experts['layers'][name]['similarity']
        training = similarity['training']
        assert training['step'] == [3, 20]
        means = [
            mean_between(found['layers'][name]['similarity']['weights']['cosine'])
            for found in (experts, json.loads(content(finished)))
        ]
        assert training['mean'] == pytest.approx(means)
        assert training['least'] < training['mean'] < training['most']
    sentence = failure(capsys, detector, tmp_path / 'new', '--over-training')
    assert '--over-training' in sentence
    assert not (tmp_path / 'new').exists()


def test_cam_that_draws_nothing_says_so(detector, tmp_path, capsys):
    pytest.importorskip('captum')
    more = ('--max-images', '1', '--no-interventions', '--cam', '1', '--score-thr', '0.99')
    detector(tmp_path / 'out', *more)
    assert 'note: --cam drew nothing' in capsys.readouterr().out


def test_detectors_and_classifiers_are_not_compared(
    detector, finished, finished_classifier, tmp_path, capsys
):
    sentence = failure(capsys, detector, tmp_path / 'new', '--compare', str(finished_classifier))
    assert '--compare' in sentence
    assert 'classification' in sentence
    assert str(finished_classifier) in sentence
    assert not (tmp_path / 'new').exists()


def test_image_that_is_gone_when_the_report_is_written(detector, tmp_path, capsys, monkeypatch):
    """It is missing there, and a note says so; everything else is as it would be."""
    read = AnalysisData.image

    def image(self, index):
        if index == 1:
            raise ConfigError("cannot read the image 'one.jpg': No such file or directory")
        return read(self, index)

    monkeypatch.setattr(AnalysisData, 'image', image)
    detector(tmp_path / 'out', '--no-interventions')
    said = capsys.readouterr().out
    assert 'note: missing in the report: 1 of the images; cannot read the image' in said
    assert (tmp_path / 'out' / 'report.html').exists()


@pytest.mark.parametrize('name', ['experts.json', 'explorer.json', '.npz'])
def test_folder_that_becomes_read_only(name, detector, tmp_path, capsys, monkeypatch):
    """One sentence; what is there stays, and the same command finishes the work."""
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith(name):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        replace(source, target)

    out = tmp_path / 'out'
    arguments = (out, '--no-interventions', '--max-images', '2')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', refuse)
        sentence = failure(capsys, detector, *arguments)
    assert 'cannot be written: Read-only file system' in sentence
    assert not list(out.rglob('*.tmp'))
    detector(*arguments)
    assert (out / 'report.html').exists()


def test_another_checkpoint_in_the_same_folder(detector, finished, tmp_path, capsys):
    out = tmp_path / 'out'
    shutil.copytree(finished, out)
    before = files_in(out)
    other = tmp_path / 'other.pth'
    save_checkpoint(detector.read(), other, seed=1)
    for arguments in (
        {'checkpoint': other},
        {'options': ['model.test_cfg.nms_pre=7']},
        {'options': ['val_dataloader.dataset.indices=4']},
        {'options': ['data_preprocessor.mean=[1.0, 2.0, 3.0]']},
    ):
        sentence = failure(capsys, detector, out, **arguments)
        assert f'{out}' in sentence
        assert '--overwrite' in sentence
        assert files_in(out) == before
    for arguments in (('--max-images', '3'), ('--split', 'train')):
        assert '--overwrite' in failure(capsys, detector, out, *arguments)
        assert files_in(out) == before
    quick = ('--no-interventions', *HALF)
    experts = detector(out, '--overwrite', *quick, checkpoint=other)
    fresh = detector(tmp_path / 'fresh', *quick, checkpoint=other)
    assert experts == fresh


@pytest.mark.parametrize(
    'arguments', [('--max-images', '0'), ('--score-thr', '1'), ('--cam', '33'), ('--cam', '-1')]
)
def test_values_out_of_range(arguments, detector, tmp_path, capsys):
    sentence = failure(capsys, detector, tmp_path / 'out', *arguments)
    assert '='.join(arguments) in sentence
    assert not (tmp_path / 'out').exists()


def test_default_folder(detector):
    args = command.parse(['config.py', 'work/iter_400.pth', '--split', 'test'])
    assert args.out == Path('work/experts_iter_400_test')


# Mistakes -----------------------------------------------------------------------------------------


def test_exports_say_what_is_in_their_way(detector, tmp_path, capsys):
    (tmp_path / 'file').touch()
    said = failure(capsys, detector, tmp_path / 'out', '--projector', str(tmp_path))
    assert f"--projector: '{tmp_path}' holds something else than points" in said
    said = failure(capsys, detector, tmp_path / 'out', '--fiftyone', str(tmp_path / 'file'))
    assert f"--fiftyone: '{tmp_path / 'file'}' is a file" in said
    assert not (tmp_path / 'out').exists()


def test_exports_and_looks(detector, tmp_path):
    """All in one run: the files are there, and the report has the pictures."""
    pytest.importorskip('captum')
    paths = [tmp_path / name for name in ('out', 'fiftyone', 'projector')]
    detector(
        paths[0], '--no-interventions', '--max-images', '2', '--score-thr', '0', '--cam', '1',
        '--fiftyone', str(paths[1]), '--projector', str(paths[2]),
    )  # fmt: skip
    samples = json.loads((paths[1] / 'samples.json').read_text())['samples']
    assert [Path(sample['filepath']).exists() for sample in samples] == [True, True]
    assert len(list(paths[2].glob('*/*/tensors.tsv'))) == len(LAYERS)
    place = drawn(IMAGES, 2)[drawn(2, 1)[0]]
    for layer in LAYERS:
        assert (paths[0] / 'figures' / layer / f'cam_{place:06d}.png').exists()
    pictures = json.loads((paths[0] / 'explorer.json').read_text())['pictures']
    assert [picture['layer'] for picture in pictures] == LAYERS


def test_model_without_experts(detector, tmp_path, capsys):
    config = tmp_path / 'dense.py'
    config.write_text(
        DETECTOR.replace('retinanet_moe_soft_digits', 'retinanet_dense_digits').replace(
            f'num_experts={EXPERTS},', ''
        )
    )
    dense = Tool.__new__(Tool)
    dense.__dict__ |= {**vars(detector), 'config': config, 'checkpoint': tmp_path / 'dense.pth'}
    save_checkpoint(dense.read(), dense.checkpoint)
    assert 'has neither an MoE nor a μMoE layer' in failure(capsys, dense, tmp_path / 'out')
    # Its checkpoint in the MoE model, and the other way around.
    sentence = failure(capsys, detector, tmp_path / 'out', checkpoint=dense.checkpoint)
    assert 'it looks like a dense model' in sentence
    sentence = failure(capsys, dense, tmp_path / 'out', checkpoint=detector.checkpoint)
    assert 'give the config that it was trained with' in sentence
    assert not (tmp_path / 'out').exists()


def test_wrong_checkpoints(detector, tmp_path, capsys):
    state = torch.load(detector.checkpoint)['state_dict']
    out = tmp_path / 'out'

    def sentence(changed):
        torch.save({'state_dict': changed}, tmp_path / 'wrong.pth')
        return failure(capsys, detector, out, checkpoint=tmp_path / 'wrong.pth')

    other = {**state, 'bbox_head.cls_moe.router.fc.weight': torch.zeros(5, 8)}
    found = sentence(other)
    assert 'bbox_head.cls_moe.router.fc.weight' in found
    assert '(5, 8)' in found
    # The experts are there, but noise is not: no dense model.
    found = sentence({k: v for k, v in state.items() if 'noise_fc' not in k})
    assert 'noise_fc' in found
    assert 'looks like a dense' not in found
    (tmp_path / 'text.pth').write_text('hello')
    for path in (tmp_path / 'text.pth', tmp_path / 'missing.pth', tmp_path):
        assert str(path) in failure(capsys, detector, out, checkpoint=path)
    assert not out.exists()


def test_checkpoints_of_distributed_models(detector, finished, tmp_path):
    state = torch.load(detector.checkpoint)['state_dict']
    path = tmp_path / 'tiny.pth'
    torch.save({'state_dict': {f'module.{key}': v for key, v in state.items()}}, path)
    experts = detector(tmp_path / 'out', '--no-interventions', checkpoint=path)
    expected = json.loads(content(finished))
    for layer in expected['layers'].values():
        layer['polysemanticity'] = layer['counterfactual'] = None  # without interventions
    assert experts['layers'] == expected['layers']
    assert experts['metrics'] == expected['metrics']


def test_empty_data_set(detector, tmp_path, capsys):
    root = tmp_path / 'data'
    shutil.copytree(detector.data_root, root)
    path = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, 'images': [], 'annotations': []}))
    sentence = failure(capsys, detector, tmp_path / 'out', options=[f'data_root={root}'])
    assert 'val_dataloader' in sentence
    assert not (tmp_path / 'out').exists()


def test_missing_data(detector, tmp_path, capsys):
    sentence = failure(
        capsys, detector, tmp_path / 'out', options=[f'data_root={tmp_path / "none"}']
    )
    assert str(tmp_path / 'none') in sentence
    config = tmp_path / 'no_val.py'
    config.write_text(f"_base_ = '{detector.config}'\nval_dataloader = None\n")
    other = copy.copy(detector)
    other.config = config
    sentence = failure(capsys, other, tmp_path / 'out')
    assert 'val_dataloader' in sentence
    assert not (tmp_path / 'out').exists()


def test_foreign_folders(detector, tmp_path, capsys):
    file = tmp_path / 'file'
    file.write_text('important')
    folder = tmp_path / 'folder'
    folder.mkdir()
    (folder / 'thesis.tex').write_text('important')
    below = file / 'out'
    for out in (file, folder, below):
        for arguments in ((), ('--overwrite',)):
            sentence = failure(capsys, detector, out, *arguments)
            assert str(out) in sentence or str(file) in sentence
    assert file.read_text() == 'important'
    assert files_in(folder) == {Path('thesis.tex'): b'important'}
    # A folder of that name that is none of the tool's.
    records = tmp_path / 'own' / 'records'
    records.mkdir(parents=True)
    (records / 'vinyl.csv').write_text('important')
    failure(capsys, detector, records.parent, '--overwrite')
    assert files_in(records) == {Path('vinyl.csv'): b'important'}


def test_empty_folder_is_used(detector, tmp_path):
    (tmp_path / 'out').mkdir()
    detector(tmp_path / 'out', '--no-interventions', '--max-images', '2')
    experts = json.loads((tmp_path / 'out' / 'experts.json').read_text())
    assert experts['run']['num_images'] == 2
    assert experts['interventions'] == []


def test_unknown_device(detector, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip('there is such a device')
    sentence = failure(capsys, detector, tmp_path / 'out', '--device', 'cuda:7')
    assert 'cuda:7' in sentence
    sentence = failure(capsys, detector, tmp_path / 'out', '--device', 'toaster')
    assert 'toaster' in sentence
    assert not (tmp_path / 'out').exists()


# Images without anything --------------------------------------------------------------------------


@pytest.mark.parametrize('what', ['objects', 'detections'])
def test_nothing_there(what, detector, tmp_path):
    root, options = detector.data_root, []
    if what == 'objects':
        root = tmp_path / 'data'
        shutil.copytree(detector.data_root, root)
        path = root / 'annotations' / 'instances_val2017.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'annotations': []}))
    else:
        options = ['model.test_cfg.score_thr=1.0']
    experts = detector(tmp_path / 'out', *HALF, options=[f'data_root={root}', *options])
    check_schema(experts, 'detection')
    assert experts['run'][f'num_{what}'] == 0
    assert experts['metrics']['AP'] == (None if what == 'objects' else 0)
    layer = experts['layers'][LAYERS[0]]
    assert layer['num_decisions'] == 4 * LEVELS
    for table in layer['associations'][what].values():
        assert not np.array(table['counts']).any()
        assert (table['mi'], table['p_value'], table['num_units']) == (0, 1, 0)


def test_crowds(detector, tmp_path):
    """They are no objects, and what lies on them is neither right nor wrong."""
    root = tmp_path / 'data'
    shutil.copytree(detector.data_root, root)
    path = root / 'annotations' / 'instances_val2017.json'
    content = json.loads(path.read_text())
    for annotation in content['annotations'][::2]:
        annotation.update(iscrowd=1, segmentation={'counts': [1], 'size': [1, 1]})
    path.write_text(json.dumps(content))
    experts = detector(tmp_path / 'out', '--no-interventions', options=[f'data_root={root}'])
    remaining = [a for a in content['annotations'] if not a['iscrowd']]
    assert experts['run']['num_objects'] == len(remaining)
    table = experts['layers'][LAYERS[0]]['associations']['objects']['class']
    expected = [0] * 10
    first = min(c['id'] for c in content['categories'])
    for annotation in remaining:
        expected[annotation['category_id'] - first] += 1
    np.testing.assert_allclose(np.array(table['counts']).sum(1), expected, atol=1e-5)


# Classifiers --------------------------------------------------------------------------------------


def test_classifier(classifier, finished_classifier, tmp_path, monkeypatch):
    experts = json.loads(content(finished_classifier))
    check_schema(experts, 'classification')
    run = experts['run']
    assert (run['num_images'], run['num_objects'], run['num_detections']) == (7, 7, 0)
    assert run['classes'] == ['a', 'b']
    assert run['num_levels'] is run['score_thr'] is None
    monkeypatch.chdir(tmp_path)
    argv = [str(classifier.config), str(classifier.checkpoint), '--work-dir', str(tmp_path / 'w')]
    cli.run_test(argv)
    tested = json.loads(next((tmp_path / 'w').glob('*/*.json')).read_text())
    assert experts['metrics']['accuracy'] == pytest.approx(tested['accuracy/top1'] / 100)
    per_class = experts['metrics']['per_class']
    assert (4 * per_class['a'] + 3 * per_class['b']) / 7 == pytest.approx(
        experts['metrics']['accuracy']
    )
    layer = experts['layers']['backbone.layer4']
    assert layer['num_decisions'] == 7 * 4
    tables = layer['associations']['objects']
    assert 'size' not in tables
    np.testing.assert_allclose(np.array(tables['class']['counts']).sum(1), [4, 3], atol=1e-6)


def test_classes_of_the_training(classifier, tmp_path, monkeypatch, capsys):
    """Neither tool measures images whose classes have other numbers than in the checkpoint."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'tiny.pth'
    meta = {'dataset_meta': {'classes': ('a', 'aa', 'b')}}
    torch.save({**torch.load(classifier.checkpoint), 'meta': meta}, path)
    for tool, argv, field in (
        (run_analysis, classifier.argv(tmp_path / 'out', checkpoint=path), 'val'),
        (cli.run_test, [str(classifier.config), str(path)], 'test'),
    ):
        assert failure(capsys, tool, argv).startswith(
            f"{field}_dataloader.dataset: class 1 is 'b', but 'aa' in the training of the "
        )
    assert not (tmp_path / 'out').exists()


def test_classifier_statistics(classifier, finished_classifier):
    """The weights of each image: the mean over its four patches."""
    cfg = classifier.read()
    init_default_scope('mmpretrain')
    cli.set_loader_defaults(cfg)
    data = AnalysisData(cfg, 'val')
    model = copy.deepcopy(classifier.model)
    seen = []
    handle = model.backbone.layer4.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    counts = np.zeros((2, 3))
    router = model.backbone.layer4.router
    importance = np.zeros(3)
    positions = np.zeros((9, 3))
    for index in range(7):
        sample = data.dataset[index]
        with torch.no_grad():
            processed = model.data_preprocessor(
                {'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]}
            )
            model(**processed, mode='predict')
            x = seen.pop()
            assert x.shape[-2:] == (4, 4)
            for row in range(2):
                for column in range(2):
                    # Stride 2: the output has 2 x 2 pixels, of 2 x 2 input pixels each.
                    patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                    logits = (patch.mean((2, 3)) @ router.fc.weight.T + router.fc.bias)[0]
                    best = logits.topk(2)
                    weights = torch.zeros(3).scatter(0, best.indices, best.values.softmax(0))
                    counts[sample['data_samples'].gt_label.item()] += weights.numpy() / 4
                    importance += weights.numpy()
                    positions[3 * (2 * row) + 2 * column] += weights.numpy()
    handle.remove()
    layer = json.loads(content(finished_classifier))['layers']['backbone.layer4']
    np.testing.assert_allclose(
        layer['associations']['objects']['class']['counts'], counts, atol=1e-4
    )
    np.testing.assert_allclose(layer['importance'], importance / importance.sum(), atol=1e-5)
    found = layer['associations']['decisions']['position']['counts']
    np.testing.assert_allclose(found, positions, atol=1e-4)


def test_interrupted_classifier(classifier, finished_classifier, tmp_path):
    from mmpretrain.models import ImageClassifier

    for call in (2, 7):
        out = tmp_path / f'out{call}'
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, ImageClassifier, 'predict', call, KeyboardInterrupt())
            with pytest.raises(SystemExit):
                classifier(out)
        classifier(out)
        assert content(out) == content(finished_classifier)
