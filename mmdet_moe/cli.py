"""What ``tools/train.py`` and ``tools/test.py`` share.

The command line is the union of those of MMDetection and MMPretrain; the ``default_scope`` of the
config says whose defaults apply. A mistake that a user can mend is printed as one line, with exit
status 2; ``MMDET_MOE_TRACEBACK=1`` shows where it came from.
"""

import argparse
import ast
import copy
import gc
import inspect
import os
import os.path as osp
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmdet_moe.checks import check_integer, name_of
from mmdet_moe.compat.distributed import (
    check_launcher,
    global_rank,
    init_cpu_group,
    local_rank,
    note,
)
from mmdet_moe.compat.malloc import keep_large_blocks
from mmdet_moe.engine.channels_last import ChannelsLastHook, check_float32
from mmdet_moe.engine.exact_resume import ExactResumeHook
from mmdet_moe.engine.expert_report import ExpertReportHook
from mmdet_moe.engine.explain import explain, in_one_line
from mmdet_moe.engine.hooks import ExpertParallelHook
from mmdet_moe.engine.hooks.layers import unwrapped_model
from mmdet_moe.engine.image_errors import ImageErrorHook
from mmdet_moe.engine.options import add_cfg_options
from mmdet_moe.engine.preflight import (
    check_checkpoint,
    check_config,
    check_runner,
    datasets_of,
    resumable_checkpoint,
)
from mmdet_moe.engine.resumed_schedule import ResumedScheduleHook
from mmdet_moe.engine.tested_checkpoint import TestedCheckpointHook
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.surgery.fewer import set_top_k
from mmdet_moe.moe.surgery.report import in_columns

__all__ = [
    'apply_data_root',
    'check_folder',
    'fail',
    'image_sets',
    'load_config',
    'parse_options',
    'run_test',
    'run_train',
    'set_loader_defaults',
]

TRACEBACK_VARIABLE = 'MMDET_MOE_TRACEBACK'
EXIT_STATUS = 2
#: What the tools read of a config, whether it has it or not.
_RUNNER_KEYS = {
    *inspect.signature(Runner.__init__).parameters,
    *('auto_scale_lr', 'broadcast_buffers', 'compile', 'custom_imports', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model', 'tta_pipeline', 'tta_dataloader'),
} - {'self'}
_SCOPES = ('mmdet', 'mmpretrain')
_AUTO_RESUME = 'auto'


# Command line ------------------------------------------------------------------------------------


def _common_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help='folder for logs and results (default: work_dirs/<name of the config>)'
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    # Both spellings exist in launchers.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.launcher != 'none':
        # MMEngine reads the variable, which neither mpirun nor an old torch launcher sets.
        os.environ.setdefault('LOCAL_RANK', str(local_rank() or args.local_rank))
    return args


def _parse_train(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _common_parser('Train a detector or a classifier')
    parser.add_argument(
        '--amp',
        action='store_true',
        help='mixed precision, float16 on a GPU and bfloat16 on a CPU that has it, with '
        '--channels-last',
    )
    parser.add_argument(
        '--channels-last',
        action='store_true',
        help='keep feature maps pixel by pixel in memory, which convolutions in mixed precision '
        'are faster with; the results are the same up to rounding',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate from the config's base_batch_size to the actual batch size",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const=_AUTO_RESUME,
        metavar='CHECKPOINT',
        help='continue from a checkpoint, without a value from the latest one in the work dir',
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate during the training'
    )
    return _parse(parser, argv)


def _parse_test(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _common_parser('Test (and evaluate) a detector or a classifier')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    parser.add_argument('--out', metavar='FILE.pkl', help='file for the predictions')
    parser.add_argument('--show', action='store_true', help='show the results in a window')
    parser.add_argument(
        '--show-dir',
        help='folder for images with the results drawn in, below WORK_DIR/TIME_OF_THE_RUN unless '
        'absolute',
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds between two images of --show'
    )
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument(
        '--top-k',
        type=int,
        metavar='K',
        help='test a second time with K experts for each decision, and compare; other results, '
        'such as --out, are those of the second time',
    )
    return _parse(parser, argv)


# Config ------------------------------------------------------------------------------------------


def _moved(value: Any, old: str, new: str) -> Any:
    """``value`` with ``old`` at the start of every string replaced by ``new``."""
    if isinstance(value, str):
        is_below = value == old or value.startswith(old + '/')
        return new + value[len(old) :] if is_below else value
    if isinstance(value, dict):
        for key in list(value):
            item = value[key]
            moved = _moved(item, old, new)
            if moved is not item:
                value[key] = moved
        return value
    if isinstance(value, list):
        value[:] = [_moved(item, old, new) for item in value]
        return value
    # Named tuples and the like are no plain sequences of a config.
    return tuple(_moved(item, old, new) for item in value) if type(value) is tuple else value


def apply_data_root(cfg: Config, new_root: str) -> None:
    """Move every path of a config that starts with its top-level ``data_root``.

    MMEngine interpolates ``data_root`` when it parses the file, so that overriding the top-level
    field alone would leave the data sets and evaluators where they are.

    Args:
        cfg: changed in place.
        new_root: the new folder, with or without a slash at its end.

    Raises:
        ConfigError: the config has no top-level ``data_root``.
    """
    old_root = cfg.get('data_root')
    if not isinstance(old_root, str) or not old_root.rstrip('/'):
        raise ConfigError(
            '--cfg-options data_root: the config has no top-level data_root to replace; override '
            'the fields themselves, for example train_dataloader.dataset.data_root=DIR'
        )
    # An absolute root stays one if it is the root of the file system.
    new_root = str(new_root)
    _moved(cfg._cfg_dict, old_root.rstrip('/'), new_root.rstrip('/') or '/')


def _copies(name: str, node: Any, field: str) -> Iterator[str]:
    """The fields of a model that hold the config of a router, or of experts."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == name and isinstance(value, (Mapping, list, tuple)):
                yield f'{field}.{key}'
            else:
                yield from _copies(name, value, f'{field}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from _copies(name, item, f'{field}.{index}')


def _set_there(cfg: Config, key: str, suffix: str = '') -> str:
    """What to do in place of setting a top-level `router` or `experts` that nobody reads."""
    places = list(_copies(key, cfg.get('model'), 'model'))
    if not places:
        return f'the model of this config has no {key}; use the config of an MoE model'
    return (
        f'the config has copied `{key}` into its model already; set it there, '
        f'{places[0]}{suffix}=...'
    )


def _check_read(path: str, cfg: Config) -> None:
    """Refuse a `router` or `experts` at the top of a file that inherits, which it does not use."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except SyntaxError:  # what MMEngine replaces before it reads the file, such as {{$NAME:text}}
        return
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    set_ = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    if '_base_' in set_ or 'read_base' in used:
        for key in ('router', 'experts'):
            if key in set_ - used:
                raise ConfigError(f"'{path}' sets `{key}`, but {_set_there(cfg, key)}")


def _check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuse overrides that nobody would read."""
    for option in options:
        key = option.partition('.')[0]
        if key in ('router', 'experts'):
            there = _set_there(cfg, key, option.removeprefix(key))
            raise ConfigError(f'--cfg-options {option}: {there}')
        if key not in cfg and key not in _RUNNER_KEYS:
            near = get_close_matches(key, [*cfg, *_RUNNER_KEYS], 1)
            raise ConfigError(
                f'--cfg-options {option}: the config has no `{key}`, so nobody would read it'
                f'{f"; did you mean `{near[0]}`?" if near else "; check its name"}'
            )


def load_config(path: str, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config file and apply the overrides of the command line.

    Args:
        path: the file.
        options: ``--cfg-options`` by dotted key.

    Raises:
        ConfigError: the file cannot be read, or an override does not fit it.
    """
    if not osp.isfile(path):
        raise ConfigError(f"there is no config file '{path}'")
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        # A config is a program: whatever it raises is a mistake in the file or in one of its bases.
        raise ConfigError(f"cannot read the config file '{path}': {in_one_line(error)}") from error
    if path.endswith('.py'):
        _check_read(path, cfg)
    options = dict(options or {})
    if 'data_root' in options:
        apply_data_root(cfg, options.pop('data_root'))
    _check_options(cfg, options)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(f'--cfg-options do not fit the config: {in_one_line(error)}') from error
    cfg.default_scope = scope = cfg.get('default_scope') or _scope_of_classes(cfg)
    if scope not in _SCOPES:
        raise ConfigError(f"default_scope must be 'mmdet' or 'mmpretrain', got {scope!r}")
    return cfg


def _scope_of_classes(cfg: Config) -> str | None:
    """The toolbox of the model of a pure-Python config, which has classes in place of names."""
    model = cfg.get('model', {})
    classes = (kind for kind in (model.get('of'), model.get('type')) if isinstance(kind, type))
    return next((kind.__module__.partition('.')[0] for kind in classes), None)


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """``key=value`` pairs as ``--cfg-options`` understands them, by dotted key."""
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    return parser.parse_args(['--cfg-options', *options] if options else []).cfg_options or {}


def check_folder(path: str | Path, field: str) -> None:
    """Complain about a folder, which may not exist yet, that nothing can be written into.

    Raises:
        ConfigError: A file is in its place, or the user may not write there.
    """
    for folder in (Path(path).absolute(), *Path(path).absolute().parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{field}: '{folder}' is a file; choose a folder")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{field}: nothing can be written into '{folder}'; choose another folder, or get "
                'the right to write there'
            )
        if folder.exists():
            return


def _prepare(args: argparse.Namespace) -> Config:
    """The config with what both tools put into it."""
    check_launcher(args.launcher)
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    check_folder(cfg.work_dir, '--work-dir' if args.work_dir is not None else 'work_dir')
    set_loader_defaults(cfg)
    return cfg


def set_loader_defaults(cfg: Config) -> None:
    """Fill in what MMPretrain's configs rely on its tools for, and keep no worker where none is.

    The latter is for all configs: PyTorch refuses ``persistent_workers`` and ``prefetch_factor``
    without workers, so that ``num_workers=0`` on the command line would not be enough.
    """
    is_mmpretrain = cfg.default_scope == 'mmpretrain'
    for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(field)
        if loader is None:
            continue
        has_workers = check_integer(field, 'num_workers', loader.get('num_workers', 0), 0) > 0
        if is_mmpretrain:
            loader.setdefault('pin_memory', get_device() != 'cpu')
            loader.setdefault('persistent_workers', has_workers)
            loader.setdefault('collate_fn', dict(type='default_collate'))
        if loader.get('persistent_workers') and not has_workers:
            loader.persistent_workers = False
        if not has_workers:
            loader.pop('prefetch_factor', None)


def _set_amp(cfg: Config, requested: bool) -> bool:
    """Mixed precision by ``--amp`` or by the config, in the kind that the device can do.

    Returns:
        Whether the training is in mixed precision.
    """
    wrapper = cfg.get('optim_wrapper')
    type_ = wrapper.get('type', 'OptimWrapper') if wrapper is not None else None
    name = name_of(type_)
    # As a stored config asks for it that was begun without a GPU.
    is_asked = name in ('AmpOptimWrapper', 'CpuAmpOptimWrapper')
    if not is_asked and name != 'OptimWrapper' and requested:
        raise ConfigError(
            f"--amp: optim_wrapper.type must be 'OptimWrapper' or 'AmpOptimWrapper', got {type_!r}"
        )
    if not is_asked and not requested:
        return False
    if get_device() != 'cpu':
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
        return True
    from mmdet_moe.compat.amp import has_bfloat16  # which registers the wrapper, too

    wrapper.type = 'CpuAmpOptimWrapper'
    for key in ('loss_scale', 'dtype', 'use_fsdp'):
        wrapper.pop(key, None)
    if has_bfloat16():
        note('mixed precision without a GPU: bfloat16, no loss scale')
        return True
    note(
        'this processor has no instructions for bfloat16, which would be many times slower than '
        'float32 here: the training is in float32, without mixed precision'
    )
    return False


def _set_auto_scale_lr(cfg: Config) -> None:
    setting = cfg.get('auto_scale_lr')
    if not isinstance(setting, Mapping) or 'base_batch_size' not in setting:
        raise ConfigError(
            '--auto-scale-lr needs auto_scale_lr.base_batch_size in the config: the batch size '
            'that the learning rate is meant for'
        )
    cfg.auto_scale_lr.enable = True


def _set_resume(cfg: Config, resume: str) -> None:
    if resume != _AUTO_RESUME:
        check_checkpoint(resume, '--resume')
        cfg.resume, cfg.load_from = True, resume
        return
    latest = resumable_checkpoint(cfg.work_dir)
    if latest is None:
        cfg.resume = False
        note(f"--resume: there is nothing to resume in '{cfg.work_dir}', training starts anew")
        return
    cfg.resume, cfg.load_from = True, latest


def _set_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Draw the results: the toolboxes name the same settings differently."""
    is_detector = cfg.default_scope == 'mmdet'
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    hook_type = 'DetVisualizationHook' if is_detector else 'VisualizationHook'
    # None switches a hook off.
    hook = hooks['visualization'] = hooks.get('visualization') or ConfigDict(type=hook_type)
    hook.update(show=args.show, wait_time=args.wait_time)
    hook['draw' if is_detector else 'enable'] = True
    if not is_detector:
        hook.interval = 1  # MMPretrain's applies to tests, too; MMDetection's to validations only
    if args.show_dir and is_detector:
        hook.test_out_dir = args.show_dir
    if cfg.get('visualizer') is None:
        cfg.visualizer = dict(
            type='DetLocalVisualizer' if is_detector else 'UniversalVisualizer',
            vis_backends=[dict(type='LocalVisBackend')],
            name='visualizer',
        )


def _set_show_dir(runner: Runner, show_dir: str) -> None:
    """Draw a classifier's results where MMDetection's hook draws those of a detector."""
    from mmpretrain.engine.hooks import VisualizationHook

    for hook in runner.hooks:
        if isinstance(hook, VisualizationHook):
            hook.out_dir = osp.join(runner.work_dir, runner.timestamp, show_dir)


def image_sets(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The parts of a data set that have the pipelines: what wrappers hold, and each one of several.

    Args:
        dataset: The config of a data set, the parts of which are no copies.
    """
    if 'dataset' in dataset:
        yield from image_sets(dataset.dataset)
    elif 'datasets' in dataset and 'pipeline' not in dataset:
        for part in dataset.datasets:
            yield from image_sets(part)
    else:
        yield dataset


def _set_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation, by default with flipped images."""
    is_detector = cfg.default_scope == 'mmdet'
    if 'tta_model' not in cfg:
        cfg.tta_model = _default_tta_model(is_detector)
    for dataset in image_sets(cfg.test_dataloader.dataset):
        if 'tta_pipeline' not in cfg and not dataset.get('pipeline'):
            raise ConfigError(
                '--tta: the config needs tta_pipeline, for a data set of test_dataloader has no '
                'pipeline to flip the images in'
            )
        dataset.pipeline = cfg.get('tta_pipeline') or _flip_pipeline(dataset.pipeline, is_detector)
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _default_tta_model(is_detector: bool) -> dict:
    if not is_detector:
        return dict(type='mmpretrain.AverageClsScoreTTA')
    return dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    )


def _flip_pipeline(pipeline: Sequence[ConfigDict], is_detector: bool) -> list:
    """``pipeline`` with a flipped and a plain variant before its packing transform."""
    *transforms, pack = copy.deepcopy(list(pipeline))
    if is_detector:
        usual = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        pack['meta_keys'] = (*pack.get('meta_keys', usual), 'flip', 'flip_direction')
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    return [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]


# Running ---------------------------------------------------------------------------------------


def fail(error: Exception, running: bool) -> None:
    """Print the sentence about an error and exit, or raise it again if it is no user's mistake.

    Before the run all processes meet the same mistakes, so that the first of each machine speaks
    for them; during the run only one of them may have met it.
    """
    sentence = None if os.environ.get(TRACEBACK_VARIABLE) == '1' else explain(error)
    if sentence is None:
        raise error
    if running or local_rank() == 0:
        suffix = f' (rank {global_rank()})' if global_rank() else ''
        print(f'error: {sentence}{suffix}', file=sys.stderr, flush=True)
    raise SystemExit(EXIT_STATUS)


def _execute(prepare: Callable[[], Runner], run: Callable[[Runner], object]) -> None:
    running = False
    try:
        runner = prepare()
        running = True
        run(runner)
    except Exception as error:
        fail(error, running)
    # The wrapped model keeps the group, and its threads, alive: they must not outlive Python.
    del runner
    _leave_group()


def _leave_group() -> None:
    """End the process group in order; after an error the others may never answer."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # nobody leaves while another one still works
        gc.collect()
        dist.destroy_process_group()


# Tools -------------------------------------------------------------------------------------------


def _model_wrapper(cfg: Config) -> dict:
    ours = dict(
        type='mmdet_moe.ExpertParallelDDP',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper = {**ours, **(cfg.get('model_wrapper_cfg') or {})}
    is_ddp = name_of(wrapper['type']).endswith(('DistributedDataParallel', 'ParallelDDP'))
    return wrapper if is_ddp else cfg.model_wrapper_cfg  # FSDP has none of these options


def _build_runner(cfg: Config) -> Runner:
    if cfg.default_scope == 'mmdet':
        from mmdet.utils import setup_cache_size_limit_of_dynamo

        setup_cache_size_limit_of_dynamo()
    if cfg.get('launcher', 'none') != 'none':
        cfg.model_wrapper_cfg = _model_wrapper(cfg)
    init_cpu_group(cfg)
    if get_device() == 'cpu':
        keep_large_blocks()
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(ImageErrorHook())
    runner.register_hook(TestedCheckpointHook())
    if not any(isinstance(hook, ExpertParallelHook) for hook in runner.hooks):
        runner.register_hook(ExpertParallelHook())
    return runner


def _check(cfg: Config, mode: str, checkpoint: str | None = None) -> None:
    # One process per machine reads the annotation files; its failure ends the others.
    if local_rank() == 0:
        check_runner(cfg)
        check_config(cfg, mode, checkpoint)


def _prepare_training(args: argparse.Namespace) -> Runner:
    cfg = _prepare(args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    is_mixed = _set_amp(cfg, args.amp)
    if args.auto_scale_lr:
        _set_auto_scale_lr(cfg)
    if args.resume is not None:
        _set_resume(cfg, args.resume)
    _check(cfg, 'train')
    runner = _build_runner(cfg)
    # Convolutions in mixed precision are faster so: always on a CPU, on a GPU in most measurements
    # (docs/dispatch.md).
    if args.channels_last or is_mixed:
        if get_device() == 'cpu' and not is_mixed:
            check_float32(runner.model)
        runner.register_hook(ChannelsLastHook())
    runner.register_hook(ExactResumeHook())
    runner.register_hook(ResumedScheduleHook())
    runner.register_hook(ExpertReportHook())
    return runner


def run_train(argv: Sequence[str] | None = None) -> None:
    """Run ``tools/train.py``.

    Args:
        argv: arguments; those of the process if None.

    Raises:
        SystemExit: with status 2 after a mistake in the config, the data or the command line.
    """
    args = _parse_train(argv)
    _execute(lambda: _prepare_training(args), lambda runner: runner.train())


def _prepare_test(args: argparse.Namespace) -> Runner:
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f"--out must end in .pkl or .pickle, got '{args.out}'")
    if args.out is not None:
        check_folder(osp.dirname(args.out), '--out')
    cfg = _prepare(args)
    if cfg.get('test_dataloader') is None:
        raise ConfigError('test_dataloader: the config has none, so there is nothing to test on')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    draws = args.show or args.show_dir
    if draws and args.tta and cfg.default_scope == 'mmpretrain':
        raise ConfigError(
            '--tta does not go with --show and --show-dir for a classifier: the visualization hook '
            'of MMPretrain draws no images that exist in several variants'
        )
    if draws:
        for dataset in datasets_of(cfg, cfg.test_dataloader.dataset, 'test_dataloader.dataset'):
            if dataset.cls is not None and not hasattr(dataset.cls, 'get_data_info'):
                raise ConfigError(
                    f'--show and --show-dir need images to draw in, which {dataset.field}, '
                    f'{dataset.cls.__name__}, has not'
                )
        _set_visualization(cfg, args)
    _check(cfg, 'test', args.checkpoint)
    if args.tta:
        _set_tta(cfg)
    runner = _build_runner(cfg)
    if args.top_k is not None:  # complains now, rather than after the first test
        set_top_k(unwrapped_model(runner), set_top_k(unwrapped_model(runner), args.top_k))
    if args.show_dir and cfg.default_scope == 'mmpretrain':
        _set_show_dir(runner, args.show_dir)
    if args.out is not None:
        runner.register_hook(_DumpHook(cfg.default_scope, args.out))
    return runner


class _DumpHook(Hook):
    """Writes the predictions, whatever evaluator the config has."""

    def __init__(self, scope: str, path: str) -> None:
        if scope == 'mmdet':
            from mmdet.evaluation import DumpDetResults as Dump
        else:
            from mmengine.evaluator import DumpResults as Dump
        self._evaluator = Evaluator(Dump(out_file_path=path))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence
    ) -> None:
        self._evaluator.process(outputs, data_batch)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        self._evaluator.evaluate(len(runner.test_dataloader.dataset))


def run_test(argv: Sequence[str] | None = None) -> None:
    """Run ``tools/test.py``.

    Args:
        argv: arguments; those of the process if None.

    Raises:
        SystemExit: with status 2 after a mistake in the config, the data or the command line.
    """
    args = _parse_test(argv)
    _execute(lambda: _prepare_test(args), lambda runner: _test(runner, args.top_k))


def _test(runner: Runner, top_k: int | None) -> None:
    """Test the model, and with another number of chosen experts a second time."""
    before = runner.test()
    if top_k is None:
        return
    usual = set_top_k(unwrapped_model(runner), top_k)
    after = runner.test()
    lines = [('', f'top_k={",".join(map(str, sorted(set(usual.values()))))}', f'top_k={top_k}')]
    for name, value in before.items():
        if isinstance(value, Real):
            lines.append((name, f'{value:.4f}', f'{after[name]:.4f}'))
    runner.logger.info(f'With other numbers of experts:\n{in_columns(lines)}')
