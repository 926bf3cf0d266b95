import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import (
    expect_cifar,
    expect_fashion_mnist,
    pack,
    write_cifar10,
    write_cifar100,
    write_fashion_mnist,
)
from mmpretrain.datasets import CIFAR10, CIFAR100
from PIL import Image
from running import TOOLS, load_tool

from mmdet_moe.datasets import class_folders, download, fashion_mnist, voc2007
from mmdet_moe.models import yolox_nano
from mmdet_moe.models.backbones import efficientnet_lite

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def main():
    return load_tool('prepare_data').main


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
    arguments = digit_scenes(tmp_path / 'data', '--size', '8')
    command = [sys.executable, str(TOOLS / 'prepare_data.py'), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr.strip().splitlines()[-1] == 'error: size must be 64 to 4096 px, not 8'
    assert 'Traceback' not in done.stderr


COMMANDS = ('coco', 'cifar10', 'cifar100', 'fashion-mnist', 'voc2007', 'digit-scenes')


@pytest.mark.parametrize('command', COMMANDS)
def test_a_file_in_place_of_the_folder(main, tmp_path, capsys, command):
    file = tmp_path / 'file'
    file.touch()
    for out in (file, file / 'below'):
        assert main([command, '--out', str(out)]) == 2
        assert capsys.readouterr().err == (
            f'error: --out {out}: {file} is a file; choose a folder or move it away\n'
        )


@pytest.mark.parametrize('command', COMMANDS[:5])
def test_offline(main, tmp_path, capsys, monkeypatch, command):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    for module in (download, fashion_mnist):
        monkeypatch.setattr(module, 'check_disk_space', lambda *_: None)
    arguments = [command, '--out', str(tmp_path / command), '--url-base', 'http://127.0.0.1:9']
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith('error: cannot download http://127.0.0.1:9/')
    assert f'put it at {tmp_path / command}' in message


@pytest.mark.parametrize('write', [write_cifar10, write_cifar100])
def test_data_that_are_there(main, tmp_path, capsys, monkeypatch, write):
    """They need no network, and are verified."""
    folder = write(tmp_path)
    expect_cifar(monkeypatch, folder)
    name = {write_cifar10: 'cifar10', write_cifar100: 'cifar100'}[write]
    command = [name, '--out', str(tmp_path), '--url-base', 'http://127.0.0.1:9']
    assert main(command) == 0
    assert capsys.readouterr().out == f'{tmp_path}: already there\n'
    damaged = sorted(folder.iterdir())[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main(command) == 2
    message = capsys.readouterr().err
    assert f'error: {damaged} has the MD5 ' in message
    assert message.endswith('delete it and run the command again\n')


def test_a_damaged_file_is_replaced(main, tmp_path, capsys, monkeypatch):
    """As the message says, from the archive that was kept."""
    folder = write_cifar100(tmp_path)
    pack(folder)
    expect_cifar(monkeypatch, folder, tmp_path / 'cifar-100-python.tar.gz')
    (folder / 'test').unlink()
    command = ['cifar100', '--out', str(tmp_path), '--url-base', 'http://127.0.0.1:9']
    assert main(command) == 0
    assert 'unpacked' in capsys.readouterr().out
    assert main(command) == 0
    assert 'already there' in capsys.readouterr().out


@pytest.mark.parametrize(('name', 'cls'), [('cifar10', CIFAR10), ('cifar100', CIFAR100)])
def test_checksums_are_those_of_mmpretrain(name, cls):
    files = [*cls.train_list, *cls.test_list, (cls.meta['filename'], cls.meta['md5'])]
    assert download.CIFAR[name].provides == {
        f'{cls.base_folder}/{file}': md5 for file, md5 in files
    }
    assert download.CIFAR[name].md5 == cls.tgz_md5


@pytest.mark.parametrize('write', [write_cifar10, write_cifar100])
def test_cifar_from_a_server(main, server, tmp_path, capsys, monkeypatch, write):
    folder = write(tmp_path / 'published')
    archive = pack(folder)
    expect_cifar(monkeypatch, folder, archive)
    server.files[f'/{archive.name}'] = archive.read_bytes()
    out = tmp_path / 'out'
    command = {write_cifar10: 'cifar10', write_cifar100: 'cifar100'}[write]
    arguments = [command, '--out', str(out), '--url-base', server.url, '--remove-archives']
    assert main(arguments) == 0
    assert capsys.readouterr().out == f'{out}: unpacked {archive.name}\n'
    assert [path.name for path in out.iterdir()] == [folder.name]
    for path in folder.iterdir():
        assert (out / folder.name / path.name).read_bytes() == path.read_bytes()
    assert main(arguments) == 0
    assert capsys.readouterr().out == f'{out}: already there\n'


def test_fashion_mnist(main, server, tmp_path, capsys, monkeypatch):
    source = write_fashion_mnist(tmp_path / 'source', gz=True)
    expect_fashion_mnist(monkeypatch, source)
    for path in source.iterdir():
        server.files[f'/{path.name}'] = path.read_bytes()
    for name, options in (
        ('copied', ['--source', str(source)]),
        ('downloaded', ['--url-base', server.url, '--remove-archives']),
    ):
        out = tmp_path / name
        assert main(['fashion-mnist', '--out', str(out), *options]) == 0
        assert capsys.readouterr().out == f'{out}: written, 50 train images, 20 test images\n'
        assert len(list(out.iterdir())) == 4
        assert main(['fashion-mnist', '--out', str(out), *options]) == 0
        assert capsys.readouterr().out == f'{out}: already there\n'

    write_fashion_mnist(out, seed=1)
    copy = ['fashion-mnist', '--out', str(out), '--source', str(source)]
    assert main(copy) == 2
    assert 'or replace it with --overwrite' in capsys.readouterr().err
    assert main([*copy, '--overwrite']) == 0


@pytest.mark.parametrize('options', [['--url-base', 'http://mirror'], ['--remove-archives']])
def test_options_of_a_download_without_one(main, tmp_path, capsys, options):
    command = ['fashion-mnist', '--out', str(tmp_path / 'out'), '--source', str(tmp_path)]
    assert main([*command, *options]) == 2
    assert capsys.readouterr().err == (
        'error: --url-base and --remove-archives are for a download: leave them out with --source\n'
    )


def test_defaults_are_where_the_configs_look(main, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(download, 'prepare_coco', lambda *args: calls.append(args) or [])
    assert main(['coco']) == 0
    assert calls == [
        ('data/coco', ['train2017', 'val2017'], 'http://images.cocodataset.org', False)
    ]
    calls.clear()
    monkeypatch.setattr(download, 'prepare_cifar', lambda *args: calls.append(args) or [])
    for name in ('cifar10', 'cifar100'):
        assert main([name]) == 0
    server = 'https://www.cs.toronto.edu/~kriz'
    assert calls == [
        ('cifar10', 'data/cifar10', server, False),
        ('cifar100', 'data/cifar100', server, False),
    ]
    calls.clear()
    monkeypatch.setattr(fashion_mnist, 'prepare_fashion_mnist', lambda *args: calls.append(args))
    assert main(['fashion-mnist']) == 0
    assert calls == [('data/fashion-mnist', None, fashion_mnist.URL_BASE, False, False)]
    with pytest.raises(SystemExit):
        main(['coco', '--splits', 'test2017'])
    assert 'invalid choice' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_from_images(main, tmp_path, capsys, monkeypatch, name):
    results, calls = [{'train': 5, 'test': 2}, None], []
    monkeypatch.setattr(
        class_folders, 'prepare_from_classes', lambda *args: calls.append(args) or results.pop(0)
    )
    command = [name, '--source', 'images', '--out', str(tmp_path)]
    assert main(command) == main(command) == 0
    assert calls == [(name, 'images', str(tmp_path))] * 2
    written, again = capsys.readouterr().out.splitlines()
    assert written == f'{tmp_path}: written, 5 train images, 2 test images'
    assert again == f'{tmp_path}: already there'
    for option in (['--remove-archives'], ['--url-base', 'http://127.0.0.1:9']):
        assert main([*command, *option]) == 2
        assert 'are for a download: leave them out with --source' in capsys.readouterr().err


@pytest.mark.parametrize(('name', 'module', 'function', 'default'), [
    ('efficientnet-lite0', efficientnet_lite, 'prepare_lite0', None),
    ('yolox-nano', yolox_nano, 'prepare_yolox_nano', 'x.pth'),  # which has to be given
])  # fmt: skip
def test_weights(name, module, function, default, main, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(module, function, lambda *args: calls.append(args) or 'the file')
    source = ['--source', 'x.pth']
    assert main([name, *(source if default else [])]) == 0
    assert main([name, '--out', str(tmp_path), *source]) == 0
    assert calls == [('data', default), (str(tmp_path), 'x.pth')]
    assert capsys.readouterr().out == 'the file: written\n' * 2


def test_voc2007(main, tmp_path, capsys, monkeypatch):
    counts = {'images': 2, 'objects': 1, 'sizes': {'small': 1, 'medium': 0, 'large': 0}}
    calls = []
    monkeypatch.setattr(
        voc2007,
        'prepare_voc2007',
        lambda *args: calls.append(args) or ('written', {'train': counts, 'val': counts}),
    )
    assert main(['voc2007']) == 0
    assert capsys.readouterr().out.splitlines()[0] == 'data/voc2007: written'
    command = ['voc2007', '--out', str(tmp_path), '--source', 'VOCdevkit']
    assert main([*command, '--ids', 'a', 'b', '--size', '320', '--skip-missing']) == 0
    url = voc2007.URL_BASE
    assert calls == [
        ('data/voc2007', None, [], False, None, url, False),
        (str(tmp_path), 'VOCdevkit', ['a', 'b'], True, 320, url, False),
    ]
    for options, message in (
        (['--remove-archives'], 'are for a download: leave them out with --source'),
        (['--ids', 'a', 'b', 'c'], '--ids takes one or two files, not 3'),
        (['--size', '8'], '--size must be at least 32 px, not 8'),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err


def test_yolo_and_check(main, tmp_path, capsys):
    """What one writes, the other finds right, until a file is damaged."""
    source, out, sheet = (tmp_path / name for name in ('source', 'out', 'sheet.png'))
    for split, colour in (('train', 'red'), ('val', 'blue')):
        for kind in ('images', 'labels'):
            (source / kind / split).mkdir(parents=True)
        Image.new('RGB', (64, 64), colour).save(source / f'images/{split}/a.jpg')
        (source / f'labels/{split}/a.txt').write_text('0 0.5 0.5 0.25 0.25')
    command = ['yolo', '--source', str(source), '--out', str(out), '--classes', 'cat']
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f'{out}: written\nsplit ')
    checks = (
        ['check', str(out), '--sheet', str(sheet)],
        ['check', '--ann', f'{out}/val.json', '--images', f'{out}/images', '--sheet', str(sheet)],
    )
    for check in checks:
        assert main(check) == 0
        shown = capsys.readouterr().out
        assert 'wrong' not in shown
        assert shown.endswith(f'{sheet}: written\n')
    (out / 'images/val/a.jpg').unlink()
    for check in checks:
        assert main(check) == 1
        assert 'wrong: val: 1 images do not exist, such as ' in capsys.readouterr().out
    for options in ([], ['--ann', 'a.json'], [str(out), '--ann', 'a.json', '--images', 'b']):
        assert main(['check', *options]) == 2
        assert 'give either a folder, or --ann FILE' in capsys.readouterr().err
    for name in ('no/sheet.png', 'sheet.xyz'):  # said before the images are looked at
        assert main(['check', str(out), '--sheet', str(tmp_path / name)]) == 2
        assert 'must be a .png or .jpg file in a folder that exists' in capsys.readouterr().err
