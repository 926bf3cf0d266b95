"""Compile the native kernels: ``python -m mmdet_moe.ops --build``, and what ``setup.py`` calls.

Standard library only, and nothing is imported from this package: ``setup.py`` loads this file by
its path, in an environment that may lack PyTorch. The sources use PyTorch's stable ABI alone, so
all that is needed of PyTorch is its headers and the names of its libraries; the binaries then work
with every PyTorch from 2.10 on and with every Python.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

CSRC = Path(__file__).with_name('csrc')
LIB = Path(__file__).with_name('lib')
RECORD = 'build.json'
COMMAND = 'python -m mmdet_moe.ops --build'
DEVICES = ('cpu', 'cuda')
OLDEST_TORCH = (2, 10)
LONGEST_MESSAGE = 200  # characters of a compiler's message
#: Compute capabilities that are built if nvcc knows them; the last one also as PTX, for later GPUs.
CUDA_ARCHITECTURES = ('75', '80', '90', '100')


class BuildError(Exception):
    """Why the kernels of a device cannot be built."""


class MissingToolError(BuildError):
    """There is nothing to build with, which is no failure: the PyTorch reference serves."""


@dataclass(frozen=True)
class Built:
    """What was built for one device, or why not.

    Attributes:
        device: ``'cpu'`` or ``'cuda'``.
        file: Name of the binary; None if there is none.
        reason: Why there is none, or no new one.
        compiler: Its version.
        architectures: Instruction sets (CPU) or compute capabilities (CUDA) in the binary.
        sources: Digest of the sources that it was made of.
        cuda_major: Major version of the CUDA toolkit; 0 for the CPU.
        failed: Whether there was something to build with, and it failed.
    """

    device: str
    file: str | None = None
    reason: str | None = None
    compiler: str | None = None
    architectures: tuple[str, ...] = ()
    sources: str | None = None
    cuda_major: int = 0
    failed: bool = False


@dataclass(frozen=True)
class _Torch:
    folder: Path
    version: str
    cuda: str | None  # the CUDA version that it was built with

    @property
    def flags(self) -> list[str]:
        include = self.folder / 'include'
        target = f'0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000'
        return [
            '-std=c++20',
            '-O3',
            f'-DTORCH_TARGET_VERSION={target}',
            f'-I{include}',
            f'-I{include / "torch" / "csrc" / "api" / "include"}',
        ]

    def link_flags(self, *libraries: str) -> list[str]:
        return [f'-L{self.folder / "lib"}', *(f'-l{library}' for library in libraries)]


def build(folder: Path = LIB, devices: tuple[str, ...] = DEVICES) -> list[Built]:
    """Compile what can be compiled here and write down the rest with the reason.

    Where that fails, kernels of the present sources that were built before are kept.

    Args:
        folder: Where the binaries and their record go.
        devices: For which devices.

    Returns:
        One entry per device.

    Raises:
        BuildError: If the folder cannot be written.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    record = {entry.device: entry for entry in read_record(folder)}
    results = []
    for device in devices:
        try:
            torch = _find_torch()
            result = (_build_cpu if device == 'cpu' else _build_cuda)(torch, folder)
        except BuildError as error:
            failed = not isinstance(error, MissingToolError)
            old = record.get(device)
            if old and old.file and old.sources == digest(device) and (folder / old.file).is_file():
                reason = f'{error}; what was built before is kept'
                results.append(replace(old, reason=reason, failed=failed))
                continue
            with _writing(folder):
                _binary(folder, device).unlink(missing_ok=True)
            result = Built(device, reason=str(error), failed=failed)
        results.append(result)
        record[device] = result
    _write_record(folder, list(record.values()))
    return results


def read_record(folder: Path = LIB) -> list[Built]:
    """What the last :func:`build` wrote down; empty if there was none.

    Of a record that cannot be read, nothing counts as built.
    """
    file = folder / RECORD
    try:
        entries = json.loads(file.read_text())
        return [Built(**{**e, 'architectures': tuple(e['architectures'])}) for e in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, LookupError):
        # Cut short, or of a version with other fields. The reference works without it.
        reason = f'the record {file} cannot be read; run `{COMMAND}` again'
        return [Built(device, reason=reason) for device in DEVICES]


def _write_record(folder: Path, entries: list[Built]) -> None:
    text = json.dumps([asdict(entry) for entry in entries], indent=1) + '\n'
    # Another process that is starting reads either the old record or the new one.
    with _writing(folder), _replacing(folder / RECORD, 0o644) as temporary:
        temporary.write_text(text)


@contextmanager
def _replacing(path: Path, mode: int) -> Iterator[Path]:
    """A new file that takes the place of ``path`` if the body succeeds."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, mode)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tell which folder it is that cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise BuildError(f'the folder {folder} cannot be written ({reason})') from None


def digest(device: str) -> str:
    """Digest of the sources of a device's kernels."""
    sha = hashlib.sha256()
    folder = CSRC / device
    for path in sorted([*_files(CSRC, '.h'), *_files(folder, '.h', '.cuh', '.cpp', '.cu')]):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def _files(folder: Path, *suffixes: str) -> list[Path]:
    # An editor's locks have the suffix of what they lock, and a dot in front.
    return [p for p in folder.glob('*.*') if p.suffix in suffixes and p.name[0] != '.']


def _sources(device: str) -> list[Path]:
    sources = sorted(_files(CSRC / device, '.cpp' if device == 'cpu' else '.cu'))
    if not sources:
        raise BuildError(f'there are no sources in {CSRC / device}')
    return sources


def _binary(folder: Path, device: str) -> Path:
    return folder / f'mmdet_moe_{device}.so'


def _build_cpu(torch: _Torch, folder: Path) -> Built:
    compiler = os.environ.get('CXX') or shutil.which('c++') or shutil.which('g++')
    if not compiler:
        raise MissingToolError('there is no C++ compiler; install g++ (12 or later) or set CXX')
    # Messages name the file from csrc on, not by where it was compiled.
    command = [*shlex.split(compiler), '-shared', '-fPIC', f'-fmacro-prefix-map={CSRC}=csrc']
    # They change no result, and without them loops with a comparison or a root stay scalar.
    command += [*torch.flags, '-fno-math-errno', '-fno-trapping-math']
    if sys.platform == 'darwin':
        command += ['-undefined', 'dynamic_lookup']
    _compile(command, 'cpu', folder, torch.link_flags('torch_cpu', 'torch'))
    architectures = [platform.machine()]
    if b'arch_x86_64_v4' in _binary(folder, 'cpu').read_bytes():
        architectures += ['x86-64-v3', 'x86-64-v4']
    return Built(
        'cpu',
        file=_binary(folder, 'cpu').name,
        compiler=_first_line([*shlex.split(compiler), '--version']),
        architectures=tuple(architectures),
        sources=digest('cpu'),
    )


def _build_cuda(torch: _Torch, folder: Path) -> Built:
    if torch.cuda is None:
        raise MissingToolError(f'PyTorch {torch.version} in this environment is built without CUDA')
    home = os.environ.get('CUDA_HOME') or '/usr/local/cuda'
    nvcc = shutil.which('nvcc', path=f'{home}/bin') or shutil.which('nvcc')
    if not nvcc:
        raise MissingToolError(
            f'there is no nvcc; install the CUDA {torch.cuda} toolkit or set CUDA_HOME'
        )
    version = re.search(r'release (\d+)\.(\d+)', _output([nvcc, '--version']))
    if version is None or version[1] != torch.cuda.split('.')[0]:
        found = 'of an unknown version' if version is None else f'{version[1]}.{version[2]}'
        raise MissingToolError(
            f'nvcc is {found}, but PyTorch is built with CUDA {torch.cuda}; install a toolkit of '
            'the same major version or set CUDA_HOME'
        )
    known = re.findall(r'compute_(\d+)', _output([nvcc, '--list-gpu-arch']))
    architectures = [a for a in CUDA_ARCHITECTURES if a in known]
    if wanted := os.environ.get('MMDET_MOE_CUDA_ARCHITECTURES'):
        architectures = wanted.replace(';', ' ').replace(',', ' ').split()
        if not architectures:
            raise BuildError(
                f"MMDET_MOE_CUDA_ARCHITECTURES={wanted!r} names none; use e.g. '80;90' or unset it"
            )
        if unknown := [a for a in architectures if a not in known]:
            raise BuildError(
                f'MMDET_MOE_CUDA_ARCHITECTURES names {unknown}, but nvcc knows {known}'
            )
    if not architectures:
        raise BuildError(
            f'nvcc knows {known}, none of {list(CUDA_ARCHITECTURES)}; '
            'set MMDET_MOE_CUDA_ARCHITECTURES'
        )
    command = [nvcc, '-shared', '-Xcompiler', f'-fPIC,-fmacro-prefix-map={CSRC}=csrc']
    command += ['-cudart', 'static', '-DUSE_CUDA']
    command += ['--threads', '0', *torch.flags]
    for a in architectures:
        command += ['-gencode', f'arch=compute_{a},code=sm_{a}']
    command += ['-gencode', f'arch=compute_{architectures[-1]},code=compute_{architectures[-1]}']
    _compile(command, 'cuda', folder, torch.link_flags('torch_cpu', 'torch_cuda', 'torch'))
    return Built(
        'cuda',
        file=_binary(folder, 'cuda').name,
        compiler=f'nvcc {version[1]}.{version[2]}',
        architectures=(*(f'sm_{a}' for a in architectures), f'PTX {architectures[-1]}'),
        sources=digest('cuda'),
        cuda_major=int(version[1]),
    )


def _compile(command: list[str], device: str, folder: Path, link_flags: list[str]) -> None:
    # A process that has the old binary loaded keeps it: the new one is another file.
    with _writing(folder), _replacing(_binary(folder, device), 0o755) as temporary:
        command = [*command, *map(str, _sources(device)), '-o', str(temporary), *link_flags]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors='replace', check=False
            )
        except OSError as error:
            raise BuildError(f'the compiler cannot be run: {error}') from None
        if done.returncode:
            # Here only: the reason is repeated by every process that imports the package.
            print(f'failed: {shlex.join(command)}', file=sys.stderr)
            lines = done.stderr.splitlines()
            line = next((line for line in lines if 'error' in line), (lines or ['no message'])[0])
            line = line.replace(f'{CSRC}{os.sep}', '')
            if len(line) > LONGEST_MESSAGE:
                line = line[: LONGEST_MESSAGE - 3] + '...'
            raise BuildError(f'the compilation failed: {line}')


def _find_torch() -> _Torch:
    """PyTorch of this environment, without importing it.

    pip builds in an environment of its own, without PyTorch; a second, isolated interpreter sees
    the one that the package is going to be installed into.
    """
    spec = importlib.util.find_spec('torch')
    origin = spec and spec.origin
    if not origin:
        code = 'import importlib.util as u; s = u.find_spec("torch"); print(s and s.origin or "")'
        origin = _output([sys.executable, '-I', '-c', code]).strip()
    if not origin:
        raise MissingToolError(f'PyTorch is not installed yet; run `{COMMAND}` once it is')
    folder = Path(origin).parent
    values: dict = {}
    exec((folder / 'version.py').read_text(), values)
    version = str(values['__version__'])
    if tuple(map(int, version.split('.')[:2])) < OLDEST_TORCH:
        oldest = '.'.join(map(str, OLDEST_TORCH))
        raise MissingToolError(
            f'PyTorch {version} has no stable ABI for it; install {oldest} or later'
        )
    return _Torch(folder, version, values.get('cuda'))


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors='replace', check=False
        )
    except OSError:
        return ''
    return done.stdout


def _first_line(command: list[str]) -> str:
    return _output(command).partition('\n')[0]
