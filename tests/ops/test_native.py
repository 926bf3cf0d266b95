"""Which kernels are in use, how that is chosen, and how they are built."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from running import ROOT

import mmdet_moe
from mmdet_moe.errors import ConfigError
from mmdet_moe.ops import build, native

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
    nvcc = shutil.which('nvcc')
    if not nvcc or not torch.backends.cuda.is_built():
        return
    version = subprocess.run([nvcc, '--version'], capture_output=True, text=True, check=True)
    if f'release {torch.version.cuda.split(".")[0]}.' not in version.stdout:
        return
    assert native.is_native(torch.device('cuda')), record.get('cuda')
    if not os.environ.get('MMDET_MOE_CUDA_ARCHITECTURES'):
        known = subprocess.run(
            [nvcc, '--list-gpu-arch'], capture_output=True, text=True, check=True
        )
        wanted = {'80', '90', '100'} & set(re.findall(r'compute_(\d+)', known.stdout))
        assert {f'sm_{a}' for a in wanted} <= set(record['cuda'].architectures), record


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
    assert done.returncode == 2
    assert done.stderr == "error: MMDET_MOE_OPS='fast' is unknown; use 'native' or 'reference'\n"
    done = run('-c', 'import mmdet_moe.ops', choice='fast')
    assert "ConfigError: MMDET_MOE_OPS='fast' is unknown" in done.stderr


def test_status_names_compiler_and_architectures():
    needs_native()
    cpu = run('-m', 'mmdet_moe.ops').stdout.splitlines()[0]
    assert cpu.startswith('cpu   native')
    assert build.read_record()[0].architectures[0] in cpu


@pytest.mark.parametrize(
    ('capability', 'built', 'runs'),
    [
        ((9, 0), ('sm_90',), True),
        ((8, 6), ('sm_80', 'sm_90'), True),  # a later one of the same major number
        ((8, 0), ('sm_86', 'sm_90'), False),  # an earlier one
        ((9, 0), ('sm_80',), False),  # machine code is for one major number
        ((9, 0), ('sm_80', 'PTX 80'), True),  # PTX for all later ones
        ((12, 0), ('sm_100', 'PTX 100'), True),
        ((12, 1), ('sm_100', 'sm_120'), True),
        ((7, 0), ('sm_75', 'sm_80', 'sm_90', 'PTX 90'), False),
        ((7, 0), ('sm_75', 'PTX 75'), False),
        ((10, 3), ('sm_120', 'PTX 120'), False),
    ],
)
def test_what_runs_on_a_gpu(capability, built, runs):
    assert native.runs_on(capability, built) == runs


# As if there were two GPUs, of which the first is too old, and CUDA started now.
GPUS = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_capability = lambda gpu: [(6, 1), (7, 5)][gpu]
torch.cuda.get_device_name = lambda gpu: ['GTX 1080', 'T4'][gpu]
torch._C._cuda_init = lambda: None
torch.cuda._queued_calls.clear()  # PyTorch's own
from mmdet_moe.ops import native
torch.cuda.init()
dump = torch._C._dispatch_dump('mmdet_moe::dispatch').splitlines()
(line,) = [line for line in dump if line.startswith('CUDA: ')]
print('library.py' in line, native.is_native(torch.device('cuda')), native.kernels()[1].detail)
"""


@pytest.mark.parametrize('is_first', [True, False])
def test_a_gpu_that_the_binary_has_no_code_for(is_first):
    """The reference serves from when CUDA starts, before or after the import; one line says so."""
    built = {entry.device: entry for entry in build.read_record()}['cuda'].architectures
    if not native._loaded['cuda'].native or native.runs_on((6, 1), built):
        pytest.skip('there are no compiled kernels for CUDA, or for that GPU as well')
    code = GPUS if is_first else GPUS.replace('from mmdet', 'torch.cuda.init()\nfrom mmdet')
    done = run('-c', code)
    detail = (
        f'GTX 1080 has the architecture sm_61, but they are built for {", ".join(built)}; build '
        f"for it with `MMDET_MOE_CUDA_ARCHITECTURES='61;75' {build.COMMAND}`"
    )
    assert done.stdout == f'True False {detail}\n', done.stderr
    (line,) = done.stderr.splitlines()
    assert line.endswith(f'PyTorch reference ops on cuda, slower than compiled ones ({detail})')


def test_a_gpu_and_kernels_that_are_insisted_on(monkeypatch):
    monkeypatch.setitem(native._loaded, 'cpu', native.Kernels('cpu', True, ''))
    monkeypatch.setitem(native._loaded, 'cuda', native.Kernels('cuda', True, ''))
    monkeypatch.setenv(native.VARIABLE, 'native')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda gpu: (7, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda gpu: 'V100')
    native._check_gpus(('sm_70',))
    assert native._loaded['cuda'].native
    message = (
        r'native, but there are no compiled kernels for cuda \(V100 has the architecture sm_70,'
    )
    with pytest.raises(ConfigError, match=message):
        native._check_gpus(('sm_75', 'PTX 75'))


@pytest.fixture
def copy(tmp_path):
    """The package without binaries, to be changed at will."""
    ignore = shutil.ignore_patterns('lib', '__pycache__')
    shutil.copytree(ROOT / 'mmdet_moe', tmp_path / 'mmdet_moe', ignore=ignore)
    return tmp_path


def test_one_line_says_that_the_reference_serves(copy):
    code = 'import torch, mmdet_moe.ops as o; print(o.sort_routes(torch.tensor([[1], [0]]), 2)[1])'
    done = run('-c', code, PYTHONPATH=str(copy))
    assert done.stdout.strip() == 'tensor([[1],\n        [0]])'
    (line,) = done.stderr.splitlines()
    assert LINE in line
    assert 'not built; run `python -m mmdet_moe.ops --build`' in line
    # On many ranks, the first one says it for all.
    assert run('-c', code, PYTHONPATH=str(copy), RANK='3').stderr == ''
    done = run('-c', code, PYTHONPATH=str(copy), choice='native')
    assert 'there are no compiled kernels for cpu' in done.stderr
    done = run('-m', 'mmdet_moe.ops', PYTHONPATH=str(copy), choice='native')
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: MMDET_MOE_OPS=native, but there are no compiled kernels for cpu')


@pytest.mark.parametrize('text', ['[{"device": "cp', '[{"device": "cpu", "x": 1}]', '[1]', 'null'])
def test_a_damaged_record_counts_as_not_built(copy, text):
    folder = copy / 'mmdet_moe/ops/lib'
    folder.mkdir()
    (folder / build.RECORD).write_text(text)
    entries = build.read_record(folder)
    assert [(entry.device, entry.file) for entry in entries] == [('cpu', None), ('cuda', None)]
    reason = f'the record {folder / build.RECORD} cannot be read; run `{build.COMMAND}` again'
    assert entries[0].reason == reason
    if text == 'null':
        done = run('-m', 'mmdet_moe.ops', PYTHONPATH=str(copy))
        assert (done.returncode, done.stderr) == (0, '')
        assert reason in done.stdout


def compiler(tmp_path, monkeypatch, script):
    """Set CXX to a shell script."""
    file = tmp_path / 'compiler'
    file.write_text(f'#!/bin/sh\n{script}\n')
    file.chmod(0o755)
    monkeypatch.setenv('CXX', str(file))


def test_building_whatever_is_asked_for(copy, monkeypatch):
    """A damaged record and MMDET_MOE_OPS=native are what building mends; status 1 if it fails."""
    folder = copy / 'mmdet_moe/ops/lib'
    folder.mkdir()
    (folder / build.RECORD).write_text('[')
    monkeypatch.setenv('CUDA_HOME', '/nowhere')
    monkeypatch.setenv('PATH', '/nowhere')
    compiler(copy, monkeypatch, 'echo "x.cpp:1: error: no" >&2; exit 1')
    arguments = ('-m', 'mmdet_moe.ops', '--build')
    done = run(*arguments, PYTHONPATH=str(copy), choice='native')
    assert done.returncode == 1
    assert 'cpu: the compilation failed: x.cpp:1: error: no' in done.stdout
    assert done.stderr.startswith('failed: ')  # the command
    assert '-shared' in done.stderr
    assert [entry.failed for entry in build.read_record(folder)] == [True, False]
    monkeypatch.delenv('CXX')
    done = run(*arguments, PYTHONPATH=str(copy))
    assert done.returncode == 0, done.stderr
    assert 'cpu: there is no C++ compiler' in done.stdout


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
    assert built(tmp_path) == 'the compilation failed: no message'
    monkeypatch.setenv('CXX', '/nowhere/c++')
    assert 'the compiler cannot be run' in built(tmp_path)


def test_the_reason_is_short(tmp_path, monkeypatch, capfd):
    file = build.CSRC / 'cpu' / 'sort.cpp'
    script = f'echo In file; echo "{file}:1: error: {"long " * 100}"; echo error: two'
    compiler(tmp_path, monkeypatch, f'({script}) >&2; exit 1')
    reason = built(tmp_path / 'lib')
    assert reason.startswith('the compilation failed: cpu/sort.cpp:1: error: long long')
    assert len(reason) < build.LONGEST_MESSAGE + 30
    assert f'failed: {tmp_path}/compiler -shared' in capfd.readouterr().err


def test_a_failed_build_keeps_what_works(tmp_path, monkeypatch):
    folder = tmp_path / 'lib'
    compiler(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo built > "$2"')
    (first,) = build.build(folder, ('cpu',))
    assert (first.file, first.reason, first.failed) == ('mmdet_moe_cpu.so', None, False)
    compiler(tmp_path, monkeypatch, 'exit 1')
    (second,) = build.build(folder, ('cpu',))
    assert second.failed
    assert second.reason == 'the compilation failed: no message; what was built before is kept'
    assert build.read_record(folder) == [first]
    assert (folder / first.file).read_text() == 'built\n'
    monkeypatch.setattr(build, 'digest', lambda device: 'other sources')
    assert 'kept' not in built(folder)
    assert [path.name for path in folder.iterdir()] == [build.RECORD]  # nothing temporary either


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', 'false')
    file = tmp_path / 'file'
    file.touch()
    with pytest.raises(build.BuildError, match=f'the folder {file}/lib cannot be written'):
        build.build(file / 'lib')
    (tmp_path / build.RECORD / 'a folder').mkdir(parents=True)
    with pytest.raises(build.BuildError, match=f'the folder {tmp_path} cannot be written'):
        build.build(tmp_path, ('cpu',))

    def refuse(**_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(build.tempfile, 'mkstemp', refuse)
    with pytest.raises(build.BuildError, match=r'cannot be written \(Permission denied\)$'):
        build.build(tmp_path / 'lib')


def test_only_sources_are_digested(copy, monkeypatch):
    csrc = copy / 'mmdet_moe/ops/csrc'
    monkeypatch.setattr(build, 'CSRC', csrc)
    before = build.digest('cpu'), build.digest('cuda')
    (csrc / 'cpu' / '.idea').mkdir()
    (csrc / 'cpu' / '.sort.cpp.swp').touch()
    (csrc / 'cpu' / '.#sort.cpp').symlink_to('someone@somewhere')
    assert (build.digest('cpu'), build.digest('cuda')) == before
    (csrc / 'cpu' / 'more.h').write_text('//')
    (csrc / 'cuda' / 'more.cuh').write_text('//')
    assert build.digest('cpu') != before[0]
    assert build.digest('cuda') != before[1]


@pytest.mark.skipif(not (ROOT / 'setup.py').exists(), reason='without a checkout')
def test_setup_goes_on(tmp_path):
    pytest.importorskip('setuptools')
    (tmp_path / 'mmdet_moe').mkdir()
    (tmp_path / 'mmdet_moe/ops').touch()
    done = run('setup.py', '-q', 'build_ext', '--build-lib', str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f'no native kernels: the folder {tmp_path}/mmdet_moe/ops/lib cannot be' in done.stderr
    # As with an old setuptools.
    code = (
        'import runpy, sys; sys.modules["setuptools.command.bdist_wheel"] = None; '
        'sys.argv = ["setup.py", "--version"]; runpy.run_path("setup.py", run_name="__main__")'
    )
    done = run('-c', code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == mmdet_moe.__version__


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


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason='PyTorch without CUDA')
def test_architectures_that_name_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, 'which', lambda name, path=None: f'/opt/bin/{name}')
    output = f'release {torch.version.cuda}, compute_80'
    monkeypatch.setattr(build, '_output', lambda command: output)
    monkeypatch.setenv('MMDET_MOE_CUDA_ARCHITECTURES', ';')
    assert built(tmp_path, 'cuda').startswith("MMDET_MOE_CUDA_ARCHITECTURES=';' names none; use")
    monkeypatch.delenv('MMDET_MOE_CUDA_ARCHITECTURES')
    monkeypatch.setattr(build, 'CUDA_ARCHITECTURES', ('75',))
    assert built(tmp_path, 'cuda').startswith("nvcc knows ['80'], none of ['75']; set")


# A step takes 96 MiB of results above the limit of the store, and lets go of them.
STORE = """
import resource, torch
from mmdet_moe.ops import combine, dispatch, sort_routes
ids = torch.rand(16384, 8).topk(2).indices
_, inverse = sort_routes(ids, 8)
x, weights = torch.rand(16384, 512), torch.rand(16384, 2)
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    combine(dispatch(x, inverse, 32768), weights, inverse)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step(), step()
print(step() + step())
kept = [dispatch(x * factor, inverse, 32768) for factor in range(20)]  # 1.3 GB at once
rows = x.index_select(0, inverse.flatten().argsort() // 2)
assert all(torch.equal(y, rows * factor) for factor, y in enumerate(kept))
del kept
def memory():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
print(memory())
_, many = sort_routes(torch.rand(16384, 20).topk(17).indices, 20)
dispatch(x, many, many.numel())  # 570 MB: more than may be kept
print(memory())
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux only')
def test_large_results_reuse_memory_and_give_back_what_is_too_much():
    needs_native()
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 11):
        pytest.skip('tensors with a deleter exist since PyTorch 2.11')
    done = run('-c', STORE)
    assert done.returncode == 0, done.stderr
    faults, memory, after_a_huge_one = map(int, done.stdout.split())
    assert faults < 500  # of 24,576 pages of 4 KiB
    assert memory < 1.3e9  # 0.5 GB are kept; Python, PyTorch and the inputs are the rest
    assert abs(after_a_huge_one - memory) < 1e8  # it is not kept, and drives out nothing
