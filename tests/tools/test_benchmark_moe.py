"""The benchmark in miniature: no test looks at a time."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from mmengine.config import Config
from running import load_tool

from research.benchmarks import conv, harness
from research.benchmarks import ops as ops_suite
from research.benchmarks.conv import ConvProblem, ConvShape
from research.benchmarks.harness import (
    FORWARD,
    PASSES,
    TRAINING,
    Alternative,
    Benchmark,
    Comparison,
    Computation,
    WrongResult,
)


@pytest.fixture
def tool(monkeypatch):
    """The tool as a module, whose --quick is smaller still."""
    module = load_tool('benchmark_moe')
    tiny = module.Sizes(
        rows=(64, 64),
        channels=16,
        conv=(ConvShape(4, 8, 6, 4), ConvShape(6, 8, 4, 3)),
        scaling=(ConvShape(8, 8, 4, 4), ConvShape(8, 8, 4, 8)),
        image_size=32,
        mumoe=(2, 8, 16, 4, 3),
        batch=2,
        analysis=4,
        explorer=6,
        auto=2,
        repeats=2,
    )
    monkeypatch.setattr(module, 'QUICK', tiny)
    monkeypatch.setattr(harness, 'WARM_UP_ROUNDS', 1)
    # The test process keeps its memory as it is.
    monkeypatch.setattr(module, 'keep_large_blocks', lambda: True)
    monkeypatch.setattr(ops_suite, 'keep_large_blocks', lambda: True)
    return module


@pytest.fixture
def bench():
    bench = Benchmark(torch.device('cpu'), torch.float32, repeats=2)
    bench.start('test')
    return bench


@pytest.fixture
def run(tool, tmp_path, capsys):
    """Run the tool and return its report and its output."""

    def run(*arguments):
        tool.main([*arguments, '--quick', '--json', str(tmp_path / 'report.json')])
        report = json.loads((tmp_path / 'report.json').read_text())
        return report, capsys.readouterr().out

    return run


def rows_of(comparison):
    return {row['name']: row for row in comparison['rows']}


def check_results(results, output, is_compared=True):
    """What every suite's part of the report has."""
    assert results['comparisons']
    for comparison in results['comparisons']:
        rows = rows_of(comparison)
        assert len(rows) == len(comparison['rows'])
        for row in rows.values():
            first, third = row['quartiles_ms']
            assert 0 < first <= row['median_ms'] <= third
            assert len(row['samples_ms']) == 2
        assert all({*pair} <= rows.keys() for pair in comparison['watch'])
        if comparison['baseline']:
            assert rows[comparison['baseline']]['ratio'] == 1
        if comparison['limit']:
            assert rows[comparison['limit']]['share_of_limit'] == 1
    assert any(comparison['watch'] for comparison in results['comparisons']) == is_compared
    for target in results['targets']:
        assert isinstance(target['met'], bool)
        assert math.isfinite(target['figure'])
        assert f'target: {target["text"]}: {"met" if target["met"] else "missed"} (' in output


def test_ops(run):
    report, output = run('ops')
    results = report['suites']['ops']
    check_results(results, output)
    assert len(results['comparisons']) == 2 * 3  # two kinds of memory
    assert len(results['targets']) == 2 * 2 * 2
    forward, training, parts = results['comparisons'][:3]
    kept = results['comparisons'][3]
    assert 'as the C library gives it' in forward['title']
    assert 'kept for reuse' in kept['title']
    assert forward['baseline'] == forward['limit'] == 'copy into new memory'
    assert kept['limit'] == 'copy into existing memory'
    # k = 2: forward is a copy of 3 T rows, forward + backward one of 7 T rows.
    for comparison, copied in ((forward, 3), (training, 7)):
        assert {row['bytes'] for row in comparison['rows']} == {2 * copied * 64 * 16 * 4}
        assert len(comparison['rows']) == 5
    assert set(rows_of(parts)) >= {'sort_routes', 'dispatch', 'combine', 'combine, backward'}
    assert all(row['gb_per_s'] > 0 for row in parts['rows'])


def test_conv(run):
    report, output = run('conv')
    results = report['suites']['conv']
    check_results(results, output)
    assert len(results['comparisons']) == 2 * 2
    assert len(results['targets']) == 2 * 3
    for comparison in results['comparisons']:
        rows = rows_of(comparison)
        assert comparison['baseline'] == 'one convolution, N·k images'
        assert rows["ConvExperts 'auto'"]['note'] in ('subbatches', 'grouped', 'views')
        assert len(rows) == 9


def test_scaling(run):
    report, output = run('scaling')
    results = report['suites']['scaling']
    check_results(results, output)
    assert len(results['comparisons']) == len(results['targets']) == 2 * 2
    assert all(list(rows_of(c)) == ['E=4', 'E=8'] for c in results['comparisons'])


def test_mumoe(run):
    report, output = run('mumoe')
    results = report['suites']['mumoe']
    check_results(results, output)
    entmax, layers, levels = (results['comparisons'][i : i + 2] for i in (0, 2, 4))
    assert all(list(rows_of(c)) == ['ours', 'package entmax'] for c in entmax)
    for comparison in layers:
        assert comparison['baseline'] == 'nn.Linear'
        assert len(rows_of(comparison)) == 5
    assert all(list(rows_of(c)) == ['3 experts', '9 experts, two levels'] for c in levels)
    assert len(results['targets']) == 1 + 2 * 2 + 1


def test_overhead(run):
    report, output = run('overhead')
    results = report['suites']['overhead']
    check_results(results, output)
    stage, layers = results['comparisons'][:2], results['comparisons'][2:]
    assert all(list(rows_of(c)) == ['dense', 'MoE, E = 1'] for c in stage)
    assert [list(rows_of(c)) for c in layers] == [['dense, 2 N items', 'MoE, E = 4, k = 2']] * 8
    # Both passes of the stage, and the forward pass of each layer.
    assert len(results['targets']) == 2 + 4
    shares = [re.search(r'joining the outputs is (.*)% of', note)[1] for note in results['notes']]
    assert len(shares) == 3
    assert all(0 < float(share) < 50 for share in shares)


def test_retinanet(run, monkeypatch):
    from research.benchmarks import retinanet

    class SmallConfig:
        @staticmethod
        def fromfile(path):
            cfg = Config.fromfile(path)
            cfg.model.backbone.update(depth=18, base_channels=8, stem_channels=8)
            cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=64)
            cfg.model.bbox_head.update(in_channels=64, feat_channels=64, stacked_convs=1)
            return cfg

    monkeypatch.setattr(retinanet, 'Config', SmallConfig)
    report, output = run('retinanet')
    results = report['suites']['retinanet']
    check_results(results, output)
    iteration = results['comparisons'][-1]
    assert [row['name'] for row in iteration['rows']][::2] == ['MoE', 'dense']
    assert iteration['baseline'].startswith('dense, head of ')
    assert len(results['targets']) == 1
    # Multiply-adds: k times those of the dense head, and the router; a wide head of a little less.
    counts = [float(row['note'].split()[0]) for row in results['comparisons'][0]['rows']]
    moe, wide, dense = counts
    assert 1.999 < moe / dense < 2.01
    assert 0.9 < wide / (2 * dense) < 1.001


@pytest.mark.sweep(keep=0)  # takes long
@pytest.mark.usefixtures('quick_analysis')
def test_analysis(run):
    report, output = run('analysis')
    results = report['suites']['analysis']
    check_results(results, output)
    (comparison,) = results['comparisons']
    assert comparison['baseline'] == 'plain test'
    assert set(rows_of(comparison)) > {'plain test', 'statistics pass'}
    assert [target['limit'] for target in results['targets']] == [1.15]


def test_explorer(run, monkeypatch):
    pytest.importorskip('playwright')
    from research.benchmarks import explorer

    if not any(map(shutil.which, explorer._BROWSERS)):
        pytest.skip('no Chromium')
    monkeypatch.setattr(explorer, 'LOADS', 1)
    report, output = run('explorer')
    results = report['suites']['explorer']
    seconds, megabytes, _, both = (target['figure'] for target in results['targets'])
    assert output.count('loads in at most 2 s: m') == 2  # met or missed
    assert seconds > 0
    assert 1 < megabytes < both < 25


def test_auto(run, monkeypatch):
    monkeypatch.setattr(conv, '_grid', lambda: [ConvShape(2, 8, 4, 4), ConvShape(3, 8, 4, 4, 1, 1)])
    report, output = run('auto')
    results = report['suites']['auto']
    check_results(results, output, is_compared=False)
    assert len(results['comparisons']) == 2 * 2
    for comparison in results['comparisons']:
        assert [row.get('note') for row in comparison['rows']].count('auto') == 1
    assert 'in geometric mean' in results['notes'][-1]


def test_report_says_what_the_figures_depend_on(run):
    report, _ = run('scaling', 'ops', '--dtype', 'bfloat16', '--repeats', '2', '--channels-last')
    assert list(report['suites']) == ['ops', 'scaling']  # the memory is untouched before `ops`
    environment, settings = report['environment'], report['settings']
    assert environment['versions'].keys() >= {'mmdet_moe', 'torch', 'mmdet'}
    assert environment['threads'] == torch.get_num_threads()
    assert environment['cpu']
    assert [entry['device'] for entry in environment['kernels']] == ['cpu', 'cuda']
    assert settings['dtype'] == 'bfloat16'
    assert settings['quick']
    assert settings['channels_last']


def test_compare(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'COMPARED', replace(tool.QUICK, repeats=6))
    monkeypatch.setattr(tool, 'DEFAULT_SUITES', ('scaling',))
    path = tmp_path / 'figures.json'
    tool.main(['--update', '--reference', str(path)])
    kept = json.loads(path.read_text())
    assert kept['command'] == f'tools/benchmark_moe.py --update --reference {path}'
    assert kept['conditions'].keys() == {
        'date', 'commit', 'python', 'versions', 'device', 'threads', 'kernels', 'dtype',
    }  # fmt: skip
    assert [(f['name'], f['other']) for f in kept['figures']] == [('E=8', 'E=4')] * 4
    for figure in kept['figures']:
        figure.update(ratio=1e-3, interval=[1e-3, 1e-3])
    path.write_text(json.dumps(kept))
    capsys.readouterr()
    compare = ['scaling', '--compare', '--reference', str(path)]
    tool.main(compare)
    output = capsys.readouterr().out
    assert output.count('moved: slower') == 4 + 1  # and at its end
    assert 'Not measured: GPUs' in output
    with pytest.raises(SystemExit) as exit_:
        tool.main([*compare, '--fail'])
    assert exit_.value.code == 3
    for figure in kept['figures']:
        figure.update(ratio=1e3, interval=[1e3, 1e3])
    path.write_text(json.dumps(kept))
    tool.main([*compare, '--fail'])


def test_only_what_is_watched_is_timed():
    bench = Benchmark(torch.device('cpu'), torch.float32, repeats=6, only_watched=True)
    bench.start('test')
    rows = [Alternative(name, lambda: None) for name in 'abc']
    assert bench.compare('some', rows, watch=[('c', 'a')]).samples.keys() == {'a', 'c'}


def test_a_wrong_alternative_ends_the_run_before_it_is_timed(tool, tmp_path, monkeypatch, capsys):
    def wrong(problem):
        out = 1.01 * problem.all_experts()
        calls.append(out)
        return out

    calls = []
    monkeypatch.setattr(ConvProblem, 'masked_loop', wrong)
    with pytest.raises(SystemExit) as exit_:
        tool.main(['conv', '--quick', '--json', str(tmp_path / 'report.json')])
    assert exit_.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: 4×8×6×6')
    assert "'masked loop' gives a wrong output" in line
    assert len(calls) == 1
    assert not (tmp_path / 'report.json').exists()


@pytest.mark.parametrize(
    ('results', 'message'),
    [
        ({'y': torch.tensor([1.0, 2.1])}, 'wrong y: it differs by 0.05'),
        ({'y': torch.tensor([1.0, math.nan])}, 'wrong y: it differs by nan'),
        ({'y': torch.ones(2, 1)}, 'wrong y: it differs by inf'),
        ({'y': [torch.tensor(1.0), torch.tensor(3.0)]}, 'wrong y: it differs by 0.5'),
        ({'z': torch.ones(2)}, 'computes no y'),
    ],
    ids=['value', 'nan', 'shape', 'list', 'name'],
)
def test_wrong_results_are_found(bench, results, message):
    expected = {'y': torch.tensor([1.0, 2.0])}
    with pytest.raises(WrongResult, match=message):
        bench.compare('some', [Alternative('a', lambda: results, expected)])


def test_wrong_order_is_found(bench):
    expected = {'order': torch.tensor([0, 1])}
    wrong = Alternative('a', lambda: {'order': torch.tensor([1, 0])}, expected)
    with pytest.raises(WrongResult, match='wrong order'):
        bench.compare('some', [wrong])


def test_wrong_gradient_is_found(bench):
    x = torch.ones(3, requires_grad=True)
    good = Computation('good', lambda: 2 * x, {'x': x})
    bad = Computation('bad', lambda: x + x.detach(), {'x': x})
    expected = {pass_: good.run(pass_) for pass_ in PASSES}
    bench.compare('some', [bad.row(FORWARD, expected[FORWARD])])
    with pytest.raises(WrongResult, match="'bad' gives a wrong gradient of x"):
        bench.compare('some', [bad.row(TRAINING, expected[TRAINING])])


def test_alternatives_take_turns(bench):
    calls = []
    names = ('a', 'b', 'c')
    bench.compare('some', [Alternative(n, lambda n=n: calls.append(n)) for n in names])
    assert calls == [*names] * (harness.WARM_UP_ROUNDS + 2)


def test_ratio_is_of_times_in_the_same_round():
    # The machine was 10 times slower in the second half.
    samples = {'a': [2.0, 2.0, 20.0, 20.0, 20.0], 'b': [1.0, 1.0, 1.0, 10.0, 10.0]}
    comparison = Comparison('some', samples, num_bytes={'a': 300, 'b': 100})
    assert comparison.ratio('a', 'b') == 2
    assert comparison.seconds('a') == 20
    assert comparison.quartiles('b') == (1, 10)
    assert comparison.share('a', 'b') == 1.5


def test_channels_last():
    bench = Benchmark(torch.device('cpu'), torch.float32, channels_last=True)
    problem = ConvProblem(bench, ConvShape(4, 8, 5, 3))
    assert problem.x.is_contiguous(memory_format=torch.channels_last)
    gradient = problem.stacked('grouped').run(TRAINING)['gradient of x']
    plain = Computation('dense', problem.all_experts, problem.inputs).run(TRAINING)['gradient of x']
    torch.testing.assert_close(gradient, plain)


def test_balanced_routing(bench):
    shape = ConvShape(64, 2, 1, 16)
    ids = ConvProblem(bench, shape, balanced=True).ids
    assert ids.flatten().bincount(minlength=16).tolist() == [8] * 16
    assert (ids[:, 0] != ids[:, 1]).all()


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (
            ['speed'],
            "there is no suite 'speed'; choose from ops, conv, scaling, retinanet, mumoe, "
            'overhead, analysis, explorer, auto',
        ),
        (['ops', '--repeats', '0'], '--repeats must be at least 1, got 0'),
        (['ops', '--threads', '-1'], '--threads must be at least 1, got -1'),
        (
            ['ops', '--dtype', 'float16'],
            '--dtype float16 is for GPUs; use bfloat16 or float32 on a CPU',
        ),
        pytest.param(
            ['ops', '--device', 'cuda'],
            '--device cuda: PyTorch finds no GPU here; use --device cpu',
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU'),
        ),
        (['ops', '--json', '/nowhere/x.json'], '--json: there is no folder /nowhere'),
        (['ops', '--json', '.'], '--json: . is a folder; name a file'),
        (
            ['--compare', '--repeats', '5'],
            '--repeats 5 are too few rounds to compare; leave it',
        ),
        (
            ['--compare', '--channels-last'],
            '--channels-last is not what the kept figures had; leave it',
        ),
        (['--compare', '--quick'], '--quick has too few rounds to compare; leave it'),
        (['--compare', 'auto'], "the suite 'auto' is not compared; leave it"),
        (['--update', 'ops'], '--update keeps the figures of all suites; name none'),
        (['--update', '--fail'], '--fail belongs to --compare, without --update'),
        (['--reference', 'x.json'], '--reference belongs to --compare and --update'),
        (
            ['--compare', '--reference', '/nowhere/x.json'],
            'there are no figures in /nowhere/x.json; write them with --update',
        ),
        (
            ['--update', '--reference', '/nowhere/x.json'],
            '--reference: there is no folder /nowhere',
        ),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_mistakes_are_one_sentence(tool, arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool.main(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f'error: {sentence}\n'
