"""The CUDA kernels as C++ on the CPU, under AddressSanitizer and UBSan; no GPU is needed.

``emulation/`` stands in for CUDA: threads are fibers, CUB's sort is a loop. The tests of the ops
run in a process of their own, in which the emulated kernels serve the CPU. With --all these are all
cases, and then mistakes are planted in the kernels, each of which has to be found.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from running import ROOT

from mmdet_moe.ops import build, native

EMULATION = Path(__file__).with_name('emulation')
LAUNCH = re.compile(r'(\w+(?:<[\w, ]+>)?)<<<([^<>]+), (\w+), 0, stream>>>\((.*?)\);', re.DOTALL)
PARITY = [f'tests/ops/test_{name}.py' for name in ('library', 'ops', 'entmax', 'random')]
# The first wants the sentence of the CPU. Each shuffle switches fibers: large rows take minutes.
LEFT_OUT = ['refuses_unknown', 'caches', '30000']
SLOW = ['20000', '8193', '8192']  # seconds each


@dataclass(frozen=True)
class Mistake:
    """A mistake in a kernel, and how it shows up."""

    file: str
    right: str
    wrong: str
    sign: str
    tests: str = 'tests/ops/test_random.py'


OVERFLOW, DIFFERENT = 'AddressSanitizer: heap-buffer-overflow', 'AssertionError'
BOUNDS = 'index 513 out of bounds'
ANY = f'{OVERFLOW}|{DIFFERENT}'
ALONE = 'emulation: threads wait for others'
DIRECT, SORT = 'tests/ops/test_library.py', 'tests/ops/test_ops.py'
MISTAKES = {
    'columns beyond a row are read': Mistake(
        'common.cuh', 'present && c < width ?', 'present ?', OVERFLOW
    ),
    'columns beyond a row are written': Mistake('routes.cuh', 'if (c < width) out[', 'out[', ANY),
    'addresses are taken to be aligned': Mistake(
        'common.cuh', '|= reinterpret_cast<uintptr_t>(address)', '|= 0', 'misaligned address'
    ),
    'threads leave before a shuffle': Mistake(
        'combine.cu', '// No thread may leave early:', 'if (!place.active) return; //', ALONE
    ),
    'the row behind the last is read': Mistake(
        'routes.cuh', 'sources.row[i] < num_rows;', 'sources.row[i] <= num_rows;', OVERFLOW
    ),
    'a row before the first is read': Mistake(
        'routes.cuh', '= sources.row[i] >= 0 && sources', '= sources', OVERFLOW, DIRECT
    ),
    'a row before the first is written': Mistake(
        'dispatch.cu', 'rows[i] < 0 || rows', 'rows', OVERFLOW, DIRECT
    ),
    'all segments write one part': Mistake(
        'combine.cu', '* layout.segments + place.segment]', '* layout.segments]', DIFFERENT
    ),
    'a product behind the last is written': Mistake(
        'combine.cu', 'place.lane == 0 && j + i < k', 'place.lane == 0', ANY
    ),
    'sums begin with anything': Mistake(
        'routes.cuh', 'sums[kDepth][kCount] = {};', 'sums[kDepth][kCount];', DIFFERENT
    ),
    'a shuffle reaches into other rows': Mistake(
        'combine.cu', '(1u << lane_bits) >> 1;', '1u << lane_bits;', DIFFERENT
    ),
    'an offset is not written': Mistake(
        'sort.cu', 'e <= key; ++e) offsets', 'e < key; ++e) offsets', DIFFERENT
    ),
    'a bit of the keys is not sorted by': Mistake(
        'sort.cu', '<uint32_t>(num_experts))', '<uint32_t>(num_experts - 1))', DIFFERENT
    ),
    'one block takes too many routes': Mistake(
        'sort.cu', 'count <= kMostRoutes &&', 'count <= kMostRoutes + 1 &&', DIFFERENT, SORT
    ),
    'one block takes too many experts': Mistake(
        'sort.cu', '_experts <= kMostExperts)', '_experts <= kMostExperts + 1)', BOUNDS, SORT
    ),
    'counters begin with anything': Mistake(
        'sort.cu', 'before[warp][key] = 0;', '(void)key;', DIFFERENT, SORT
    ),
    'routes of a key change places': Mistake(
        'sort.cu', 'peers & ((1u << lane) - 1)', 'peers >> lane >> 1', DIFFERENT, SORT
    ),
    'a counter is written before all have read it': Mistake(
        'sort.cu', '__syncwarp();  // all have read', '// all have read', DIFFERENT, SORT
    ),
    'a sum is written before all have read it': Mistake(
        'sort.cu', '__syncthreads();  // all have read', '// all have read', DIFFERENT, SORT
    ),
    'the stretches are counted too early': Mistake(
        'sort.cu', '__syncthreads();  // all stretches', '// all stretches', DIFFERENT, SORT
    ),
    'buffers overlap': Mistake('sort.cu', '{count} * 4 + 255)', '{count} * 3 + 255)', ANY),
    # With other sums than their neighbours, threads leave the loop alone.
    'shared memory is written too early': Mistake(
        'entmax.cu', '__syncthreads();  // the parts before', '// the parts before', ALONE
    ),
    'shared memory is read too early': Mistake(
        'entmax.cu', '__syncthreads();\n    value = parts', 'value = parts', ALONE
    ),
    'rows behind the last are read': Mistake(
        'entmax.cu', 'if (row >= rows) return;  // all', '// all', OVERFLOW
    ),
}


def translate(folder, mistake=None):
    """The CUDA sources as C++ in a folder, with a mistake if wanted; the one file to compile.

    With a mistake in one source, that holds no other: the reference serves the rest of the ops.
    """
    for source in [build.CSRC / 'arguments.h', *sorted((build.CSRC / 'cuda').glob('*.cu*'))]:
        text = source.read_text()
        if mistake and mistake.file == source.name:
            assert text.count(mistake.right) == 1, f'{mistake.right!r} is not once in {source}'
            text = text.replace(mistake.right, mistake.wrong)
        text = LAUNCH.sub(r'::emulation::launch(\2, \3, [](auto... a) { \1(a...); }, \4);', text)
        assert '<<<' not in text, f'{source} has a launch of another form than {LAUNCH.pattern}'
        target = folder / source.relative_to(build.CSRC)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace('(mmdet_moe, CUDA, m)', '(mmdet_moe, CPU, m)'))
    pattern = mistake.file if mistake and mistake.file.endswith('.cu') else '*.cu'
    # sort.cu first, since what it defines has to stand before CUB.
    units = sorted((folder / 'cuda').glob(pattern), key=lambda unit: unit.stem != 'sort')
    every = folder / 'every.cpp'
    every.write_text(''.join(f'#include "cuda/{unit.name}"\n' for unit in units))
    return every


def compile_flags():
    """The flags for g++; skips the test where a tool is missing."""
    try:
        pytorch = build._find_torch()
    except build.MissingToolError as error:
        pytest.skip(str(error))
    if not shutil.which('g++') or not Path(runtime('libasan.so')).is_absolute():
        pytest.skip('there is no g++ with AddressSanitizer (libasan.so)')
    toolkit = Path(os.environ.get('CUDA_HOME') or '/usr/local/cuda')
    # To those that PyTorch brings, the packages nvidia-cuda-crt and nvidia-cuda-cccl add the rest.
    folders = [toolkit / 'include', *pytorch.folder.parent.glob('nvidia/cu[0-9]*/include')]
    needed = ('cuda_bf16.h', 'crt/host_defines.h', 'nv/target')
    headers = next((f for f in folders if all((f / name).exists() for name in needed)), None)
    if headers is None:
        pytest.skip(f"no headers of CUDA in {toolkit} nor all beside PyTorch's; set CUDA_HOME")
    flags = ['-shared', '-fPIC', *pytorch.flags]
    # Without optimisations nothing is gone before the sanitizers see it, and g++ is twice as fast.
    flags += ['-O0', '-g1', '-fsanitize=address,undefined', '-fno-sanitize-recover=all']
    flags += ['-ftrivial-auto-var-init=pattern', f'-I{EMULATION}', '-include', 'emulate.h']
    return [*flags, '-isystem', str(headers), *pytorch.link_flags('torch_cpu', 'torch')]


def runtime(library):
    """Where a library of g++ is; only its name, if it is not there."""
    command = ['g++', f'-print-file-name={library}']
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(source, flags, *arguments):
    """Compile, and run pytest with the emulated kernels in the place of those of the CPU."""
    library = source.with_suffix('.so')
    command = ['g++', str(source), '-o', str(library), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    env = {
        **os.environ,
        native.VARIABLE: 'reference',
        'EMULATED_CUDA_KERNELS': str(library),
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': '1',
        'LD_PRELOAD': f'{runtime("libasan.so")} {runtime("libstdc++.so")}',
        # Fresh memory holds NaNs and negative numbers.
        'ASAN_OPTIONS': f'detect_leaks=0:max_malloc_fill_size={1 << 30}:malloc_fill_byte=255',
    }
    # What the sanitizers say before they end the process is not captured.
    command = [sys.executable, '-m', 'pytest', '--capture=sys', '-p', 'no:cacheprovider']
    command += ['-p', 'no:xdist', *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


def native_but(names):
    """Arguments for the tests of the emulated kernels but for those with one of the names."""
    return ['-k', ' and not '.join(['native and cpu', *names])]


def test_kernels_under_sanitizers(request, tmp_path):
    flags = compile_flags()
    if request.config.getoption('--all'):
        arguments, least = ['--all', *native_but(LEFT_OUT)], 1000
    else:
        arguments, least = native_but(LEFT_OUT + SLOW), 100
    done = run(translate(tmp_path), flags, *PARITY, *arguments)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) > least
    assert 'skipped' not in done.stdout


@pytest.mark.parametrize('name', MISTAKES)
def test_a_planted_mistake_is_found(name, request, tmp_path):
    """Without --all, whether the mistake can still be planted."""
    mistake = MISTAKES[name]
    source = translate(tmp_path, mistake)
    if request.config.getoption('--all'):
        done = run(
            source, compile_flags(), '-x', mistake.tests, '--all', *native_but(LEFT_OUT + SLOW)
        )
        said = done.stdout + done.stderr
        assert done.returncode != 0, said[-5000:]
        assert re.search(mistake.sign, said), said[-5000:]
