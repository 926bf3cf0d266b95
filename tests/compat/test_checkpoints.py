"""Reading a checkpoint runs no code from it, and writing one never spoils another."""

import errno
import os
import pickle
import resource
import runpy
import signal
import zipfile
from contextlib import contextmanager
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmengine.fileio import put
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, save_checkpoint

import mmdet_moe.registry  # noqa: F401  # a program that uses the package
from mmdet_moe.engine.explain import explain
from mmdet_moe.engine.preflight import check_checkpoint
from mmdet_moe.errors import ConfigError
from mmdet_moe.files import remove_left_overs, replace_file


def load(path):
    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu')


@pytest.fixture
def checkpoint(tmp_path):
    """As MMEngine writes them: with histories of the logged numbers, and with numbers of NumPy."""
    history = HistoryBuffer()
    history.update(0.5)
    history.update(np.float64(0.25), 2)
    meta = {'iter': 2, 'score': np.float32(0.5), 'dataset_meta': {'palette': np.eye(3, dtype='i4')}}
    content = {
        'meta': meta,
        'state_dict': {'weight': torch.arange(3.0)},
        'message_hub': {'log_scalars': {'train/loss': history}},
    }
    path = tmp_path / 'iter_2.pth'
    save_checkpoint(content, str(path))
    return path


def check_content(content):
    assert content['state_dict']['weight'].tolist() == [0, 1, 2]
    assert content['meta']['score'] == np.float32(0.5)
    assert content['meta']['dataset_meta']['palette'].tolist() == np.eye(3).tolist()
    history = content['message_hub']['log_scalars']['train/loss']
    assert history.statistics('mean') == pytest.approx((0.5 + 0.25) / 3)


@pytest.mark.parametrize('reader', [load, torch.load])
def test_what_mmengine_writes(checkpoint, reader):
    check_content(reader(checkpoint))


def test_published(checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', raising=False)
    tool = Path(mmdet.__file__).parent / '.mim/tools/model_converters/publish_model.py'
    runpy.run_path(str(tool))['process_checkpoint'](str(checkpoint), str(tmp_path / 'public.pth'))
    (published,) = tmp_path.glob('public*.pth')  # a process that renames it is not waited for
    assert set(load(published)) == {'meta', 'state_dict'}


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Indirect:
    """Asks ``getattr``, which stands in every checkpoint of MMEngine, for something else."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


@pytest.mark.parametrize(
    ('make', 'named'),
    [
        (lambda: Malicious(os.mkdir, 'hacked'), '`posix.mkdir`'),
        (lambda: Malicious(eval, 'os.mkdir("hacked")'), '`eval`'),
        (Indirect, '`getattr`'),
    ],
)
@pytest.mark.parametrize('zipped', [True, False])
def test_code_is_refused(tmp_path, monkeypatch, make, named, zipped):
    monkeypatch.chdir(tmp_path)
    content = {'state_dict': {}, 'meta': make()}
    torch.save(content, 'bad.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConfigError, match='run code of whoever wrote') as error:
        load('bad.pth')
    assert named in str(error.value)
    assert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1' in str(error.value)
    assert 'bad.pth' in str(error.value)
    assert not Path('hacked').exists()


def test_code_behind_an_address_is_refused(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    torch.save({'meta': Malicious(os.mkdir, 'hacked')}, 'bad.pth')
    server.files['/bad.pth'] = Path('bad.pth').read_bytes()
    with pytest.raises(ConfigError, match='run code of whoever wrote'):
        load(f'{server.url}/bad.pth')
    assert not Path('hacked').exists()


def test_an_address_can_be_trusted(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'YES')  # as PyTorch reads it
    torch.save({'meta': Malicious(os.mkdir, 'made')}, 'mine.pth')
    server.files['/mine.pth'] = Path('mine.pth').read_bytes()
    load(f'{server.url}/mine.pth')
    assert Path('made').is_dir()


def test_files_can_be_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    torch.save({'meta': Malicious(os.mkdir, 'made')}, 'mine.pth')
    load('mine.pth')
    assert Path('made').is_dir()


def test_cut_at_any_byte(checkpoint, tmp_path):
    whole, cut = checkpoint.read_bytes(), tmp_path / 'cut.pth'
    for size in {*range(0, len(whole), 97), len(whole) - 1}:
        cut.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match='incomplete'):
            check_checkpoint(str(cut), 'checkpoint')
        with pytest.raises(ConfigError, match='damaged'):
            load(cut)


def test_old_formats_cut_at_any_byte(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save({'weight': torch.ones(9)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r'damaged|run code of'):  # by half a name
            load(path)


def test_another_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / 'other.pth', 'w') as file:
        file.writestr('picture.txt', 'no weights')
    with pytest.raises(ConfigError, match='damaged, or no checkpoint'):
        load(tmp_path / 'other.pth')


# Writing ------------------------------------------------------------------------------------------


@contextmanager
def small_files():
    """No file may be larger than 1,000 bytes: not a fixture, as pytest writes before its end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk(checkpoint):
    before = checkpoint.read_bytes()
    with small_files(), pytest.raises(OSError, match='File too large') as error:
        save_checkpoint({'state_dict': {'weight': torch.ones(999)}}, str(checkpoint))
    assert error.value.errno == errno.EFBIG
    sentence = explain(error.value)
    assert sentence.startswith(f"'{checkpoint}' cannot be written: File too large")
    assert sentence.endswith('run the command again, a training with --resume')
    assert checkpoint.read_bytes() == before
    assert os.listdir(checkpoint.parent) == [checkpoint.name]


def test_what_is_written_stands_beside_until_it_is_whole(tmp_path, monkeypatch):
    path, synced = tmp_path / 'deep' / 'file', []
    monkeypatch.setattr(os, 'fsync', lambda _: synced.append(path.exists()))
    put(b'old', str(path))
    put(b'new', str(path))
    assert synced == [False, True]
    assert path.read_bytes() == b'new'


def test_links_stay_links_and_devices_devices(tmp_path):
    (tmp_path / 'link').symlink_to('file')
    replace_file(tmp_path / 'link', b'new')
    assert (tmp_path / 'link').is_symlink()
    assert (tmp_path / 'file').read_bytes() == b'new'
    reader, terminal = os.openpty()
    replace_file(os.ttyname(terminal), b'new')
    assert os.read(reader, 9) == b'new'
    os.close(reader)
    os.close(terminal)


def test_left_overs_of_killed_processes_are_removed(tmp_path):
    names = {'.iter_3.pth.123.tmp', '.my.tmp', 'iter_3.pth.123.tmp'}
    for name in names:
        (tmp_path / name).touch()
    remove_left_overs(tmp_path)
    assert set(os.listdir(tmp_path)) == names - {'.iter_3.pth.123.tmp'}


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / 'plain').touch()
    replace_file(tmp_path / 'ours', pickle.dumps(1))
    assert (tmp_path / 'ours').stat().st_mode == (tmp_path / 'plain').stat().st_mode
