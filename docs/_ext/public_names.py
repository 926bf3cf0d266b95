"""References by any name of an object lead to where it is documented, or to the file that has it.

A class is documented once, under the name that users import it by, while annotations name the
module in which it is defined. A build warns of public names that are missing (``completeness.py``).
"""

import builtins
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from completeness import complaints, find, registered
from docutils import nodes
from docutils.statemachine import StringList
from docutils.utils import get_source_line
from repository_files import ROOT, page_of
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains import Domain
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode


def check(app: Sphinx, env: BuildEnvironment) -> None:
    objects = env.get_domain('py').objects
    env.public_names = {
        id(find(name)): name for name, entry in objects.items() if entry.objtype != 'data'
    }
    for complaint in complaints(set(objects)):
        logging.getLogger(__name__).warning(complaint)


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node) -> Any:
    """A name by which an object is not listed: to where it is, or to the file that has it."""
    if node.get('refdomain') != 'py':
        return None
    value = next((v for v in map(find, readings(node)) if v is not None), None)
    if value is None:
        return None
    if name := env.public_names.get(id(value)):
        entry = env.get_domain('py').objects[name]
        ids = (node['refdoc'], entry.docname, entry.node_id)
        return make_refnode(app.builder, *ids, content, name)
    path = Path(getattr(inspect.getmodule(value), '__file__', None) or place_of(node)[0])
    if not path.is_relative_to(ROOT / 'mmdet_moe'):
        return None
    uri = app.builder.get_relative_uri(node['refdoc'], page_of(env, path))
    return nodes.reference('', '', content, internal=True, refuri=uri)


def readings(node: pending_xref) -> Iterator[str]:
    """What a name may mean where it stands: in the docstring's class, module, packages."""
    target = node['reftarget']
    if target.startswith('mmdet_moe'):
        yield target
    path, name = place_of(node)
    if name:
        parts = name.split('.')
        yield from ('.'.join((*parts[:i], target)) for i in range(len(parts), 0, -1))
        yield '.'.join((*Path(path).relative_to(ROOT).with_suffix('').parts, target))


def place_of(node: nodes.Node) -> tuple[str, str]:
    """File, and dotted name of the docstring that a node is from, if it is from one."""
    path, _, name = (get_source_line(node)[0] or '').partition(':docstring of ')
    return path, name


def is_foreign(app: Sphinx, domain: Domain, node: pending_xref) -> bool | None:
    """No warning of what stands in an annotation, or in Python itself."""
    if domain.name != 'py':
        return None
    # Only a role says whether it warns; the rest are annotations, and shapes in their place.
    return 'refwarn' not in node or hasattr(builtins, node['reftarget']) or None


class RegisteredNames(SphinxDirective):
    """``{registered-names} MODELS``: what a config can name, in a table."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        lines = ['.. list-table::', '']
        for registry, name, value in registered():
            if registry == self.arguments[0]:
                path = f'{value.__module__}.{value.__qualname__}'
                title = inspect.getdoc(value).split('\n')[0]
                lines += [f'   * - :py:obj:`{name} <{path}>`', f'     - {title}']
        return self.parse_text_to_nodes(StringList(lines, source=__file__))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive('registered-names', RegisteredNames)
    app.connect('env-check-consistency', check)
    app.connect('missing-reference', resolve)
    app.connect('warn-missing-reference', is_foreign)
    return {'parallel_read_safe': False, 'parallel_write_safe': False}
