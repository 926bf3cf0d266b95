"""Which kernels serve the ops: the compiled ones, if there are any, or the PyTorch reference."""

import logging
import os
from dataclasses import dataclass

import torch

from mmdet_moe.errors import ConfigError
from mmdet_moe.ops import build

VARIABLE = 'MMDET_MOE_OPS'
BUILD_COMMAND = 'python -m mmdet_moe.ops --build'


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
    choice = os.environ.get(VARIABLE, '')
    if choice not in ('', 'native', 'reference'):
        raise ConfigError(f"{VARIABLE}={choice!r} is unknown; use 'native' or 'reference'")
    for device in build.DEVICES:
        if choice == 'reference':
            _loaded[device] = Kernels(device, False, f'{VARIABLE}=reference asks for it')
        else:
            _loaded[device] = _load(device)
    needed = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    for device in needed:
        entry = _loaded[device]
        if entry.native or choice == 'reference':
            continue
        if choice == 'native':
            raise ConfigError(
                f'{VARIABLE}=native, but there are no compiled kernels for {device} '
                f'({entry.detail}); build them (`{VARIABLE}= {BUILD_COMMAND}`), or unset it'
            )
        if int(os.environ.get('RANK', 0)) == 0:
            logging.getLogger('mmdet_moe').warning(
                'mmdet_moe: PyTorch reference ops on %s, slower than compiled ones (%s)',
                device,
                entry.detail,
            )


def _load(device: str) -> Kernels:
    record = {entry.device: entry for entry in build.read_record()}
    entry = record.get(device, build.Built(device, reason=f'not built; run `{BUILD_COMMAND}`'))
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
            f'run `{BUILD_COMMAND}` again',
        )
    if entry.sources != build.digest(device):
        return Kernels(
            device, False, f'built of other sources than these; run `{BUILD_COMMAND}` again'
        )
    try:
        torch.ops.load_library(build.LIB / entry.file)
    except OSError as error:
        return Kernels(device, False, f'{error}; run `{BUILD_COMMAND}` again')
    return Kernels(device, True, f'{entry.compiler}, {", ".join(entry.architectures)}')
