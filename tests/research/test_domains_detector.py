"""One detector for unlike data sets: its table by hand, and all of it in miniature."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from tables_by_hand import cells, renamed_digits, report

from mmdet_moe.errors import ConfigError
from mmdet_moe.models import EfficientNetLite0
from research.experiments import domains_detector
from research.experiments import experiment as experiment_module
from research.experiments.domains_detector import (
    APART,
    DENSE,
    HEADS,
    DomainsDetectorExperiment,
    markdown_table,
)
from research.runs import RunResult

NAMES = ('cells', 'photographs')
EXPERTS = '4 experts: k-means start, Switch'
NARROW = '4 narrow experts, k = 2: DAMEX'


def result(aps, mi=None):
    layers = {}
    if mi is not None:
        sources = {'cls': mi, 'reg': mi / 2}
        layers = {name: report([0.999, 0.001], mi_source=of) for name, of in sources.items()}
    metrics = {f'AP {name}': ap for name, ap in aps.items()}
    return RunResult(metrics, 0.25, 1000, 2_345_678, 8, layers)


def test_table_by_hand():
    found = {
        DENSE: {0: [result({'cells': 0.4, 'photographs': 0.1})]},
        # Of nothing that is detected there is no metric.
        APART: {0: [result({'cells': 0.5}), result({})], 1: [result({}), result({})]},
        EXPERTS: {0: [result({'cells': 0.44, 'photographs': 0.12}, mi=0.5)]},
        'none yet': {},
    }
    flops = dict.fromkeys(found, 12_345_678)
    dense, apart, experts = cells(markdown_table(found, NAMES, flops))
    assert dense == [DENSE, '1', '25.0', '–', '40.0', '10.0', '12', '0.25', '2,346 k', '–', '–']
    assert apart[1:6] == ['2', '12.5 ± 17.7', '+0.0', '25.0 ± 35.4', '0.0 ± 0.0']
    assert apart[8] == '4,691 k'  # of both
    assert experts[2:6] == ['28.0', '+3.0', '44.0', '12.0']
    assert experts[-2:] == ['0.50 / 0.25', '2 of 4']


@pytest.fixture
def data(tmp_path, digit_scenes_folder):
    """Two data sets: the same digits, some of which are called letters."""
    for name, prefix in zip(NAMES, ('digit ', 'letter '), strict=True):
        names = [prefix + digit for digit in map(str, range(10))]
        renamed_digits(digit_scenes_folder, tmp_path / 'data' / name, names)
    return tmp_path / 'data'


@pytest.mark.sweep(keep=0)  # takes long
@pytest.mark.usefixtures('in_process')
def test_all_in_miniature(tmp_path, data, monkeypatch):
    monkeypatch.setattr(experiment_module, 'RESULTS', tmp_path / 'results.md')
    monkeypatch.setattr(domains_detector, 'HEADS', {n: HEADS[n] for n in (DENSE, EXPERTS, NARROW)})
    weights = tmp_path / 'weights.pth'
    torch.save(EfficientNetLite0().state_dict(), weights)
    monkeypatch.setenv('EFFICIENTNET_LITE0', str(weights))
    made = DomainsDetectorExperiment(
        data, tmp_path / 'runs', [0], 1, iterations=1, start_iterations=1
    )
    made.run()
    table = (made.written / 'domains-detector.md').read_text()
    assert 'cells: 10 classes, 50% of the images, photographs: 10 classes, 50%' in table
    assert table.count('\n| ') == 5  # two lines of the head
    assert len(list((tmp_path / 'runs/features').rglob('*.pt'))) >= 16
    dense, experts = made.flops(DENSE), made.flops(EXPERTS)
    assert dense < experts < 1.001 * dense
    assert 0.9 * dense < made.flops(NARROW) < 1.001 * dense
    # Everything goes through each data set's own file.
    cfg = Config.fromfile(f'{made.methods(EXPERTS)[0].config}.py')
    assert cfg.model.bbox_head.num_classes == 20
    made.run(table_only=True)


def test_each_data_set_alone(tmp_path, data):
    other = f'other{NAMES[0]}'  # a name that ends with the other one
    (data / NAMES[1]).rename(data / other)
    # A third as many images: those of the others have no objects.
    content = json.loads((data / other / 'train.json').read_text())
    kept = {image['id'] for image in content['images'][: len(content['images']) // 3]}
    content['annotations'] = [of for of in content['annotations'] if of['image_id'] in kept]
    (data / other / 'train.json').write_text(json.dumps(content))
    share = len(kept) / (len(kept) + len(content['images']))
    made = DomainsDetectorExperiment(data, tmp_path / 'runs', [0], 1)
    assert [m.name for m in made.methods(APART)] == [f'{APART}, {name}' for name in made.names]
    for method in made.methods(APART):
        made._write_config(APART, method)
        cfg = Config.fromfile(f'{method.config}.py')
        with DefaultScope.overwrite_default_scope('mmdet'):
            joined = DATASETS.build(cfg.train_dataloader.dataset)
        lengths = dict(zip(made.names, map(len, joined.datasets), strict=True))
        learnt = lengths.pop(method.name.split(', ')[1])
        assert len(joined) == learnt > 0
        assert set(lengths.values()) == {0}
        assert cfg.model.bbox_head.num_classes == len(joined.metainfo['classes']) == 20
        expected = share if method.name.endswith(other) else 1 - share
        assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].T_max == round(750 * expected)


def test_one_data_set_is_not_enough(tmp_path):
    with pytest.raises(ConfigError, match='holds 0 folders'):
        DomainsDetectorExperiment(tmp_path, tmp_path / 'runs', [0], 1)
