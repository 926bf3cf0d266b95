"""Our configs by name: ``_base_ = 'mmdet_moe::_base_/balancing/hard_relative.py'``.

MMEngine has such names for a fixed list of packages, below a folder, and in the scope of the
package. Our configs use the names of the toolboxes, so they are included as a local file would be.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from types import ModuleType

from mmdet_moe.errors import ConfigError

PREFIX = 'mmdet_moe::'
_PACKAGE = Path(__file__).parents[1]
# A link to the checkout's folder, which Git makes a text file of where there are no links.
_FOLDERS = (_PACKAGE / 'configs', _PACKAGE.parent / 'configs')
CONFIGS = next(folder for folder in _FOLDERS if folder.is_dir())


def config_path(name: str) -> str:
    """Path of one of our configs.

    Args:
        name: as ``'mmdet_moe::retinanet_moe_soft_coco.py'``.

    Raises:
        ConfigError: there is no such config; the most similar names are told.
    """
    relative = name.removeprefix(PREFIX)
    if (CONFIGS / relative).is_file():
        return str(CONFIGS / relative)
    known = [path.relative_to(CONFIGS).as_posix() for path in sorted(CONFIGS.rglob('*.py'))]
    nearest = difflib.get_close_matches(relative, known, cutoff=0.0)
    raise ConfigError(
        f'_base_: there is no config {name!r}; the nearest are '
        + ', '.join(f'{PREFIX}{path}' for path in nearest)
    )


def add_to(module: ModuleType) -> None:
    """Let MMEngine's ``Config`` find our configs in ``_base_``.

    Args:
        module: ``mmengine.config.config``.
    """
    theirs = module.Config._get_cfg_path

    def _get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path.startswith(PREFIX):
            return config_path(cfg_path), None
        return theirs(cfg_path, filename)

    module.Config._get_cfg_path = staticmethod(_get_cfg_path)
