"""``.. command-options::``: the options of each ``mmdet-moe`` command, as its parser tells them."""

import argparse
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

from mmdet_moe.__main__ import commands


class _Reached(Exception):
    """A command has made its parser."""


def parser_of(path: Path) -> argparse.ArgumentParser:
    """The parser of a tool, which goes no further."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Reached(parser)

    names = ('parse_args', 'parse_known_args')
    with mock.patch.multiple(argparse.ArgumentParser, **dict.fromkeys(names, stop)):
        try:
            runpy.run_path(str(path), run_name='__main__')
        except _Reached as reached:
            return reached.args[0]
    raise RuntimeError(f'{path} has no argparse parser')


def describe(parser: argparse.ArgumentParser, program: str) -> Iterator[str]:
    """In reStructuredText, a command and those below it."""
    formatter = parser._get_formatter()
    yield from (escaped(parser.description or ''), '', f'.. program:: {program}', '')
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from (f'.. rubric:: {program} {name}', '')
                yield from describe(below, f'{program} {name}')
            yield from (f'.. program:: {program}', '')
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            text = escaped(formatter._expand_help(action) if action.help else '')
            yield from (f'.. option:: {formatter._format_action_invocation(action)}', '')
            yield from (f'   {text}', '')


def escaped(text: str) -> str:
    return re.sub(r'([\\*`|_])', r'\\\1', ' '.join(text.split()))


class CommandOptions(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name, path in commands().items():
            lines += [name, '-' * len(name), '']
            lines += describe(parser_of(path), f'mmdet-moe {name}')
        node = nodes.section()
        node.document = self.state.document
        nested_parse_with_titles(self.state, StringList(lines, source='tools'), node)
        return node.children


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive('command-options', CommandOptions)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
