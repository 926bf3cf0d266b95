"""How tests run tools, and read what a run leaves."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import mmdet_moe
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError

ROOT = Path(mmdet_moe.__file__).parents[1]
CONFIGS, TOOLS = ROOT / 'configs', ROOT / 'tools'


def load_tool(name):
    """A file of ``tools/`` as a module, anew for each caller."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def failure(capsys, run, *arguments, **named):
    """The sentence of a run that must fail as a user's mistake, and says nothing else."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*arguments, **named)
    assert exit_.value.code == 2
    (line,) = filter(None, capsys.readouterr().err.splitlines())
    assert line.startswith('error: ')
    return line.removeprefix('error: ')


def complaint(cfg, *args):
    """The one line with which the preflight refuses a config."""
    with pytest.raises(ConfigError) as error:
        check_config(cfg, *args)
    message = str(error.value)
    assert '\n' not in message
    return message


def logged(folder):
    """The entries of the scalars that runs below a folder logged, in their order."""
    files = sorted(Path(folder).glob('**/vis_data/scalars.json'))
    assert files
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
