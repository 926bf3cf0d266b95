"""Every command in the documentation is one that its program takes. None of them is run."""

import argparse
import ast
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement
from pages import PAGES, ROOT, Block, blocks, prose

from mmdet_moe.__main__ import commands as tools
from mmdet_moe.__main__ import main

#: CONFIG, DIR, N: what readers put something of their own for.
PLACEHOLDER = re.compile(r'[A-Z][A-Z0-9_]*(\.\.\.)?|\.\.\.|\*')
#: Folders of the repository that arguments point into; data/ and work_dirs/ are the reader's.
OURS = ('configs', 'projects', 'requirements', 'research', 'tests', 'tools')
#: Programs of others, whose arguments nobody checks.
FOREIGN = ('cd', 'export', 'for', 'git', 'pre-commit', 'tensorboard')
#: Of the shell, before a command. The names of a loop are no command.
KEYWORDS = ('do', 'done', 'then', 'else', 'fi')
#: Commands in the text, between backticks.
INLINE = re.compile(r'(?<!`)`((?:python tools/|python -m |mmdet-moe |make \w)[^`]*)`')


class Accepted(BaseException):
    """Raised where a program would begin to work."""


class Wrong(Exception):
    """A command that does not work."""


@pytest.fixture(autouse=True)
def parse_only(monkeypatch):
    """Every parser stops once it has accepted its arguments; placeholders are of any type."""
    for name in ('parse_args', 'parse_intermixed_args'):
        monkeypatch.setattr(argparse.ArgumentParser, name, _stopping(name))
    for name in ('_get_value', '_check_value'):
        monkeypatch.setattr(argparse.ArgumentParser, name, _lenient(name))
    # Tools replace them.
    monkeypatch.setattr(sys, 'argv', ['pytest'])
    monkeypatch.setattr(sys, 'path', [*sys.path, str(ROOT)])
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])


def _stopping(name):
    method = getattr(argparse.ArgumentParser, name)

    def parse(self, args=None, namespace=None):
        method(self, args, namespace)
        raise Accepted

    return parse


def _lenient(name):
    method = getattr(argparse.ArgumentParser, name)

    def convert(self, action, text):
        is_placeholder = isinstance(text, str) and PLACEHOLDER.fullmatch(text)
        return text if is_placeholder else method(self, action, text)

    return convert


def split(code):
    """The words of each simple command of a shell script."""
    for line in code.replace('\\\n', ' ').splitlines():
        line = re.sub(r'\$\{?\w+\}?', '*', line)  # variables
        line = re.sub(r'(?<=\s)\[(.*?)\]', r'\1', line)  # [--optional]
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words, is_file = [], False
        for token in lexer:
            if set(token) <= set('();<>|&'):
                is_file = '<' in token or '>' in token
                if not is_file:
                    yield words
                    words = []
            elif is_file:
                is_file = False
            elif words or not (token in KEYWORDS or re.match(r'\w+=', token)):  # VARIABLE=value
                words.append(token)
        yield words


def check(words):
    """Raise :class:`Wrong` for a command that does not work."""
    program, *args = words
    name = Path(program).name
    for word in args:
        path, _, test = word.partition('::')
        if path == 'mmdet_moe':
            path = f'configs/{test}'
        is_ours = path.split('/')[0] in OURS and '/' in path
        if is_ours and not PLACEHOLDER.fullmatch(Path(path).stem) and not list(ROOT.glob(path)):
            raise Wrong(f'there is no {path}')
    if name in ('python', 'torchrun'):
        _check_python([arg for arg in args if not arg.startswith('--nproc')])
    elif name == 'mmdet-moe':
        _check_parser(main, args)
    elif name == 'bash':
        _check_script(*args)
    elif name == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        _check_names('target', [arg for arg in args if '=' not in arg], targets)
    elif name == 'nox':
        text = (ROOT / 'noxfile.py').read_text()
        sessions = re.findall(r'^@nox\.session.*\ndef (\w+)', text, re.MULTILINE)
        named = args[args.index('-s') + 1 :] if '-s' in args else []
        _check_names('session', [re.sub(r'-3\.\d+$', '', arg) for arg in named], sessions)
    elif name == 'pip':
        _check_pip(*args)
    elif name != 'pytest' and name not in FOREIGN:
        raise Wrong(f'nothing is known of {program!r}: teach tests/test_docs_commands.py')


def _check_names(kind, names, known):
    for name in names:
        if name not in known and not PLACEHOLDER.fullmatch(name):
            raise Wrong(f'there is no {kind} {name!r}')


def _check_python(args):
    first, *rest = args or ['-']
    first = re.sub(r'^(\.\./)+', '', first)
    if first == '-c':
        compile(rest[0], 'python -c', 'exec')
    elif first == '-m':
        module, *rest = rest
        if module == 'mmdet_moe':
            _check_parser(main, rest)
        elif module == 'pip':
            _check_pip(*rest)
        else:
            _check_module(module, rest)
    elif ROOT / first in tools().values():
        (name,) = (name for name, path in tools().items() if path == ROOT / first)
        _check_parser(main, [name, *rest])
    elif not PLACEHOLDER.fullmatch(Path(first).stem):
        raise Wrong(f'there is no tool {first}')


def _check_module(name, args):
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        spec = importlib.util.find_spec(f'{name}.__main__')
    if spec is None:
        raise Wrong(f'there is no module {name}')
    if name.split('.')[0] not in ('mmdet_moe', 'research', 'projects'):
        return
    if 'argparse' not in Path(spec.origin).read_text():
        if args:
            raise Wrong(f'{name} takes no arguments')
        return
    _check_parser(lambda argv: runpy.run_module(name, run_name='__main__'), args)


def _check_script(path, *args):
    """The shell scripts of tools/, which call train.py and test.py."""
    name = Path(path).stem
    if name == 'slurm_train':
        args = args[2:3] + args[4:]
    elif name == 'dist_train':
        args = args[:1] + args[2:]
    elif name == 'dist_test':
        args = args[:2] + args[3:]
    else:
        raise Wrong(f'nothing is known of {path}')
    _check_parser(main, [name.split('_')[1], *args])


def _check_parser(program, args):
    if program is main and PLACEHOLDER.fullmatch(args[0]):
        return
    sys.argv = ['command', *args]
    try:
        program(args)
    except Accepted:
        return
    except SystemExit as exit_:
        if exit_.code in (0, None):
            return
        if exit_.code == 2:  # what is wrong is printed
            raise Wrong(f'not accepted: {shlex.join(args)}') from None
        raise
    if args[-1:] not in (['--help'], ['--version']):
        raise AssertionError(f'{args} ran')


def _check_pip(command, *args):
    words = iter(args)
    for word in words:
        if word in ('-r', '--requirement'):
            _check_names('file', [next(words)], [f'requirements/{p.name}' for p in REQUIREMENTS])
        elif not word.startswith('-'):
            try:
                package = Requirement(re.sub(r'^\.(?=\[|$)', 'mmdet_moe', word))
            except InvalidRequirement as error:
                raise Wrong(str(error)) from None
            if package.name == 'mmdet_moe':
                _check_names('extra', package.extras, EXTRAS)
    if command != 'install':
        raise Wrong(f'pip {command}: teach tests/test_docs_commands.py')


REQUIREMENTS = list((ROOT / 'requirements').glob('*.txt'))
(EXTRAS,) = (
    [ast.literal_eval(key) for key in node.value.keys]
    for node in ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
    if isinstance(node, ast.keyword) and node.arg == 'extras_require'
)


@pytest.mark.parametrize('page', PAGES)
def test_commands(page, capsys):
    scripts = [block for block in blocks(page) if block.language in ('bash', 'sh', 'shell')]
    for code in INLINE.findall(prose(page).replace('\n', ' ')):
        is_name = re.fullmatch(r'(python tools/|mmdet-moe )\w[\w.-]*', code)
        scripts.append(Block(page, 0, 'inline', f'{code} --help' if is_name else code))
    wrong = []
    for script in scripts:
        for words in filter(None, split(script.code)):
            try:
                check(words)
            except Wrong as error:
                wrong.append(f'{script.place}: {error} {capsys.readouterr().err}')
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize(
    'command',
    [
        'python tools/train.py CONFIG --learning-rate 1',
        'python tools/train.py configs/no_such.py',
        'python tools/trian.py CONFIG',
        'python tools/prepare_data.py coco --splits tset',
        'python tools/prune_experts.py CONFIG CHECKPOINT --by weight --out DIR',
        'python tools/test.py CONFIG',
        'mmdet-moe analyse CONFIG CHECKPOINT',
        'cd DIR && mmdet-moe analyze CONFIG CHECKPOINT --max-images many',
        'torchrun --nproc_per_node=4 -m mmdet_moe train CONFIG --launcher torch',
        'python -m mmdet_moe.ops --biuld',
        'python -m mmdet_moe.opps',
        'bash tools/dist_train.sh CONFIG 8 --ampp',
        'make tset',
        "pip install -e '.[mmdte]'",
        'pip install -r requirements/no_such.txt',
        'nox -s test-3.12',
        'pytest tests/no_such.py',
        'mmdet_moe train CONFIG',
        'for name in a b; do python tools/train.py configs/${name}_cooc.py',
    ],
)
def test_mistakes_are_noticed(command):
    *_, words = split(command)
    with pytest.raises(Wrong):
        check(words)
