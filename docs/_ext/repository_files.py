"""Links to files of the repository that are no page, such as ``[a config](../configs/x.py)``.

On GitHub they lead to the file. Here a text becomes a page with its lines, a folder a list of what
is in it; nothing else changes in the Markdown. A page that includes a file, such as
``contributing.md``, stands for it, and the links in it may start where that file is.
"""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).parents[2]
LANGUAGES = {'.py': 'python', '.md': 'md', '.sh': 'bash', '.yml': 'yaml', '.toml': 'toml'}


def included(env: BuildEnvironment) -> dict[str, Path]:
    """The file that a page consists of, by the name of the page."""
    found = {}
    for name in env.found_docs:
        page = Path(env.doc2path(name))
        if page.suffix == '.md' and (
            match := re.match(r'```\{include\} (\S+)\n', page.read_text(encoding='utf-8'))
        ):
            found[name] = (page.parent / match[1]).resolve()
    return found


def page_of(env: BuildEnvironment, path: Path) -> str:
    """The name of the page that will show a file or folder of the repository."""
    env.repository_files.add(path)
    return f'repository/{path.relative_to(ROOT).as_posix()}'


def follow_links(app: Sphinx, doctree: nodes.document) -> None:
    env = app.env
    name = env.current_document.docname
    sources = included(env)
    pages = {path: page for page, path in sources.items()}
    folders = [Path(env.doc2path(name)).parent]
    if name in sources:
        folders.append(sources[name].parent)
    for kind in (addnodes.pending_xref, addnodes.download_reference):
        for node in list(doctree.findall(kind)):
            if node.get('reftype') != 'myst':
                continue
            target, _, anchor = node['reftarget'].partition('#')
            if node.get('refdomain') == 'doc':
                if target in env.found_docs:
                    continue
                # Markdown outside of docs/, which MyST takes for a page.
                target, anchor = str(ROOT / f'{target}.md'), node['reftargetid']
            paths = [(folder / target).resolve() for folder in folders] if target else []
            path = next((p for p in paths if p.exists() and p.is_relative_to(ROOT)), None)
            if path is None:
                continue  # MyST warns
            page = pages.get(path) or env.path2doc(path)
            if page in env.found_docs:
                link = addnodes.pending_xref(
                    '', *node.children, **{**node.attributes, 'refdomain': 'doc'}
                )
                link['reftarget'], link['reftargetid'] = page, anchor or None
            elif is_text(path):
                uri = app.builder.get_relative_uri(name, page_of(env, path))
                link = nodes.reference('', '', *node.children, internal=True, refuri=uri)
            else:
                continue
            node.replace_self(link)


def is_text(path: Path) -> bool:
    if path.is_dir():
        return True
    try:
        return '\0' not in path.read_text(encoding='utf-8')
    except UnicodeDecodeError:
        return False


def make_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    waiting = sorted(app.env.repository_files)
    done = set(waiting)
    while waiting:
        path = waiting.pop()
        page = page_of(app.env, path)
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.name[0] != '.' and is_text(p)]
            inside = [
                p
                for p in inside
                if p.suffix in LANGUAGES or (p.is_dir() and p.name != '__pycache__')
            ]
            waiting += [p for p in inside if p not in done]
            done |= set(inside)
            body = '<ul>' + ''.join(list_item(app, page, p) for p in inside) + '</ul>'
        else:
            language = LANGUAGES.get(path.suffix, 'text')
            body = app.builder.highlighter.highlight_block(
                path.read_text(encoding='utf-8'), language
            )
        title = escape(str(path.relative_to(ROOT)))
        yield page, {'title': title, 'body': f'<h1>{title}</h1>{body}'}, 'page.html'


def list_item(app: Sphinx, page: str, path: Path) -> str:
    uri = app.builder.get_relative_uri(page, page_of(app.env, path))
    return f'<li><a href="{escape(uri)}">{escape(path.name)}{"/" * path.is_dir()}</a></li>'


def setup(app: Sphinx) -> dict[str, bool]:
    def begin(app: Sphinx, env: BuildEnvironment, _: list[str]) -> None:
        env.repository_files = getattr(env, 'repository_files', set())

    app.connect('env-before-read-docs', begin)
    app.connect('doctree-read', follow_links, priority=100)  # before files are taken as downloads
    app.connect('html-collect-pages', make_pages)
    return {'parallel_read_safe': False, 'parallel_write_safe': True}
