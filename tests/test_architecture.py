"""Imports point one way, and the core needs no toolbox."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: A room may import those above it, and none beside or below it.
ROOMS = (
    ('errors', 'files', 'progress', 'version'),
    ('compat',),
    ('__main__', 'checks', 'drawing', 'registry'),
    ('ops',),
    ('moe',),
    ('datasets', 'models'),
    ('engine',),
    ('cli',),
    ('analysis',),
    ('research',),
    ('projects',),
    ('tools',),
)
HEIGHT = {room: height for height, rooms in enumerate(ROOMS) for room in rooms}
TOOLBOXES = ('mmcv', 'mmdet', 'mmpretrain')


def room_of(*names):
    """The room of a dotted name or path; of another distribution's its first name."""
    return names[1] if names[0] == 'mmdet_moe' else names[0]


@cache
def imports():
    """``(file, its room, imported room)`` of every import, those inside of functions included."""
    return tuple(_imports())


def _imports():
    folders = ('mmdet_moe', 'research', 'projects', 'tools')
    for path in (path for folder in folders for path in ROOT.glob(f'{folder}/**/*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f'{path} has a relative import'
                found = [f'{node.module}.{alias.name}' for alias in node.names]
            else:
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            yield from ((path.name, room_of(*parts), room_of(*name.split('.'))) for name in found)


def test_imports_point_one_way():
    wrong = {
        f'{file} of {room} imports {other}'
        for file, room, other in imports()
        if room != other and room in HEIGHT and HEIGHT.get(other, -1) >= HEIGHT[room]
    }
    assert not wrong


def test_every_room_has_its_place():
    assert {room for _, room, _ in imports()} == {*HEIGHT, '__init__'} - {'version'}


def test_the_core_imports_no_toolbox():
    core = {room for room, height in HEIGHT.items() if height <= HEIGHT['moe']} - {'compat'}
    assert not [found for found in imports() if found[1] in core and found[2] in TOOLBOXES]
