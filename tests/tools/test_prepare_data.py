import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdet_moe.datasets import download

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools' / 'prepare_data.py'


@pytest.fixture(scope='module')
def main():
    spec = importlib.util.spec_from_file_location('prepare_data', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def digit_scenes(out, *options):
    return ['digit-scenes', '--out', str(out), '--images', '3', '--val-images', '2', *options]


def test_digit_scenes_prints_a_table(main, tmp_path, capsys):
    out = tmp_path / 'data'
    assert main(digit_scenes(out, '--size', '96', '--objects', '2', '4')) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{out}: generated'
    assert lines[1].split() == ['split', 'images', 'objects', 'small', 'medium', 'large']
    counts = json.loads((out / 'dataset.json').read_text())['splits']
    for line, split in zip(lines[2:], ('train2017', 'val2017'), strict=True):
        cells = line.split()
        assert cells[:3] == [split, str(counts[split]['images']), str(counts[split]['objects'])]
        assert cells[3::3] == [str(count) for count in counts[split]['sizes'].values()]

    assert main(digit_scenes(out, '--size', '96', '--objects', '2', '4')) == 0
    assert capsys.readouterr().out.startswith(f'{out}: already there')


def test_an_error_is_one_sentence_and_status_2(tmp_path):
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(SCRIPT), *digit_scenes(tmp_path / 'data', '--size', '8')]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.strip().splitlines()[-1] == 'error: size must be 64 to 4096 px, not 8'
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('command', ['coco', 'cifar100'])
def test_offline(main, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(download, 'check_disk_space', lambda *_: None)
    arguments = [command, '--out', str(tmp_path / command), '--url-base', 'http://127.0.0.1:9']
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith('error: cannot download http://127.0.0.1:9/')
    assert f'put it at {tmp_path / command}' in message


def test_data_that_is_there_needs_no_network(main, tmp_path, capsys):
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    for name in ('train', 'test', 'meta'):
        (folder / name).touch()
    assert main(['cifar100', '--out', str(tmp_path), '--url-base', 'http://127.0.0.1:9']) == 0
    assert capsys.readouterr().out == f'{tmp_path}: already there\n'


def test_defaults_are_where_the_configs_look(main, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(download, 'prepare_coco', lambda *args: calls.append(args) or [])
    assert main(['coco']) == 0
    assert calls == [
        ('data/coco', ['train2017', 'val2017'], 'http://images.cocodataset.org', False)
    ]
    with pytest.raises(SystemExit):
        main(['coco', '--splits', 'test2017'])
    assert 'invalid choice' in capsys.readouterr().err
