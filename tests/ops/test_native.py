"""Which kernels are in use, how that is chosen, and how they are built."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmdet_moe
from mmdet_moe.ops import build, native

ROOT = Path(mmdet_moe.__file__).parents[1]
LINE = 'PyTorch reference ops on cpu, slower than compiled ones'


def run(*arguments, choice=None, **env):
    """A fresh interpreter; ``choice`` is the value of MMDET_MOE_OPS."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), **env}
    env.pop(native.VARIABLE, None)
    if choice is not None:
        env[native.VARIABLE] = choice
    command = [sys.executable, *arguments]
    # Python's -m puts the current folder first.
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=env['PYTHONPATH'], check=False
    )


def needs_native():
    if not native.is_native(torch.device('cpu')):
        pytest.skip('there are no compiled kernels for the CPU')


def test_built_where_it_can_be():
    """An installation with a compiler has the kernels, unless it is told to do without."""
    if os.environ.get(native.VARIABLE) == 'reference':
        pytest.skip('the reference is asked for')
    record = {entry.device: entry for entry in build.read_record()}
    if shutil.which('c++'):
        assert native.is_native(torch.device('cpu')), record.get('cpu')
    if shutil.which('nvcc') and torch.backends.cuda.is_built():
        assert {'sm_80', 'sm_90', 'sm_100'} <= set(record['cuda'].architectures), record
        assert native.is_native(torch.device('cuda'))


def test_the_reference_can_be_forced():
    done = run('-m', 'mmdet_moe.ops', choice='reference')
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [['cpu', 'reference'], ['cuda', 'reference']]
    assert all('MMDET_MOE_OPS=reference asks for it' in line for line in lines)
    assert done.stderr == ''  # asked for: no warning


def test_the_kernels_can_be_forced():
    needs_native()
    code = 'from mmdet_moe.ops import native; print(native.kernels()[0].native)'
    assert run('-c', code, choice='native').stdout.strip() == 'True'


def test_unknown_choice():
    done = run('-m', 'mmdet_moe.ops', choice='fast')
    assert done.returncode != 0
    assert "MMDET_MOE_OPS='fast' is unknown; use 'native' or 'reference'" in done.stderr


def test_status_names_compiler_and_architectures():
    needs_native()
    cpu = run('-m', 'mmdet_moe.ops').stdout.splitlines()[0]
    assert cpu.startswith('cpu   native')
    assert build.read_record()[0].architectures[0] in cpu


@pytest.fixture
def copy(tmp_path):
    """The package without binaries, to be changed at will."""
    ignore = shutil.ignore_patterns('lib', '__pycache__')
    shutil.copytree(ROOT / 'mmdet_moe', tmp_path / 'mmdet_moe', ignore=ignore)
    return tmp_path


def test_one_line_says_that_the_reference_serves(copy):
    code = 'import torch, mmdet_moe.ops as o; print(o.sort_routes(torch.tensor([[1], [0]]), 2)[0])'
    done = run('-c', code, PYTHONPATH=str(copy))
    assert done.stdout.strip() == 'tensor([1, 0])'
    (line,) = done.stderr.splitlines()
    assert LINE in line
    assert 'not built; run `python -m mmdet_moe.ops --build`' in line
    # On many ranks, the first one says it for all.
    assert run('-c', code, PYTHONPATH=str(copy), RANK='3').stderr == ''
    done = run('-c', code, PYTHONPATH=str(copy), choice='native')
    assert 'there are no compiled kernels for cpu' in done.stderr


def test_kernels_of_other_sources_are_not_loaded(copy):
    needs_native()
    shutil.copytree(build.LIB, copy / 'mmdet_moe/ops/lib')
    status = run('-m', 'mmdet_moe.ops', PYTHONPATH=str(copy)).stdout
    assert status.startswith('cpu   native')
    source = copy / 'mmdet_moe/ops/csrc/cpu/sort.cpp'
    source.write_text(source.read_text() + '// changed\n')
    status = run('-m', 'mmdet_moe.ops', PYTHONPATH=str(copy)).stdout
    assert status.startswith('cpu   reference built of other sources than these; run')


def test_a_broken_binary_is_not_loaded(copy):
    needs_native()
    shutil.copytree(build.LIB, copy / 'mmdet_moe/ops/lib')
    binary = copy / 'mmdet_moe/ops/lib' / build.read_record()[0].file
    binary.write_bytes(b'no library')
    status = run('-m', 'mmdet_moe.ops', PYTHONPATH=str(copy)).stdout
    assert status.startswith('cpu   reference')
    assert 'run `python -m mmdet_moe.ops --build` again' in status


def built(tmp_path, device='cpu'):
    (result,) = build.build(tmp_path, (device,))
    assert json.loads((tmp_path / build.RECORD).read_text())[0]['reason'] == result.reason
    assert result.file is None
    assert not list(tmp_path.glob('*.so'))
    return result.reason


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(build.shutil, 'which', lambda *a, **k: None)
    assert built(tmp_path) == ('there is no C++ compiler; install g++ (12 or later) or set CXX')
    if torch.backends.cuda.is_built():
        assert built(tmp_path / 'cuda', 'cuda').startswith('there is no nvcc; install the CUDA')


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'false')
    assert 'failed: no message' in built(tmp_path)
    monkeypatch.setenv('CXX', '/nowhere/c++')
    assert 'the compiler cannot be run' in built(tmp_path)


@pytest.mark.parametrize(
    ('version', 'reason'),
    [
        (None, 'PyTorch is not installed yet; run `python -m mmdet_moe.ops --build` once it is'),
        ('2.9.1', 'PyTorch 2.9.1 has no stable ABI for it; install 2.10 or later'),
        ('2.10.0', 'PyTorch 2.10.0 in this environment is built without CUDA'),
    ],
)
def test_torch_of_the_environment(tmp_path, monkeypatch, version, reason):
    """Found by its files, without importing it."""
    origin = None
    if version:
        (tmp_path / 'torch').mkdir()
        origin = tmp_path / 'torch' / '__init__.py'
        (tmp_path / 'torch' / 'version.py').write_text(f"__version__ = '{version}'\ncuda = None\n")
    spec = origin and type('Spec', (), {'origin': str(origin)})
    monkeypatch.setattr(build.importlib.util, 'find_spec', lambda name: spec)
    monkeypatch.setattr(build, '_output', lambda command: '\n')
    assert built(tmp_path / 'lib', 'cuda') == reason


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason='PyTorch without CUDA')
def test_nvcc_of_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, 'which', lambda name, path=None: f'/opt/bin/{name}')
    monkeypatch.setattr(build, '_output', lambda command: 'Cuda compilation tools, release 9.2,')
    reason = built(tmp_path, 'cuda')
    assert reason.startswith('nvcc is 9.2, but PyTorch is built with CUDA')


# A step takes 96 MiB of results above the limit of the store, and lets go of them.
STORE = """
import resource, torch
from mmdet_moe.ops import combine, dispatch, sort_routes
ids = torch.rand(16384, 8).topk(2).indices
order, _, inverse = sort_routes(ids, 8)
x, weights = torch.rand(16384, 512), torch.rand(16384, 2)
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    combine(dispatch(x, order, 2), weights, inverse)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step(), step()
print(step() + step())
kept = [dispatch(x * factor, order, 2) for factor in range(20)]  # 1.3 GB at once
rows = x.index_select(0, order // 2)
assert all(torch.equal(y, rows * factor) for factor, y in enumerate(kept))
del kept
memory = int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
print(memory)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux only')
def test_large_results_reuse_memory_and_give_back_what_is_too_much():
    needs_native()
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 11):
        pytest.skip('tensors with a deleter exist since PyTorch 2.11')
    done = run('-c', STORE)
    assert done.returncode == 0, done.stderr
    faults, memory = map(int, done.stdout.split())
    assert faults < 500  # of 24,576 pages of 4 KiB
    assert memory < 1.3e9  # 0.5 GB are kept; Python, PyTorch and the inputs are the rest
