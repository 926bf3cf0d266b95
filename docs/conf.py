"""The documentation site: ``make docs``; what Sphinx does not bring is in ``_ext/``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / '_ext'), str(HERE.parent)]

from sphinx.application import Sphinx  # noqa: E402
from sphinx.search.en import SearchEnglish  # noqa: E402

from mmdet_moe.version import __version__  # noqa: E402

project = 'mmdet_moe'
copyright = 'the mmdet_moe developers'
version = release = __version__

extensions = [
    *('sphinx.ext.autodoc', 'sphinx.ext.autosummary', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode'),
    *('myst_nb', 'sphinx_copybutton'),
    *('command_options', 'public_names', 'repository_files', 'versions'),
]
templates_path = ['_templates']
exclude_patterns = ['_build', '**/.ipynb_checkpoints']

# A reference that leads nowhere fails the build. Those to other packages are not followed, because
# the site is built without a network.
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!mmdet_moe\b)\w+\..+')]

myst_heading_anchors = 4
suppress_warnings = ['myst.header']  # headings of the fourth level below a title
nb_execution_mode = 'off'

autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints_format = 'short'
autodoc_default_options = {
    'members': True,
    'show-inheritance': True,
    'exclude-members': 'extra_repr',
}
autosummary_imported_members = True
maximum_signature_line_length = 80
napoleon_use_ivar = True
python_use_unqualified_type_names = True
viewcode_line_numbers = True

html_theme = 'furo'
html_title = f'mmdet_moe {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_sidebars = {
    '**': [
        *('sidebar/brand.html', 'sidebar/search.html', 'sidebar/scroll-start.html'),
        *('sidebar/navigation.html', 'versions.html', 'sidebar/scroll-end.html'),
    ]
}
copybutton_exclude = '.linenos, .gp, .go'


class CodeAndEnglish(SearchEnglish):
    """The search finds ``capacity_factor`` by its parts as well."""

    def split(self, text: str) -> list[str]:
        words = super().split(text)
        return words + [part for word in words if '_' in word for part in word.split('_') if part]


def setup(app: Sphinx) -> None:
    app.add_search_language(CodeAndEnglish)
