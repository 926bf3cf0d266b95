"""Which kernels serve the ops: the compiled ones, if there are any, or the PyTorch reference."""

import logging
import os
import sys
from dataclasses import dataclass

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


_loaded: dict[str, Kernels] = {}


def kernels() -> tuple[Kernels, ...]:
    """What serves each kind of device in this process."""
    return tuple(_loaded.values())


def is_native(device: torch.device) -> bool:
    """Whether compiled kernels serve tensors of a device."""
    return device.type in _loaded and _loaded[device.type].native


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
    if _is_tool():
        return
    check()
    if not asked_for and int(os.environ.get('RANK', 0)) == 0:
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


def _missing() -> list[Kernels]:
    """The devices of this machine that the reference serves."""
    here = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    return [_loaded[device] for device in here if not _loaded[device].native]


def _is_tool() -> bool:
    """Whether this is ``python -m mmdet_moe.ops``.

    Python imports this package before it runs that tool, which has to work without the kernels
    that are insisted on: it builds them, and reports by itself. While Python looks for the module
    of ``-m``, that stands in place of the program's name.
    """
    return sys.argv[:1] == ['-m'] and not {'mmdet_moe.ops', '-mmmdet_moe.ops'}.isdisjoint(
        sys.orig_argv
    )


def _load(device: str) -> Kernels:
    record = {entry.device: entry for entry in build.read_record()}
    entry = record.get(device, build.Built(device, reason=f'not built; run `{build.COMMAND}`'))
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
