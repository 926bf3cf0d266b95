"""Checkpoints of MMEngine: read without running code from them, written whole or not at all."""

import os
import re
from functools import wraps
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

#: PyTorch's own switch; it also opens every plain ``torch.load``.
TRUST_VARIABLE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
_ALLOWED_STATISTICS = ('min', 'max', 'current', 'mean')


def allow_history(module: ModuleType) -> None:
    """Let ``torch.load`` read what MMEngine puts into checkpoints besides weights.

    These are histories of logged numbers, with NumPy's arrays and numbers, and nothing else. The
    pickle of a history names its four methods by ``getattr``, which would lead from any object to
    any other, so that a function that knows those four alone stands for it.

    Args:
        module: ``mmengine.logging.history_buffer``.
    """
    import numpy as np
    from torch.serialization import add_safe_globals

    history = module.HistoryBuffer
    core = getattr(np, '_core', None) or np.core

    def statistic(owner: Any, name: str) -> Any:
        if owner is not history or name not in _ALLOWED_STATISTICS:
            raise UnpicklingError(f'GLOBAL getattr of {name!r}')
        return getattr(owner, name)

    reconstruct, scalar = core.multiarray._reconstruct, core.multiarray.scalar
    dtypes = {type(np.dtype(code)) for code in '?bhilqBHILQefdU'}
    add_safe_globals(
        [history, np.ndarray, np.dtype, slice, *dtypes, (statistic, 'builtins.getattr')]
        # Both names, for a checkpoint may be of another NumPy.
        + [(reconstruct, f'numpy.{name}.multiarray._reconstruct') for name in ('_core', 'core')]
        + [(scalar, f'numpy.{name}.multiarray.scalar') for name in ('_core', 'core')]
    )


def guard_reading(module: ModuleType) -> None:
    """Never unpickle objects that were not allowed.

    MMEngine tries to read a checkpoint without running its code, and where that fails it runs it.

    Args:
        module: ``mmengine.runner.checkpoint``.
    """
    import torch

    from_url = module.load_url

    def read(file: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return _read(lambda: torch.load(file, map_location, weights_only=weights_only), file)

    @wraps(from_url)
    def read_url(url: str, *args: Any, **kwargs: Any) -> Any:
        trusted = os.environ.get(TRUST_VARIABLE, '').lower() in ('1', 'y', 'yes', 'true')
        kwargs.setdefault('weights_only', not trusted)
        return _read(lambda: from_url(url, *args, **kwargs), url)

    vars(module).update(_safe_torch_load=read, load_url=read_url)


def _read(load: Any, name: Any) -> Any:
    from mmdet_moe.errors import ConfigError

    try:
        return load()
    except UnpicklingError as error:
        found = re.search(r'GLOBAL ([\w.]+)|(Can only |unrecognized function)', str(error))
        if found is None:
            raise ConfigError(_damaged(name)) from error
        what = f'`{found[1]}`' if found[1] else 'objects other than weights'
        raise ConfigError(
            f"checkpoint: '{name}' holds {what}, and to load that would run code of whoever wrote "
            f'the file; if you trust it, set {TRUST_VARIABLE}=1'
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of any kind: PyTorch's readers expect their own files
        if 'CUDA' in str(error):  # no GPU here, or its memory is full
            raise
        raise ConfigError(_damaged(name)) from error


def _damaged(name: Any) -> str:
    return f"checkpoint: '{name}' is damaged, or no checkpoint; copy or download it again"


def write_whole(module: ModuleType) -> None:
    """Make MMEngine replace files at once: checkpoints, and the results of metrics.

    Args:
        module: ``mmengine.fileio.backends.local_backend``.
    """
    from mmdet_moe.files import replace_file

    theirs = module.LocalBackend.put

    @wraps(theirs)
    def put(self: Any, obj: bytes, filepath: Any) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(filepath)), exist_ok=True)
        replace_file(filepath, bytes(obj))

    module.LocalBackend.put = put
