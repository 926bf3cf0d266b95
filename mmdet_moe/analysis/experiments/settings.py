"""Whether a run on the disk was made with the settings that are asked for now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdet_moe.cli import load_config, parse_options, set_loader_defaults
from mmdet_moe.errors import ConfigError

#: Where a run lives and how it was started: nothing that its figures depend on.
_PLACES = ('work_dir', 'launcher', 'resume', 'load_from', 'experiment_name')
_MISSING = object()


def check_settings(folder: Path, config: Path, options: Sequence[str]) -> None:
    """Refuse a run that was begun with other settings; nothing is said of a folder without one.

    Args:
        folder: Where the run lives.
        config: Config file that it should be a run of.
        options: ``key=value`` pairs for ``--cfg-options``.

    Raises:
        ConfigError: With the first field that differs.
    """
    for path in folder.glob('*.py'):
        wanted = load_config(str(config), parse_options(options))
        set_loader_defaults(wanted)
        if field := difference(Config.fromfile(path), wanted):
            raise ConfigError(
                f'{folder} holds a run with other settings ({field}); move it away, or choose '
                'another --work-dir'
            )


def difference(found: Config, wanted: Config) -> str | None:
    """The first field in which two configs differ, with both values; None for equal ones.

    Args:
        found: Of a run, as MMEngine has stored it.
        wanted: As the tools would start it now.
    """
    return _difference(_settings(found), _settings(wanted), '')


def _settings(cfg: Config) -> dict[str, Any]:
    return {key: value for key, value in cfg.to_dict().items() if key not in _PLACES}


def _difference(found: Any, wanted: Any, field: str) -> str | None:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*found, *wanted}, key=str):
            name = f'{field}.{key}' if field else str(key)
            values = found.get(key, _MISSING), wanted.get(key, _MISSING)
            if (text := _difference(*values, name)) is not None:
                return text
        return None
    if isinstance(found, (list, tuple)) and isinstance(wanted, (list, tuple)):
        if len(found) == len(wanted):
            pairs = enumerate(zip(found, wanted, strict=True))
            return next(
                (text for i, pair in pairs if (text := _difference(*pair, f'{field}[{i}]'))), None
            )
    elif found is not _MISSING and wanted is not _MISSING and found == wanted:
        return None
    return f'{field}: {_shown(found)} there, {_shown(wanted)} now'


def _shown(value: Any) -> str:
    return 'nothing' if value is _MISSING else repr(value)
