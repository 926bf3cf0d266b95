"""What an environment lacks: mmcv's compiled ops, and our configs under the name of the package.

:func:`install` makes two things lazily possible by finders in ``sys.meta_path``:

- ``mmcv._ext`` can be imported where mmcv was installed without its compiled ops, because
  MMDetection cannot even be imported then. A compiled mmcv always wins.
- ``_base_ = 'mmdet_moe::...'`` in any config of MMEngine names one of our configs.

An installation lets every Python program import :mod:`mmdet_moe` (``mmdet_moe.pth``), so that the
toolboxes' own tools have both. Hence nothing but what Python itself loads is imported here.
"""

import sys

__all__ = ['install']

EXT_NAME = 'mmcv._ext'
CONFIG_NAME = 'mmengine.config.config'


class _MmcvExtFinder:
    """Answers for the module name ``mmcv._ext`` and for nothing else."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != EXT_NAME:
            return None
        from importlib.util import spec_from_file_location

        return spec_from_file_location(fullname, f'{__path__[0]}/mmcv_ext.py')


class _ConfigFinder:
    """Finds MMEngine's config module as others do, and has it completed once it is executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != CONFIG_NAME:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), _add_configs(module))
        return spec


def _add_configs(module) -> None:
    from mmdet_moe.compat.configs import add_to

    add_to(module.Config)


_MMCV_FINDER, _CONFIG_FINDER = _MmcvExtFinder(), _ConfigFinder()


def install() -> None:
    """Put the finders into place; imports no toolbox, and a second call does nothing."""
    if _MMCV_FINDER in sys.meta_path:
        return
    # Python asks it only after its ordinary finders found nothing.
    sys.meta_path.append(_MMCV_FINDER)
    if CONFIG_NAME in sys.modules:
        _add_configs(sys.modules[CONFIG_NAME])
    else:
        sys.meta_path.insert(0, _CONFIG_FINDER)
