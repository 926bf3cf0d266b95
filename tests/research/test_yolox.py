"""YOLOX made sparse by path: its tables by hand, and the experiment in miniature."""

from dataclasses import replace

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.registry import MODELS, init_default_scope
from tables_by_hand import cells, renamed_digits, report

from mmdet_moe.cli import load_config
from mmdet_moe.errors import ConfigError
from research.experiments import experiment as experiment_module
from research.experiments import yolox
from research.experiments.experiment import CONFIGS
from research.experiments.yolox import (
    YOLOX,
    YoloxExperiment,
    markdown_table,
    specialisation_table,
)
from research.runs import COCO_METRICS, REPOSITORY, RunResult
from tools.reproduce import experiment, parse_args


def test_table_by_hand():
    load = [0.999, 0.001]
    layers = {'backbone.stage4': report(load), 'neck': report(load, load_cv2=0.1)}
    runs = [
        RunResult(dict.fromkeys(COCO_METRICS.values(), ap), 0.5, 904_463, total, 3, of)
        for ap, total, of in (
            (0.25, 904_463, {}),
            (0.2, 1_998_739, layers),
            (0.3, 1_998_739, layers),
        )
    ]
    results = {'dense': runs[:1], 'backbone': runs[1:], 'none yet': []}
    dense, backbone = cells(markdown_table(results, {'dense': {'AP': 0.2612}}))
    assert dense == ['dense', '1', '0.261', *['0.250'] * 5, '904 k', '–', '–', '–']
    assert backbone[:4] == ['backbone', '2', '–', '0.250 ± 0.071']
    assert backbone[-4:] == ['1,999 k', '0.50 / 0.10', '4 of 8', '0.30 / 0.30']


def test_specialisation_by_hand():
    def run(mi, p, images=10, mi_max=1.2):
        found = {
            'mi': mi, 'chance': 0.25, 'p_adjusted': p, 'mi_max': mi_max, 'num_images': images
        }  # fmt: skip
        # A layer on one level: nothing can be known of that. Its size is not there at all.
        detections = {'class': found, 'level': {**found, 'mi_max': 0}}
        # Nothing may come of the objects, which have no level.
        associations = {'objects': {'class': {**found, 'mi': 9}}, 'detections': detections}
        return {'layers': {'neck': {'associations': associations}}}

    (row,) = cells(specialisation_table({'neck': [run(0.5, 0.001), run(0.3, 0.02)], 'all': []}))
    assert row == ['neck', '`neck`', '2', '10', '0.40', '0.25', '0.020', *['–'] * 6]
    # No detections are no measurement of 0.
    (row,) = cells(specialisation_table({'neck': [run(0, 1, images=0, mi_max=0)]}))
    assert row[3:] == ['0', *['–'] * 9]


@pytest.fixture
def data(tmp_path, digit_scenes_folder):
    """Digits that are called by the first names of COCO."""
    names = CocoDataset.METAINFO['classes']
    return renamed_digits(digit_scenes_folder, tmp_path / 'data', names)


@pytest.mark.usefixtures('in_process')
@pytest.mark.sweep(keep=0)  # takes long
def test_in_miniature(tmp_path, data, monkeypatch):
    monkeypatch.setattr(experiment_module, 'RESULTS', tmp_path / 'results.md')
    init_default_scope('mmdet')
    dense = load_config(str(CONFIGS / f'{YOLOX.methods[0].config}.py')).model
    torch.save(MODELS.build(dense).state_dict(), tmp_path / 'weights.pth')
    monkeypatch.setenv('YOLOX_NANO', str(tmp_path / 'weights.pth'))
    monkeypatch.setattr(yolox, 'YOLOX', replace(YOLOX, methods=YOLOX.methods[:2]))
    made = YoloxExperiment(data, tmp_path / 'runs', [0], 1, epochs=1)
    made.run()
    table = (made.written / 'yolox.md').read_text()
    assert table.startswith('1 epochs, 16 images an iteration')
    assert 'Cost of the whole model for an image' in table
    dense, backbone = cells(table)
    assert dense[2] == backbone[2] != '–'  # before the training
    (layer,) = cells((made.written / 'yolox-specialisation.md').read_text())
    assert layer[:3] == ['backbone', '`backbone.stage4`', '1']
    # What is kept of a run for later is enough for the table.
    (kept,) = made.analyses(made.methods[1])
    assert set(kept['layers']['backbone.stage4']['associations']) == {'detections'}
    start = made.work_dir / 'backbone/start.json'
    changed = start.stat().st_mtime_ns
    made.run()
    assert start.stat().st_mtime_ns == changed


def test_command(tmp_path):
    common = ['--data', str(tmp_path), '--work-dir', str(tmp_path / 'runs'), '--seeds', '3']
    made = experiment(parse_args(['yolox', *common]))
    assert made.is_default
    assert 'train_cfg.max_epochs=4' in made.options(made.methods[0], 3)
    assert not experiment(parse_args(['yolox', *common, '--epochs', '1'])).is_default
    with pytest.raises(ConfigError, match=r"--data: there is no '.*train\.json'"):
        made.run()


def test_the_listed_images_are_in_one_split_each():
    train, val = (
        (REPOSITORY / f'research/coco_subset/{split}.txt').read_text().split()
        for split in ('train', 'val')
    )
    assert (len(set(train)), len(set(val)), set(train) & set(val)) == (343, 206, set())
