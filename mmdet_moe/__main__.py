"""``mmdet-moe COMMAND``, or ``python -m mmdet_moe COMMAND``: the files of ``tools/``, anywhere.

A command is the file itself, from the checkout or from the wheel's copy, so that a new tool needs
no line here. Its name is the file's, without what goes without saying: ``analyze_experts.py`` is
``analyze``. In a notebook, ``main(['train', 'config.py'])`` is ``mmdet-moe train config.py``. For
several processes: ``torchrun ... -m mmdet_moe train CONFIG --launcher pytorch``.
"""

import ast
import sys
import types
from collections.abc import Sequence
from pathlib import Path

from mmdet_moe.errors import ConfigError, exit_on_user_error
from mmdet_moe.version import __version__

__all__ = ['commands', 'main']

_PACKAGE = Path(__file__).parent
#: In a wheel, where ``mim`` looks for such files; in a checkout.
_FOLDERS = (_PACKAGE / '.mim' / 'tools', _PACKAGE.parent / 'tools')
_USAGE = """\
usage: mmdet-moe COMMAND ...

{commands}

`mmdet-moe COMMAND --help` lists the arguments of one, `mmdet-moe --version` tells the version.
{checkout}"""
_CHECKOUT = """\
What trains whole experiments (demo, reproduce, gpu) belongs to a checkout of the repository.
"""


def commands() -> dict[str, Path]:
    """The file of each command, by the name of the command."""
    folder = next((folder for folder in _FOLDERS if (folder / 'train.py').is_file()), None)
    if folder is None:
        return {}
    return {
        path.stem.removesuffix('_experts').removesuffix('_moe').replace('_', '-'): path
        for path in sorted(folder.glob('*.py'))
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command in this process, which is as it was afterwards.

    Args:
        argv: The name of the command and its arguments; those of the process if None.

    Raises:
        SystemExit: With the status of the command if that is not 0; with 2 if there is no such
            command.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
    with exit_on_user_error():
        if name in ('-h', '--help'):
            print(_usage(), end='')
        elif name == '--version':
            print(f'mmdet_moe {__version__}')
        else:
            _run(name, rest)


def _usage() -> str:
    files = commands()
    width = max(map(len, files), default=0)
    lines = [f'  {name:{width}}  {_title(path)}' for name, path in files.items()]
    return _USAGE.format(commands='\n'.join(lines), checkout='' if 'demo' in files else _CHECKOUT)


def _title(path: Path) -> str:
    """The first clause of a tool's docstring, which is read without running the tool."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
    return docstring.split('\n')[0].split(';')[0].rstrip('.')


def _run(name: str, arguments: list[str]) -> None:
    files = commands()
    if name not in files:
        raise ConfigError(
            f'there is no command {name!r}; choose one of {", ".join(files)}'
            + ('' if 'demo' in files else '; demo, reproduce and gpu belong to a checkout')
        )
    path = files[name]
    module = types.ModuleType('__main__')
    module.__file__ = str(path)
    before = sys.modules['__main__'], sys.argv, sys.path
    sys.path = [*sys.path]  # to which tools append
    sys.modules['__main__'] = module  # as if the file had been called, for what pickles
    sys.argv = [f'mmdet-moe {name}', *arguments]
    code = compile(path.read_bytes(), path, 'exec')
    try:
        exec(code, module.__dict__)
    except SystemExit as done:
        if done.code:
            raise
    except ModuleNotFoundError as error:
        missing = (error.name or '').partition('.')[0]
        if missing in ('', 'mmdet_moe'):
            raise
        raise ConfigError(
            f'{name} needs the package {missing}, which is not installed; what tools need comes '
            "with `pip install 'mmdet_moe[all]'`, what generates images with 'mmdet_moe[demo]'"
        ) from error
    finally:
        sys.modules['__main__'], sys.argv, sys.path = before


if __name__ == '__main__':
    main()
