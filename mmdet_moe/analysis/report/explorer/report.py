"""The HTML file: template, style sheet, script, plotly.js and the payloads in one."""

import json
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.report.names import run_names
from mmdet_moe.analysis.statistics.matching import KINDS
from mmdet_moe.drawing import expert_colours
from mmdet_moe.errors import ConfigError

FOLDER = Path(__file__).parent
MAX_RUNS = 2
_WRITTEN_OUT = ('flows', 'pictures', 'folder')  # in the template


def write_report(payloads: Sequence[dict], path: Path) -> None:
    """Write a self-contained HTML file, in one step.

    Args:
        payloads: From :func:`build_payload` or :func:`read_payload`; of one run, or of two to
            compare.
        path: The file.

    Raises:
        ConfigError: For any other number of runs, or a detector beside a classifier.
    """
    if not 1 <= len(payloads) <= MAX_RUNS:
        raise ConfigError(f'a report shows one run or two, not {len(payloads)}; name one or two')
    if len({payload['run']['task'] for payload in payloads}) > 1:
        raise ConfigError('a report shows two detectors or two classifiers, not one of each')
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters['thousands'] = lambda number: f'{number:,}'
    html = environment.get_template('template.html.j2').render(
        runs=payloads,
        titles=_titles(payloads, Path(path).parent),
        classes=_union([payload['run']['classes'] for payload in payloads]),
        superclasses=_union([payload['run'].get('superclasses') or {} for payload in payloads]),
        is_detection=payloads[0]['run']['task'] == 'detection',
        kinds=KINDS,
        payloads=[_json_for_html(_of_script(payload)) for payload in payloads],
        flows=[_json_for_html(_flows(payload)) for payload in payloads],
        kind_names=_json_for_html(KINDS),
        colours=_json_for_html(expert_colours()),
        plotly=Markup(get_plotlyjs()),
        style=_texts('explorer.css', 'choices.css'),
        script=_texts('explorer.js', 'flow.js'),
    )
    write_file(Path(path), html.encode())


def _texts(*names: str) -> Markup:
    return Markup('\n'.join((FOLDER / name).read_text(encoding='utf-8') for name in names))


def _flows(payload: dict) -> list[dict]:
    """Those of a run, with its layers in human words."""
    return [
        {**flow, 'titles': [payload['layers'][name]['title'] for name in flow['layers']]}
        for flow in payload.get('flows') or []
    ]


def _of_script(payload: dict) -> dict:
    """Without what the template has written out."""
    return {key: value for key, value in payload.items() if key not in _WRITTEN_OUT}


def _titles(payloads: Sequence[dict], folder: Path) -> list[str]:
    """The configs' names, with what is needed to tell the runs apart: checkpoints, folders.

    Args:
        payloads: Of the runs.
        folder: Of the report, and so of the run that has not been read from a file.
    """
    runs = [payload['run'] for payload in payloads]
    names = [str(run['config']) for run in runs]
    if len(set(names)) < len(names):
        names = [f'{run["config"]} · {run["checkpoint"]}' for run in runs]
    if len(set(names)) < len(names):
        ends = run_names(payload.get('folder', folder) for payload in payloads)
        names = [f'{name} · {end}' for name, end in zip(names, ends, strict=True)]
    return names


def _union(lists: Sequence) -> list[str]:
    return list(dict.fromkeys(str(name) for names in lists for name in names))


def _json_for_html(payload: dict | Sequence) -> Markup:
    """JSON that no HTML parser takes for the end of its script element."""
    text = json.dumps(payload, separators=(',', ':'), allow_nan=False)
    return Markup(text.replace('<', '\\u003c').replace('>', '\\u003e'))
