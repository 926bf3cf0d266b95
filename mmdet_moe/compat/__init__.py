"""Stand-ins for what an environment may lack.

:func:`install` makes ``mmcv._ext`` importable where mmcv was installed without its compiled ops:
MMDetection cannot even be imported then. The finder sits at the END of ``sys.meta_path``, so that
Python asks it only after its ordinary finders found nothing: a compiled mmcv always wins.

Only the standard library is imported here, because ``import mmdet_moe`` must stay cheap.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

__all__ = ['install']

EXT_NAME = 'mmcv._ext'


class _MmcvExtFinder:
    """Answers for the module name ``mmcv._ext`` and for nothing else."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != EXT_NAME:
            return None
        source = Path(__file__).with_name('mmcv_ext.py')
        return importlib.util.spec_from_file_location(fullname, source)


_FINDER = _MmcvExtFinder()


def install() -> None:
    """Let ``mmcv._ext`` fall back to :mod:`mmdet_moe.compat.mmcv_ext`; a second call does nothing.

    Imports neither mmcv nor torch; the stand-in is loaded when somebody imports ``mmcv._ext``.
    """
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
