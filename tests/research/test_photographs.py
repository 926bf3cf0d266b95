"""The experiments on photographs: their configs, and one of them in miniature."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tables_by_hand import renamed_digits

from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.errors import ConfigError
from mmdet_moe.models import EfficientNetLite0
from research.experiments import experiment as experiment_module
from research.experiments.photographs import (
    PERSONS,
    TASKS,
    VOC,
    PhotographsExperiment,
    config_text,
)
from tools.reproduce import experiment, parse_args


@pytest.fixture
def data(tmp_path, digit_scenes_folder):
    """Digits that are called by the first names of VOC."""
    names = load_config(f'{experiment_module.CONFIGS}/{VOC.methods[0].config}.py').metainfo.classes
    return renamed_digits(digit_scenes_folder, tmp_path / 'data', names)


@pytest.mark.usefixtures('in_process')
@pytest.mark.sweep(keep=0)  # takes long
def test_voc_in_miniature(tmp_path, data, monkeypatch):
    monkeypatch.setattr(experiment_module, 'RESULTS', tmp_path / 'results.md')
    weights = tmp_path / 'weights.pth'
    torch.save(EfficientNetLite0().state_dict(), weights)
    monkeypatch.setenv('EFFICIENTNET_LITE0', str(weights))
    task = replace(VOC, methods=VOC.methods[:3], pictured=VOC.methods[2:3])
    made = PhotographsExperiment(task, data, tmp_path / 'runs', [0], 1, epochs=1)
    made.run()
    table = (made.written / 'voc.md').read_text()
    assert table.startswith('1 epochs after as many of a dense model, 16 images an iteration')
    costs = [int(flops) for flops in re.findall(r'(\d+) MFLOPs', table)]
    # Two experts instead of one subnet; the neck stays what it is.
    assert 1.5 < costs[2] / costs[0] < 2
    assert costs[1] / costs[2] == pytest.approx(1, abs=0.05)
    assert table.count('\n| ') == 5  # two lines of the head
    specialisation = (made.written / 'voc-specialisation.md').read_text()
    assert '| soft |' in specialisation
    assert 'dense' not in specialisation
    assert list((tmp_path / 'runs/features').rglob('*.pt'))
    starts = {}
    for method in made.methods:
        (config,) = made.run_dir(method, 0).glob('*.py')
        starts[method.name] = Path(load_config(str(config)).load_from).parents[1].name
    assert starts == {
        'dense': 'pretraining', 'dense, 52 channels': 'pretraining_52_channels',
        'soft': 'pretraining',
    }  # fmt: skip
    made.run(table_only=True)


@pytest.mark.parametrize('task', TASKS.values(), ids=TASKS)
def test_every_method_has_a_config_that_takes_its_options(task, tmp_path):
    for method in (*task.methods, task.pretraining, *task.starts.values()):
        path = tmp_path / f'{method.key}.py'
        path.write_text(config_text(method.config, task.classes, str(tmp_path / 'maps')))
        cfg = load_config(str(path), parse_options([f'data_root={tmp_path}', *method.options]))
        assert cfg.model.backbone.type == 'mmdet_moe.Frozen'
        assert cfg.model.backbone.module.type == 'mmdet_moe.EfficientNetLite0'
        head, dataset = cfg.model.bbox_head, cfg.train_dataloader.dataset
        assert (head.type == 'mmdet_moe.MoERetinaHead') == (method in task.sparse)
        assert head.num_classes == len(dataset.metainfo.classes)
        assert head.anchor_generator.scales_per_octave == 1
        if task is PERSONS:
            assert tuple(dataset.metainfo.classes) == PERSONS.classes
            pixel = method.name.startswith('pixel')
            assert head.get('granularity', 'image') == ('pixel' if pixel else 'image')


def test_commands(tmp_path):
    common = ['--data', str(tmp_path), '--work-dir', str(tmp_path / 'runs'), '--seeds', '3']
    voc = experiment(parse_args(['voc', *common]))
    assert voc.is_default
    assert 'train_cfg.max_epochs=12' in voc.options(voc.methods[0], 3)
    persons = experiment(parse_args(['persons', *common, '--epochs', '2']))
    assert not persons.is_default
    assert persons.run_dir(persons.methods[0], 3) == tmp_path / 'runs/2_epochs/dense/seed3'
    pretrained = persons.run_dir(persons.pretraining[0], 3)
    pretrained.mkdir(parents=True)
    (pretrained / 'last_checkpoint').write_text('/elsewhere/epoch_2.pth')
    assert f'load_from={pretrained}/epoch_2.pth' in persons.options(persons.methods[1], 3)
    with pytest.raises(ConfigError, match=r"--data: there is no '.*train\.json'"):
        voc.run()
    with pytest.raises(ConfigError, match='--epochs 0'):
        experiment(parse_args(['voc', *common, '--epochs', '0']))
