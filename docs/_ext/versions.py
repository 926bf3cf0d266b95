"""Several versions of the site side by side, without any logic on a server.

Each is a folder of its own name. A build lists all that lie there in ``versions.js``, which the
pages of all of them read (``_templates/versions.html``), and leads ``index.html`` to the newest.
"""

import json
import shutil
from pathlib import Path

from packaging.version import Version
from sphinx.application import Sphinx

REDIRECT = '<!doctype html><meta http-equiv="refresh" content="0; url={}/index.html">\n'


def list_versions(app: Sphinx, error: Exception | None) -> None:
    folder = Path(app.outdir).parent
    if error or app.builder.name != 'html' or Path(app.outdir).name != app.config.version:
        return
    # What MyST-NB leaves; the pages have their own copies.
    shutil.rmtree(folder / 'jupyter_execute', ignore_errors=True)
    names = [path.parent.name for path in folder.glob('*/searchindex.js')]
    names.sort(key=Version, reverse=True)
    (folder / 'versions.js').write_text(f'window.siteVersions = {json.dumps(names)};\n')
    (folder / 'index.html').write_text(REDIRECT.format(names[0]))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect('build-finished', list_versions)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
