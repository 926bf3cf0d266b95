"""The table of the heads that may specialise by size, from figures that are made up."""

import re
import shutil

import pytest
from tables_by_hand import cells

from mmdet_moe.cli import load_config, parse_options
from mmdet_moe.errors import ConfigError
from research.experiments import experiment
from research.experiments import sizes as module
from research.experiments.experiment import CONFIGS
from research.experiments.sizes import METHODS, SizesExperiment, markdown_table
from research.runs import COCO_METRICS


def run(ap, given, p_value=0.005):
    figures = {'given_level': given, 'chance': 0.01, 'p_value': p_value, 'mi': given + 0.1}
    trained = {'size': figures, 'class': figures, 'position': figures, 'level': 0.2}
    trained['by_level_and_size'] = [[[5, 5], [0, 10]]]
    layer = {'trained': trained, 'random': [{'size': {'given_level': given / 2}}]}
    return {
        'seed': 0,
        'metrics': dict.fromkeys(COCO_METRICS.values(), ap),
        'layers': {'cls': layer, 'reg': layer},
    }


def test_table():
    dense = {'seed': 0, 'metrics': dict.fromkeys(COCO_METRICS.values(), 0.7)}
    found = {
        'dense': [dense],
        'image': [run(0.4, 0.0), run(0.6, 0.0, 0.5)],
        'pixel': [run(0.5, 0.1), run(0.5, 0.2)],
        'pixel: both': [run(0.49, 0.3)],
    }
    rows = cells(markdown_table(found))
    assert rows[0][:4] == ['dense', '1', '0.700', '0.700']
    assert set(rows[0][6:]) == {'–'}
    assert [row[-1] for row in rows[1:]] == ['no', 'yes', 'no']
    assert rows[1][9] == '0.500'
    assert rows[2][6:] == [
        '0.150 ± 0.071 / 0.150 ± 0.071', '0.010 / 0.010', '0.075 / 0.075', '0.005', '0.25 / 0.25',
        '0.20 / 0.20', '0.15 / 0.15', '0.15 / 0.15', 'yes',
    ]  # fmt: skip


def test_published_when_complete(tmp_path, monkeypatch):
    page, pictures = tmp_path / 'results.md', tmp_path / 'pictures'
    shutil.copy(experiment.RESULTS, page)
    pictures.mkdir()
    monkeypatch.setattr(experiment, 'RESULTS', page)
    monkeypatch.setattr(experiment, 'PICTURES', pictures)
    made = SizesExperiment(tmp_path / 'data', tmp_path / 'runs', [0, 1, 2], 1)
    made.work_dir.mkdir()
    found = {method.name: [run(0.5, 0.2)] * 3 for method in METHODS}
    monkeypatch.setattr(made, 'found', lambda: found)
    monkeypatch.setattr(module, 'plot', lambda found, path: path.touch())
    made.write()
    assert made.written == page
    pattern = r'(?s)<!-- size-beyond-level:begin -->(.*?)<!-- size-beyond-level:end -->'
    (text,) = re.findall(pattern, page.read_text())
    assert text.count('\n') == 3 + len(METHODS)
    assert (pictures / 'size-beyond-level.png').exists()
    found.pop('pixel')
    made.write()
    assert made.written == made.work_dir / 'tables'


def test_every_method_has_a_config_that_takes_its_options():
    for method in METHODS:
        cfg = load_config(str(CONFIGS / f'{method.config}.py'), parse_options(method.options))
        head = cfg.model.bbox_head
        if method is METHODS[0]:
            continue
        assert head.get('granularity', 'image') == method.name.split(':')[0]
        both = 'both' in method.name
        normalised, within = both or 'normalised' in method.name, both or 'within' in method.name
        assert (head.router.get('normalise_levels') == 5) == normalised
        losses = cfg.custom_hooks[1].loss
        loss = losses[0] if isinstance(losses, list) else losses
        assert (loss.get('within') == 'level') == within


def test_methods_and_quick(tmp_path):
    made = SizesExperiment(tmp_path, tmp_path, [3, 4], 1, quick=True)
    assert [method.name for method in made.methods] == [module.QUICK]
    assert made.seeds == [3]
    assert 'train_cfg.max_iters=10' in made.options(module.DIGIT_SCENES.pretraining, 3)
    with pytest.raises(ConfigError, match="--methods 'voxel' is unknown; choose from 'dense'"):
        SizesExperiment(tmp_path, tmp_path, [0], 1, methods=['voxel'])
