"""``tools/analyze_experts.py``: what the experts of a trained model have learned."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config

from mmdet_moe.analysis.attribution import KNOWN_HEADS
from mmdet_moe.analysis.exports import check_projector, write_fiftyone, write_projector
from mmdet_moe.analysis.files import EXPERTS_FILE, PAYLOAD_FILE, REPORT_FILE, write_file
from mmdet_moe.analysis.measuring import add_options, images_of, read_config
from mmdet_moe.analysis.models import load_model, task_of
from mmdet_moe.analysis.report.explorer import (
    build_payload,
    read_payload,
    write_payload,
    write_report,
)
from mmdet_moe.analysis.report.figures import write_comparison, write_figures
from mmdet_moe.analysis.report.history import read_history
from mmdet_moe.analysis.report.likeness import likeness
from mmdet_moe.analysis.report.names import run_names
from mmdet_moe.analysis.report.pictures import MAX_IMAGES, pictures_of, write_looks
from mmdet_moe.analysis.report.tables import write_tables
from mmdet_moe.analysis.report.verdict import spoken, verdict
from mmdet_moe.analysis.saliency import check_captum
from mmdet_moe.analysis.statistics.counterfactual import sentences
from mmdet_moe.analysis.statistics.inference import MIN_IMAGES, TOO_FEW
from mmdet_moe.analysis.statistics.outcomes import outcomes_of
from mmdet_moe.analysis.statistics.similarity import checkpoints_in, over_training
from mmdet_moe.analysis.statistics.stability import stability_to
from mmdet_moe.analysis.statistics.summary import VERSION, summarise
from mmdet_moe.analysis.study import Study
from mmdet_moe.cli import check_folder, fail
from mmdet_moe.errors import ConfigError
from mmdet_moe.progress import progress_bar

_INTERRUPTED = 130


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(
        description='Show what the experts of a trained MoE model specialised in: tables, figures '
        'and a report to explore in the browser.'
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='folder of the results (default: next to the checkpoint, '
        'experts_<checkpoint>_<split>)',
    )
    add_options(parser)
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='S',
        help='detections with a lower score count for AP alone (0.3)',
    )
    parser.add_argument(
        '--no-interventions',
        action='store_true',
        help='do not measure what happens when experts are used in another way, which takes most '
        'of the time',
    )
    parser.add_argument(
        '--compare',
        type=Path,
        action='append',
        default=[],
        metavar='OTHER_DIR',
        help='results of another run, to stand beside this one in the report; may be repeated: the '
        'first stands there, all are in one figure of polysemanticity by the number of experts; '
        'with another checkpoint of the same config: how many decisions have changed',
    )
    parser.add_argument(
        '--over-training',
        action='store_true',
        help="how alike the experts' weights are in every iter_N.pth (or epoch_N.pth) beside the "
        'checkpoint',
    )
    parser.add_argument(
        '--cam',
        type=int,
        default=0,
        metavar='N',
        help='for N images, draw the routing of patches and pixels, and where the main experts of '
        'the best detections look (class activation maps; needs captum)',
    )
    parser.add_argument(
        '--fiftyone',
        type=Path,
        metavar='DIR',
        help='write objects and detections with their experts and errors for FiftyOne, too',
    )
    parser.add_argument(
        '--projector',
        type=Path,
        metavar='DIR',
        help="write what the routers are given for TensorBoard's projector, too",
    )
    parser.add_argument(
        '--verbose', action='store_true', help='print the whole verdict, not three lines a layer'
    )
    args = parser.parse_args(argv)
    if args.out is None:
        stem = Path(args.checkpoint).stem
        args.out = Path(args.checkpoint).parent / f'experts_{stem}_{args.split}'
    return args


def run_analysis(argv: Sequence[str] | None = None) -> None:
    """Run ``tools/analyze_experts.py``.

    Args:
        argv: arguments; those of the process if None.

    Raises:
        SystemExit: with status 2 after a mistake in the config, the data or the command line.
    """
    args = parse(argv)
    try:
        analyse(args)
    except KeyboardInterrupt:
        print(f'\nInterrupted. The same command goes on from here ({args.out}).')
        raise SystemExit(_INTERRUPTED) from None
    except Exception as error:
        fail(error, running=False)


def analyse(args: argparse.Namespace) -> dict:
    """The whole analysis.

    Args:
        args: As :func:`parse` gives them.

    Returns:
        The content of ``experts.json``.

    Raises:
        ConfigError: For a mistake in the config, the data or the command line.
    """
    _check(args)
    # Before the work, not after it.
    other = read_payload(args.compare[0] / PAYLOAD_FILE, args.out) if args.compare else None
    others = [_read_experts(folder / EXPERTS_FILE) for folder in args.compare]
    cfg = read_config(args, args.config, args.checkpoint)
    study = prepare(args, cfg, [experts['run']['task'] for experts in others])
    training = {}
    if args.over_training:
        steps = checkpoints_in(Path(args.checkpoint).parent)
        training = over_training(study.model, study.layers, steps)
    if study.is_detector and not study.tracer.knows_origins:
        print(
            'note: the detections of this head do not tell which pyramid level they come from; '
            'layers that decide for each level are shown without them (known are the heads of '
            f'{KNOWN_HEADS}, and others with the decoding of one of them)'
        )
    for reason in study.left_out.values():
        print(f'note: {reason}')
    total = len(study.data)
    with _bar('statistics', total) as progress:
        study.record(progress)
    if not args.no_interventions and study.interventions:
        with _bar(f'{len(study.interventions)} interventions', total) as progress:
            study.intervene(progress)
    print('Summing up ...', flush=True)
    experts = summarise(
        study,
        {
            'config': Path(args.config).stem,
            'checkpoint': Path(args.checkpoint).name,
            'split': args.split,
        },
    )
    for name, found in study.compare_experts().items():
        experts['layers'][name]['similarity'] = {**found, 'training': training.get(name)}
    names = run_names(args.compare)
    experts['stability'] = [
        stability_to(study, *run) for run in zip(args.compare, names, strict=True)
    ]
    experts['history'] = read_history(Path(args.checkpoint).parent)
    experts['verdict'] = verdict(experts, [*likeness(experts), *sentences(experts)])
    write_results(study, experts, args.out, other, args.cam, args.fiftyone)
    if args.projector:
        write_projector(study, args.projector)
    if others:
        write_comparison([experts, *others], args.out / 'figures')
    _print_results(experts, args.out, args.verbose)
    return experts


def _read_experts(path: Path) -> dict:
    try:
        experts = json.loads(path.read_text(encoding='utf-8'))
        version = experts['version']
        experts['run']['task'], experts['layers']
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f'--compare: {path} is missing or damaged; name a folder that tools/analyze_experts.py '
            'wrote'
        ) from None
    if version != VERSION:
        raise ConfigError(
            f'--compare: {path} has version {version!r}, this mmdet_moe reads version {VERSION}; '
            'run tools/analyze_experts.py again'
        )
    return experts


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.cam <= MAX_IMAGES:
        raise ConfigError(f'--cam={args.cam} must lie in 0..{MAX_IMAGES}')
    if args.cam:
        check_captum('--cam')
    if args.projector:
        check_folder(args.projector, '--projector')
        check_projector(args.projector)
    if args.fiftyone:
        check_folder(args.fiftyone, '--fiftyone')
    if '://' in args.checkpoint:
        raise ConfigError(
            f"checkpoint: '{args.checkpoint}' is an address; download the file and give its path"
        )
    if not 0 <= args.score_thr < 1:
        raise ConfigError(f'--score-thr={args.score_thr} must lie in 0..1, 1 excluded')
    if args.over_training and not checkpoints_in(Path(args.checkpoint).parent):
        raise ConfigError(
            f'--over-training: {Path(args.checkpoint).parent} holds neither iter_N.pth nor '
            'epoch_N.pth; leave the option out, or name a checkpoint in the folder of its training'
        )
    for part in ('', 'records/statistics', 'records/interventions', 'tables', 'figures'):
        check_folder(args.out / part, '--out')
    has_records = (args.out / 'records' / 'statistics').is_dir()
    if args.out.is_dir() and any(args.out.iterdir()) and not has_records:
        raise ConfigError(
            f"--out: '{args.out}' holds something else than an analysis; choose a new folder"
        )


def prepare(args: argparse.Namespace, cfg: Config, compared: Sequence[str] = ()) -> Study:
    """Model and data of an analysis.

    Args:
        args: As :func:`parse` gives them.
        cfg: The config.
        compared: Tasks of the runs to compare with.

    Raises:
        ConfigError: If config, checkpoint and data do not fit together, or another run has another
            task.
    """
    model, meta = load_model(cfg, args.checkpoint, args.device)
    for folder, task in zip(args.compare, compared, strict=False):
        if task != task_of(model):
            raise ConfigError(
                f'--compare: {folder} is an analysis of {task}, this model is one of '
                f'{task_of(model)}; compare runs of the same task'
            )
    data = images_of(args, cfg, meta)
    plan = {
        'checkpoint': _digest(Path(args.checkpoint).read_bytes()),
        # MMPretrain's configs have the preprocessing beside the model.
        'model': _digest([cfg.model, cfg.get('data_preprocessor')]),
        'data': _digest([data.loader_cfg.dataset, data.digest()]),
        'split': args.split,
    }
    return Study(model, data, args.out / 'records', plan, args.score_thr, args.overwrite)


def _digest(content: bytes | object) -> str:
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True, default=str).encode()
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    with progress_bar(total=total, desc=name, unit=' images') as bar:
        started = False

        def progress(images: int) -> None:
            nonlocal started
            if not started:
                # What an earlier run did takes no part in the rate.
                bar.initial = bar.n = bar.last_print_n = images
                started = True
            else:
                bar.update(images)

        yield progress


def write_results(
    study: Study,
    experts: dict,
    out: Path,
    other: dict | None = None,
    looks: int = 0,
    fiftyone: Path | None = None,
) -> None:
    """Write everything that a user looks at.

    Args:
        study: Whose records to read.
        experts: The content of ``experts.json``.
        out: The folder.
        other: Payload of a run to compare with.
        looks: Number of images to look at with the experts.
        fiftyone: Folder of the export for FiftyOne; None for none.
    """
    content = json.dumps(experts, indent=1, allow_nan=False)
    write_file(out / EXPERTS_FILE, content.encode())
    write_tables(experts, out / 'tables')
    write_figures(experts, out / 'figures')
    outcomes = outcomes_of(study.records, list(study.layers), study.score_thr)
    if fiftyone is not None:
        write_fiftyone(study.data, outcomes, study.data.classes, fiftyone)
    figures = out / 'figures'
    looked = write_looks(study, looks, figures) if looks else ()
    if looks and not looked:
        print('note: --cam drew nothing: no layer decides for parts of a map, or nothing was found')
    payload = build_payload(
        experts, outcomes, study.data.image, path_of=study.data.path, folder=out,
        pictures=pictures_of(experts, figures, looked),
    )  # fmt: skip
    if lost := payload['pool']['unreadable']:
        print(f'note: missing in the report: {len(lost)} of the images; {lost[0]}')
    write_payload(payload, out / PAYLOAD_FILE)
    write_report([payload] if other is None else [payload, other], out / REPORT_FILE)


def _print_results(experts: dict, out: Path, verbose: bool) -> None:
    metrics = ', '.join(
        f'{name} {value:.3f}' + (f' ({ends[0]:.3f} to {ends[1]:.3f})' if ends else '')
        for name, ends in experts['metrics_interval'].items()
        if (value := experts['metrics'][name]) is not None
    )
    note = f'; {TOO_FEW}' if experts['run']['num_images'] < MIN_IMAGES else ''
    print(f'\n{metrics}{note}\n')
    print('\n'.join(spoken(experts['verdict'], verbose)))
    more = '' if verbose else ' (has more sentences, as --verbose has)'
    print(f'\nReport{more}: {out / REPORT_FILE}')
    print(f'Figures, tables, statistics: {out}{os.sep}{{figures,tables,{EXPERTS_FILE}}}')
