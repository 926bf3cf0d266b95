"""``tools/edit_experts.py``: an edited checkpoint, and what the edits change."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from mmdet_moe.analysis.measuring import (
    add_options,
    comparison,
    images_of,
    load_trained,
    measure,
    write_checkpoint,
)
from mmdet_moe.cli import check_folder
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import Edit, edit_experts

#: What an edit may say, and how it is read.
_FIELDS: dict[str, Callable[[str], object]] = {
    'layer': str,
    'expert': int,
    'output': lambda text: None if text == 'all' else int(text),
    'scale': float,
    'add': float,
    'zero': {'true': True, 'True': True}.__getitem__,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Change what single experts of a trained model contribute to single outputs, '
        'without training; show what that does to the metric, and write the edited checkpoint.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--edit',
        action='append',
        required=True,
        metavar='layer=NAME,expert=N,output=O,scale=S',
        help="one change, may be repeated: of expert N's contribution to output O (or "
        'output=all), by scale=S (c -> S · c), add=A (c -> c + A) or zero=true',
    )
    parser.add_argument(
        '--out', type=Path, required=True, metavar='FILE', help='the edited checkpoint'
    )
    add_options(parser)
    return parser.parse_args(argv)


def edit_checkpoint(args: argparse.Namespace) -> tuple[dict, dict]:
    """Edit a checkpoint, measure it, and write it.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        The metrics before and after, see :func:`measure`.

    Raises:
        ConfigError: For a mistake in the config, the data or the command line.
    """
    edits = [parse_edit(text) for text in args.edit]
    _check(args)
    cfg, model, meta = load_trained(args)
    with edit_experts(model, edits):  # first, for it complains before the images are predicted
        data = images_of(args, cfg, meta)
        state = {name: value.cpu().clone() for name, value in model.state_dict().items()}
        after = measure(model, data, 'edited')
    before = measure(model, data, 'as it was')
    meta = {**meta, 'edits': [*meta.get('edits', ()), *map(str, edits)]}
    write_checkpoint(args.out, state, meta)
    print('', *edits, '', comparison(before, after), sep='\n')
    print(f'\nEdited checkpoint: {args.out}')
    return before, after


def parse_edit(text: str) -> Edit:
    """An edit as it is written on the command line.

    Args:
        text: ``layer=head.fc,expert=3,output=2,scale=0``.

    Raises:
        ConfigError: If it is none.
    """
    fields = {}
    for part in text.split(','):
        name, _, value = part.strip().partition('=')
        if name not in _FIELDS or name in fields:
            problem = 'repeats' if name in fields else 'has the unknown field'
            raise ConfigError(f'--edit {text}: it {problem} {name!r}; known are {list(_FIELDS)}')
        try:
            fields[name] = _FIELDS[name](value)
        except (ValueError, KeyError):
            numbers = dict.fromkeys(('scale', 'add'), 'a number')
            kind = {**numbers, 'zero': "'true'"}.get(name, 'an integer')
            more = " or 'all'" if name == 'output' else ''
            raise ConfigError(f'--edit {text}: {name}={value} must be {kind}{more}') from None
    if missing := [name for name in ('layer', 'expert', 'output') if name not in fields]:
        raise ConfigError(f'--edit {text}: give {" and ".join(missing)}, too')
    return Edit(**fields)


def _check(args: argparse.Namespace) -> None:
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(f"--out: there is no folder '{args.out.absolute().parent}'")
    check_folder(args.out.parent, '--out')
    # The checkpoint may be an address, and whether it is there is told later.
    is_file = args.out.exists() and Path(args.checkpoint).exists()
    if is_file and args.out.samefile(args.checkpoint):
        raise ConfigError(f"--out: '{args.out}' is the checkpoint itself; choose another name")
    if args.out.is_dir() or (args.out.exists() and not args.overwrite):
        raise ConfigError(f"--out: '{args.out}' exists; choose another name, or use --overwrite")
