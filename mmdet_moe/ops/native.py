"""Which kernels serve the ops: the compiled ones, if there are any, or the PyTorch reference."""

import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from mmdet_moe.errors import ConfigError
from mmdet_moe.ops import build

VARIABLE = 'MMDET_MOE_OPS'


@dataclass(frozen=True)
class Kernels:
    """What serves one kind of device.

    Attributes:
        device: ``'cpu'`` or ``'cuda'``.
        native: Whether compiled kernels are loaded; the PyTorch reference serves otherwise.
        detail: Of what, or why not.
    """

    device: str
    native: bool
    detail: str


def _is_tool() -> bool:
    """Whether this is ``python -m mmdet_moe.ops``.

    Python imports this package before it runs that tool, which has to work without the kernels
    that are insisted on: it builds them, and reports by itself. While Python looks for the module
    of ``-m``, that stands in place of the program's name.
    """
    return sys.argv[:1] == ['-m'] and not {'mmdet_moe.ops', '-mmmdet_moe.ops'}.isdisjoint(
        sys.orig_argv
    )


_IS_TOOL = _is_tool()
_loaded: dict[str, Kernels] = {}


def kernels() -> tuple[Kernels, ...]:
    """What serves each kind of device in this process; initialises CUDA, if there is a GPU."""
    if torch.cuda.is_available():
        with suppress(torch.cuda.DeferredCudaCallError):  # what it says, check() says as well
            torch.cuda.init()
    return tuple(_loaded.values())


def is_native(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors of a device."""
    entries = kernels() if device.type == 'cuda' else _loaded.values()
    return any(entry.native for entry in entries if entry.device == device.type)


def load() -> None:
    """Load the binaries, once, after the schemas have been defined.

    ``MMDET_MOE_OPS=reference`` leaves them out, ``MMDET_MOE_OPS=native`` insists on them.

    Raises:
        ConfigError: If they are insisted on and missing, or if the variable has another value.
    """
    asked_for = os.environ.get(VARIABLE) == 'reference'
    for device in build.DEVICES:
        if asked_for:
            _loaded[device] = Kernels(device, False, f'{VARIABLE}=reference asks for it')
        else:
            _loaded[device] = _load(device)
    _tell()
    if _loaded['cuda'].native:
        # Which GPUs there are is known once CUDA is initialised, which an import must not do: it
        # would be too late for CUDA_VISIBLE_DEVICES, and for processes that are forked.
        torch.cuda._lazy_call(partial(_check_gpus, _record('cuda').architectures))


def _tell() -> None:
    """Complain if the reference serves where kernels are insisted on, and warn elsewhere."""
    if _IS_TOOL:
        return
    check()
    if os.environ.get(VARIABLE) != 'reference' and int(os.environ.get('RANK', 0)) == 0:
        for entry in _missing():
            logging.getLogger('mmdet_moe').warning(
                'mmdet_moe: PyTorch reference ops on %s, slower than compiled ones (%s)',
                entry.device,
                entry.detail,
            )


def check() -> None:
    """Check that what ``MMDET_MOE_OPS`` asks for is what serves.

    Raises:
        ConfigError: If not, or if it asks for something unknown.
    """
    choice = os.environ.get(VARIABLE, '')
    if choice not in ('', 'native', 'reference'):
        raise ConfigError(f"{VARIABLE}={choice!r} is unknown; use 'native' or 'reference'")
    if choice == 'native':
        for entry in _missing():
            raise ConfigError(
                f'{VARIABLE}=native, but there are no compiled kernels for {entry.device} '
                f'({entry.detail}); build them (`{build.COMMAND}`), or unset it'
            )


def _check_gpus(built: Sequence[str]) -> None:
    """Let the reference serve if the binary, built for some architectures, lacks that of a GPU.

    Raises:
        ConfigError: As :func:`check`.
    """
    gpus = {i: torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    for gpu, capability in gpus.items():
        if not runs_on(capability, built):
            wanted = ';'.join(f'{major}{minor}' for major, minor in sorted(set(gpus.values())))
            detail = (
                f'{torch.cuda.get_device_name(gpu)} has the architecture '
                f'sm_{capability[0]}{capability[1]}, but they are built for {", ".join(built)}; '
                f"build for it with `MMDET_MOE_CUDA_ARCHITECTURES='{wanted}' {build.COMMAND}`"
            )
            _loaded['cuda'] = Kernels('cuda', False, detail)
            _tell()
            from mmdet_moe.ops import library  # which imports this module

            library.prefer_reference('CUDA')
            return


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a GPU runs what was built for some architectures.

    Machine code runs on GPUs of the same major and no lower minor number; PTX is compiled by the
    driver for any GPU from its architecture on (CUDA C++ programming guide, "Compute
    capabilities" and "Application compatibility").

    Args:
        capability: The GPU's.
        architectures: Such as ``('sm_90', 'PTX 90')``, see :class:`~mmdet_moe.ops.build.Built`.
    """
    for architecture in architectures:
        number = re.search(r'\d+', architecture)
        built = divmod(int(number[0]), 10) if number else (0, 0)
        is_ptx = architecture.startswith('PTX')
        if built <= capability and (is_ptx or built[0] == capability[0]):
            return True
    return False


def _missing() -> list[Kernels]:
    """The devices of this machine that the reference serves."""
    here = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    return [_loaded[device] for device in here if not _loaded[device].native]


def _record(device: str) -> build.Built:
    record = {entry.device: entry for entry in build.read_record()}
    return record.get(device, build.Built(device, reason=f'not built; run `{build.COMMAND}`'))


def _load(device: str) -> Kernels:
    entry = _record(device)
    if entry.file is None:
        return Kernels(device, False, str(entry.reason))
    if tuple(map(int, torch.__version__.split('.')[:2])) < build.OLDEST_TORCH:
        return Kernels(device, False, f'PyTorch {torch.__version__} is too old for them')
    if device == 'cuda' and not torch.backends.cuda.is_built():
        return Kernels(device, False, f'PyTorch {torch.__version__} is built without CUDA')
    if device == 'cuda' and entry.cuda_major > int(str(torch.version.cuda).split('.')[0]):
        # The driver that serves this PyTorch may be too old for them.
        return Kernels(
            device,
            False,
            f'built by {entry.compiler}, but this PyTorch uses CUDA {torch.version.cuda}; '
            f'run `{build.COMMAND}` again',
        )
    if entry.sources != build.digest(device):
        return Kernels(
            device, False, f'built of other sources than these; run `{build.COMMAND}` again'
        )
    try:
        torch.ops.load_library(build.LIB / entry.file)
    except OSError as error:
        return Kernels(device, False, f'{error}; run `{build.COMMAND}` again')
    return Kernels(device, True, f'{entry.compiler}, {", ".join(entry.architectures)}')
