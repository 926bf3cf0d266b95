"""The pages of the documentation, taken apart: blocks of code, and the text around them."""

import re
from dataclasses import dataclass
from pathlib import Path

import mmdet_moe

ROOT = Path(mmdet_moe.__file__).parents[1]
PAGES = [
    str(path.relative_to(ROOT))
    for pattern in ('*.md', 'docs/*.md', 'projects/*/*.md')
    for path in sorted(ROOT.glob(pattern))
]

_FENCE = re.compile(r'^( *)(`{3,}|~{3,})(.*)$')


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: File, from the root of the repository.
        line: Number of the first line of its code.
        language: What stands behind the fence.
        code: Without the indentation of the fence.
    """

    page: str
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f'{self.page}:{self.line}'


def blocks(page):
    return _parts(page)[0]


def prose(page):
    """The page without its blocks."""
    return _parts(page)[1]


def _parts(page):
    found, text = [], []
    fence = None
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        match = _FENCE.match(line)
        if fence is None and match:
            indent, fence, language = match[1], match[2], match[3].strip()
            start, code = number + 1, []
        elif fence is not None and line.strip() == fence:
            found.append(Block(page, start, language, '\n'.join(code) + '\n'))
            fence = None
        elif fence is not None:
            code.append(line.removeprefix(indent))
        else:
            text.append(line)
    assert fence is None, f'{page}:{start}: the block has no end'
    return found, '\n'.join(text)


def anchors(page):
    """Of its headings, as GitHub makes them."""
    found = set()
    for title in re.findall(r'^#{1,6} +(.*?)[ #]*$', prose(page), re.MULTILINE):
        title = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', title)
        slug = re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
        copies = (f'{slug}-{i}' for i in range(1, 100))
        found.add(slug if slug not in found else next(c for c in copies if c not in found))
    return found
