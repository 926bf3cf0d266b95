"""The documentation site; ``--all`` builds it, where requirements/docs.txt is installed."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from running import ROOT

import mmdet_moe

DOCS = ROOT / 'docs'
PAGES = [
    page.relative_to(DOCS)
    for page in sorted(DOCS.rglob('*'))
    if page.suffix in ('.md', '.rst', '.ipynb')
    and not {'_build', '_templates', 'generated', '.ipynb_checkpoints'} & set(page.parts)
]


def test_every_page_is_in_the_navigation():
    pages = {page.with_suffix('') for page in PAGES}
    listed = {Path('index')}
    for page in PAGES:
        for tree in re.findall(r'```\{toctree\}\n(.*?)```', (DOCS / page).read_text(), re.DOTALL):
            for line in filter(None, tree.splitlines()):
                if line[0] != ':':
                    entry = str(page.parent / re.sub(r'.*<(.*)>', r'\1', line))
                    listed |= {p for p in pages if fnmatch(str(p), entry)}
    assert pages == listed


def test_every_public_name_is_in_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / '_ext')
    from completeness import PACKAGES, complaints

    names = set()
    for page in (DOCS / 'api').glob('*.md'):
        for module, table in re.findall(
            r'currentmodule:: (\S+)\n\n.. autosummary::\n   :toctree: generated\n\n(.*?)```',
            page.read_text(),
            re.DOTALL,
        ):
            listed = re.sub(r'\n.. py:data:: (\w+)\n.*', r'\1', table, flags=re.DOTALL)
            names |= {f'{module}.{name}' for name in listed.split()}
    assert complaints(names) == []
    for package in PACKAGES:
        assert f'.. automodule:: {package}\n' in ''.join(
            page.read_text() for page in (DOCS / 'api').glob('*.md')
        )
    # One that is left out is found, by package and registry.
    names.remove('mmdet_moe.moe.KLLoss')
    assert complaints(names) == [
        'mmdet_moe.moe.KLLoss is not in the API reference',
        "mmdet_moe.KLLoss in a config's MODELS is not in the API reference",
    ]


def test_builds_without_a_warning(tmp_path, request):
    if not request.config.getoption('--all'):
        pytest.skip('takes a minute; --all, or make docs')
    pytest.importorskip('furo', reason='the site needs requirements/docs.txt')
    out = tmp_path / mmdet_moe.__version__
    (tmp_path / '0.0.1').mkdir()
    (tmp_path / '0.0.1' / 'searchindex.js').touch()
    subprocess.run(
        [sys.executable, '-m', 'sphinx', '-q', '-E', '-W', '-d', tmp_path / 'trees', DOCS, out],
        check=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    newest = f'"{mmdet_moe.__version__}", "0.0.1"'
    assert newest in (tmp_path / 'versions.js').read_text()
    assert f'url={mmdet_moe.__version__}/index.html' in (tmp_path / 'index.html').read_text()
    # A link to a file of the repository leads to its lines.
    router = 'repository/projects/cluster_theory/patch_router.py.html'
    assert router in (out / 'extending.html').read_text()
    assert 'PatchRouter' in (out / router).read_text()
    for page in out.rglob('*.html'):
        for target in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', page.read_text()):
            assert (page.parent / target).exists(), f'{page.relative_to(out)}: {target}'
