"""Generated tables inside pages that people write."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mmdet_moe.analysis.files import write_file
from mmdet_moe.errors import ConfigError
from research.runs import mean_std

NOTHING = '–'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ['| ' + ' | '.join(columns) + ' |', '| --- ' * len(columns) + '|']
    lines += ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join(lines)


def mean_and_std(values: Sequence[float], digits: int = 3) -> str:
    """``mean ± standard deviation`` over the seeds; of one seed the value alone."""
    mean, std = mean_std(values)
    text = f'{mean:.{digits}f}'
    return f'{text} ± {std:.{digits}f}' if len(values) > 1 else text


def mean_per_layer(values: Sequence[Sequence[float]], digits: int = 2) -> str:
    """``a / b``: for each MoE layer the mean over the seeds.

    Args:
        values: By seed, then by layer.
    """
    means = (mean_std(of_layer)[0] for of_layer in zip(*values, strict=True))
    return ' / '.join(f'{mean:.{digits}f}' for mean in means)


def replace_between_markers(path: Path, marker: str, text: str) -> None:
    """Replace what stands between ``<!-- marker:begin -->`` and ``<!-- marker:end -->``.

    Raises:
        ConfigError: If the file has no such markers.
    """
    begin, end = f'<!-- {marker}:begin -->', f'<!-- {marker}:end -->'
    content = path.read_text()
    if begin not in content or end not in content:
        raise ConfigError(f'{path} lacks the markers {begin} and {end} around its table')
    head, rest = content.split(begin, 1)
    tail = rest.split(end, 1)[1]
    write_file(path, f'{head}{begin}\n{text}\n{end}{tail}'.encode())
