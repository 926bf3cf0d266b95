"""``make demo`` in miniature, and what it has in common with ``tools/reproduce.py``."""

import json
import re
import sys

import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS
from running import CONFIGS, load_tool

from mmdet_moe.cli import load_config, parse_options


@pytest.mark.usefixtures('in_process', 'quick_analysis')
def test_demo_trains_both_models_and_then_reuses_them(tmp_path, monkeypatch, capfd):
    arguments = ['--images', '16', '--iterations', '2']
    arguments += ['--data', str(tmp_path / 'data'), '--work-dir', str(tmp_path / 'runs')]
    monkeypatch.setattr(sys, 'argv', ['demo.py', *arguments])
    demo = load_tool('demo')
    demo.main()
    first = capfd.readouterr()
    demo.main()
    second = capfd.readouterr()
    # Six titles and bars, the table, the verdict, the paths; the rest is in files.
    assert len(first.out.splitlines()) < 60
    logs = {path.parent.name: path.read_text() for path in tmp_path.glob('runs/*/output.log')}
    assert len(logs) == 4
    assert all('Saving checkpoint at 2 iterations' in log for log in logs.values())
    for output in (first.out, second.out):
        rows = [re.split(r'\s*[│┃|]\s*', line) for line in output.splitlines()]
        names = ('dense', 'MoE, soft', 'MoE, equal cost')
        models = {row[1]: row[2:-1] for row in rows if row[1:2] and row[1] in names}
        assert set(models) == set(names)
        dense, moe, equal = (models[name] for name in names)
        assert all(0 <= float(value) <= 1 for row in models.values() for value in row[:5])
        assert dense[6] == dense[7] == '3.34 M'
        # Head of the dense model in M: 2 · 2 · 64 · 64 · 9 + 64 · 9 · 126 = 0.22; 1 and 3 more.
        assert moe[6:] == ['3.57 M', '4.01 M']
        # An expert with 32 channels inside instead of 64: 2 · (64 + 32) · 32 · 9 + 32 · 9 · 126.
        assert equal[6:] == ['3.31 M', '3.49 M']
        assert re.search(r'lassification head.*bbox_head\.cls_moe', output)
        assert 'retinanet_moe_soft_digits/experts/report.html' in output.replace('\n', '')
    assert (tmp_path / 'runs' / 'overview.png').stat().st_size > 10_000
    experts = tmp_path / 'runs' / 'retinanet_moe_soft_digits' / 'experts'
    assert json.loads((experts / 'experts.json').read_text())['run']['num_images'] == 3
    assert (experts / 'report.html').stat().st_size > 1_000_000
    for output in (first, second):
        assert 'OneDL' not in output.out + output.err
        assert 'deprecated' not in output.out + output.err
        assert 'INFO' not in output.out + output.err
        assert 'Loads checkpoint' not in output.out + output.err


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


def test_one_iteration_is_too_few(tmp_path, monkeypatch, capsys):
    options = ['--iterations', '1', '--data', str(tmp_path / 'data')]
    monkeypatch.setattr(sys, 'argv', ['demo', *options, '--work-dir', str(tmp_path / 'runs')])
    with pytest.raises(SystemExit) as exit_:
        load_tool('demo').main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == 'error: --iterations 1: give at least 2\n'
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('iterations', [40, 100, 800])
def test_the_rate_is_0_at_the_end(iterations):
    """Of shorter and longer trainings, too; the first 20 iterations are warm-up."""
    tool = load_tool('demo')
    file = CONFIGS / 'demo' / f'{tool.RUNS["MoE, soft"]}.py'
    cfg = load_config(str(file), parse_options(tool.schedule(iterations)))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [
        PARAM_SCHEDULERS.build(of, default_args=dict(optimizer=optimizer))
        for of in cfg.param_scheduler
    ]
    rates = []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0, abs=0.01)
    assert rates[20] == max(rates) == pytest.approx(1)
    assert rates[iterations // 2] > 0.3
