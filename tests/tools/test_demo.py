"""``make demo`` in miniature, and the tables that the tools write."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmdet_moe
from mmdet_moe.analysis.runs import COCO_METRICS, RunResult, mean_std
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import UtilizationReport

TOOLS = Path(mmdet_moe.__file__).parents[1] / 'tools'


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_demo_trains_both_models_and_then_reuses_them(tmp_path):
    command = [sys.executable, str(TOOLS / 'demo.py'), '--images', '16', '--iterations', '2']
    command += ['--data', str(tmp_path / 'data'), '--work-dir', str(tmp_path / 'runs')]
    first = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    second = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert second.returncode == 0, second.stderr
    assert 'Saving checkpoint at 2 iterations' in first.stdout
    assert 'Saving checkpoint' not in second.stdout
    for output in (first.stdout, second.stdout):
        rows = [re.split(r'\s*[│┃|]\s*', line) for line in output.splitlines()]
        models = {row[1]: row[2:-1] for row in rows if row[1:2] in (['dense'], ['MoE, soft'])}
        assert set(models) == {'dense', 'MoE, soft'}
        dense, moe = (models[name] for name in ('dense', 'MoE, soft'))
        assert all(0 <= float(value) <= 1 for value in (*dense[:5], *moe[:5]))
        assert dense[6] == dense[7] == '3.34 M'
        # Head of the dense model in M: 2 · 2 · 64 · 64 · 9 + 64 · 9 · 126 = 0.22; 1 and 3 more.
        assert moe[6:] == ['3.57 M', '4.01 M']
        assert re.search(r'- bbox_head\.cls_moe: .*experts', output)
        assert 'retinanet_moe_soft_digits/experts/report.html' in output.replace('\n', '')
    assert (tmp_path / 'runs' / 'overview.png').stat().st_size > 10_000
    experts = tmp_path / 'runs' / 'retinanet_moe_soft_digits' / 'experts'
    assert json.loads((experts / 'experts.json').read_text())['run']['num_images'] == 3
    assert (experts / 'report.html').stat().st_size > 1_000_000
    assert 'statistics: ' in first.stderr
    assert 'statistics: ' not in second.stderr


def result(ap, load, mi):
    metrics = dict.fromkeys(COCO_METRICS.values(), ap)
    report = UtilizationReport(
        num_items=10, load=load, importance=load, load_cv2=0.5, usage_entropy=0.6,
        decision_entropy=0.1, mi_input=mi, mi_level=mi / 2, level_shares=[load],
    ).as_dict()  # fmt: skip
    return RunResult(metrics, 0.2, 1, 2, 10, {'cls': report, 'reg': report})


def test_table_has_mean_and_deviation_over_the_seeds():
    reproduce = load_tool('reproduce')
    runs = [result(0.4, [0.5, 0.5], 0.2), result(0.6, [0.996, 0.004], 0.4)]
    # Both layers' only level has all objects.
    table = reproduce.markdown_table({'some': runs, 'none yet': []}, torch.ones(1))
    lines = table.splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].split('|')[1:-1]]
    # Two of the eight experts (two layers, two experts, two seeds) get less than 1 % of 1 / 2.
    assert cells == [
        'some', '2', *['0.500 ± 0.141'] * 5, '0.50 / 0.50', '2 of 8', '0.30 / 0.30', '0.15 / 0.15',
        '0.00 / 0.00',
    ]  # fmt: skip


def experts_of(ap, mi, p_value, alone, equal, random, both):
    """The parts of an ``experts.json`` that the table reads; ``alone`` has one AP per expert."""
    sizes = {'mi': mi, 'p_value': p_value}
    associations = {
        'objects': {'size_coco': sizes, 'class': {'mi': mi / 10, 'p_value': 0.5}},
        'detections': {'size_coco': {'mi': 2 * mi, 'p_value': p_value / 2}},
    }
    changed = [('cls', 'only', value) for value in alone]
    changed += [('cls', 'equal', equal), ('cls', 'random', random), ('all', 'random', both)]
    return {
        'metrics': {'AP': ap},
        'layers': {'cls': {'associations': associations}},
        'interventions': [
            {'layer': layer, 'kind': kind, 'metrics': {'AP': value}}
            for layer, kind, value in changed
        ],
    }


def test_table_of_specialisation():
    reproduce = load_tool('reproduce')
    runs = [
        experts_of(0.6, 0.2, 0.001, [0.5, 0.3], 0.55, 0.45, 0.35),
        experts_of(0.4, 0.4, 0.020, [0.1, 0.3], 0.35, 0.25, 0.15),
    ]
    (line,) = reproduce.specialisation_table({'some': runs}).splitlines()[2:]
    cells = [cell.strip() for cell in line.split('|')[1:-1]]
    # The best and the worst expert of each seed, whichever they are.
    assert cells == [
        'some', '2', '0.30', '0.60', '0.020', '0.03', '0.500 ± 0.141', '0.400', '0.200', '0.450',
        '0.350', '0.250',
    ]  # fmt: skip


def test_one_seed_has_no_deviation():
    mean, std = mean_std([0.3])
    assert mean == 0.3
    assert math.isnan(std)


def test_only_the_marked_part_is_rewritten(tmp_path):
    reproduce = load_tool('reproduce')
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n')
    reproduce.replace_between_markers(page, 'a', 'new')
    assert page.read_text() == 'before\n<!-- a:begin -->\nnew\n<!-- a:end -->\nafter\n'
    with pytest.raises(ConfigError, match='lacks the markers <!-- b:begin -->'):
        reproduce.replace_between_markers(page, 'b', 'new')
    assert 'new' in page.read_text()


@pytest.mark.parametrize('arguments', [['demo'], ['reproduce', 'digit-scenes']], ids=lambda a: a[0])
def test_other_data_is_one_sentence(arguments, digit_scenes_folder, tmp_path, monkeypatch, capsys):
    """The folder holds a data set of other parameters; nothing is trained or replaced."""
    name, *rest = arguments
    options = ['--data', str(digit_scenes_folder), '--work-dir', str(tmp_path / 'runs')]
    monkeypatch.setattr(sys, 'argv', [name, *rest, *options])
    with pytest.raises(SystemExit) as exit_:
        load_tool(name).main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ')
    assert str(digit_scenes_folder) in line
    assert not (tmp_path / 'runs').exists()
