"""Whether a run on the disk was made with the settings that are asked for now."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdet_moe.cli import apply_data_root, load_config, parse_options, set_loader_defaults
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.routers import FORMER_SOFTMAX

#: Where a run lives, how it was started and saved, and on what device: nothing that its figures
#: depend on.
_PLACES = {
    *('work_dir', 'launcher', 'resume', 'load_from', 'experiment_name'),
    *('max_keep_ckpts', 'pin_memory', 'loss_scale', 'cache'),
}
#: Mixed precision as a config asks for it, and as it is on a CPU.
_MIXED_PRECISION = {'AmpOptimWrapper', 'CpuAmpOptimWrapper'}
_MISSING = object()


def check_settings(folder: Path, config: Path, options: Sequence[str]) -> None:
    """Refuse a run that was begun with other settings; nothing is said of a folder without one.

    Args:
        folder: Where the run lives.
        config: Config file that it should be a run of.
        options: ``key=value`` pairs for ``--cfg-options``.

    Raises:
        ConfigError: With the first field that differs, and for a config that cannot be read.
    """
    for path in folder.glob('*.py'):
        wanted, found = load_config(str(config), parse_options(options)), load_config(str(path))
        set_loader_defaults(wanted)
        if 'data_root' in wanted and 'data_root' in found:  # the data may have been moved
            apply_data_root(found, wanted.data_root)
        if field := difference(found, wanted):
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
    return _difference(_settings_of(found), _settings_of(wanted), '')


def fingerprint(config: Path, options: Sequence[str], start: str = '') -> str:
    """Of the settings of a run, the same on every machine and wherever data and weights lie.

    Args:
        config: Config file.
        options: ``key=value`` pairs for ``--cfg-options``.
        start: Fingerprint of the run from whose checkpoint it starts, if any.

    Raises:
        ConfigError: For a config that cannot be read.
    """
    cfg = load_config(str(config), parse_options(options))
    set_loader_defaults(cfg)
    if 'data_root' in cfg:
        apply_data_root(cfg, 'data')
    text = json.dumps([_settings_of(cfg), start], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _settings_of(cfg: Config) -> Any:
    return _settings(cfg.to_dict(), cfg.get('default_scope'))


def _settings(value: Any, scope: str | None) -> Any:
    """A config without places; of an absolute path, and of weights, the name alone stays.

    A part that MMEngine has taken from a toolbox names it in ``_scope_``, which says nothing where
    it is the config's own.
    """
    if isinstance(value, Mapping):
        kept = {str(k): of for k, of in value.items() if k not in _PLACES}
        if kept.get('_scope_', scope) == scope:
            kept.pop('_scope_', None)
        return {k: _settings(of, scope) for k, of in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_settings(of, scope) for of in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.endswith('.pth')):
        return Path(value).name
    return value


def _difference(found: Any, wanted: Any, field: str) -> str | None:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*found, *wanted}):
            name = f'{field}.{key}' if field else key
            values = found.get(key, _MISSING), wanted.get(key, _MISSING)
            if (text := _difference(*values, name)) is not None:
                return text
        return None
    if isinstance(found, list) and isinstance(wanted, list):
        if len(found) == len(wanted):
            pairs = enumerate(zip(found, wanted, strict=True))
            return next(
                (text for i, pair in pairs if (text := _difference(*pair, f'{field}[{i}]'))), None
            )
    elif (
        (found is not _MISSING and wanted is not _MISSING and found == wanted)
        or (field.endswith('.softmax') and FORMER_SOFTMAX.get(found) == wanted)
        or (field == 'optim_wrapper.type' and {found, wanted} <= _MIXED_PRECISION)
    ):
        return None
    return f'{field}: {_shown(found)} there, {_shown(wanted)} now'


def _shown(value: Any) -> str:
    return 'nothing' if value is _MISSING else repr(value)
