"""What an environment lacks: mmcv's compiled ops, and our configs under the name of the package.

:func:`install` makes these lazily possible by finders in ``sys.meta_path``:

- ``mmcv._ext`` can be imported where mmcv was installed without its compiled ops, because
  MMDetection cannot even be imported then. A compiled mmcv always wins.
- ``_base_ = 'mmdet_moe::...'`` in any config of MMEngine names one of our configs.
- MMDetection's ``SSDHead`` can predict (open-mmlab/mmdetection#11063).
- MMDetection reads COCO files in which what can be told without guessing is missing.
- ``torch.load`` reads MMEngine's checkpoints without ``weights_only=False``.
- MMEngine's ``activation_checkpointing`` gives whole backbones, necks and heads their gradients.
- The toolboxes leave out a few messages that a user can do nothing about.

:func:`guard_checkpoints` is for programs that use the package, not for all of an installation.

An installation lets every Python program import :mod:`mmdet_moe` (``mmdet_moe.pth``), so that the
toolboxes' own tools have all of this; with ``MMDET_MOE_AUTOLOAD=0`` in the environment only those
programs have it that import the package themselves. Hence nothing but what Python itself loads is
imported here.
"""

import sys

__all__ = ['guard_checkpoints', 'install']

EXT_NAME = 'mmcv._ext'
CONFIG_NAME = 'mmengine.config.config'
SSD_NAME = 'mmdet.models.dense_heads.ssd_head'
LOGGING_NAME = 'mmengine.logging'
COCO_NAME = 'mmdet.datasets.api_wrappers.coco_api'
CHECKPOINTING_NAME = 'mmengine.runner.activation_checkpointing'
HISTORY_NAME = 'mmengine.logging.history_buffer'
READER_NAME = 'mmengine.runner.checkpoint'
WRITER_NAME = 'mmengine.fileio.backends.local_backend'


class _MmcvExtFinder:
    """Answers for the module name ``mmcv._ext`` and for nothing else."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != EXT_NAME:
            return None
        from importlib.util import spec_from_file_location

        return spec_from_file_location(fullname, f'{__path__[0]}/mmcv_ext.py')


class _CompletingFinder(dict):
    """Finds modules as others do, and has them completed once they are executed: how, by name."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self:
            return None
        from importlib.util import find_spec

        complete = self.pop(fullname)  # it is the others' turn
        spec = find_spec(fullname)
        self[fullname] = complete  # who asked may not import it yet
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), complete(module))
        return spec


def _late(name: str, function: str):
    """A function of a module beside this one, which is imported only when it is called."""

    def complete(module) -> None:
        from importlib import import_module

        getattr(import_module(f'{__name__}.{name}'), function)(module)

    return complete


def _add_loss(module) -> None:
    """Every head of MMDetection asks its ``loss_cls`` before it predicts, and SSD's has none."""
    from functools import wraps

    theirs = module.SSDHead.__init__

    @wraps(theirs)
    def __init__(self, *args, **kwargs):
        theirs(self, *args, **kwargs)
        if not hasattr(self, 'loss_cls'):
            self.loss_cls = None

    module.SSDHead.__init__ = __init__


def _checkpoint_any_input(module) -> None:
    """PyTorch's reentrant way leaves a module without gradients if it is given images or a tuple of
    maps, and takes no keywords."""
    from functools import partial

    def wrap_forward(forward):
        return partial(module.checkpoint, forward, use_reentrant=False)

    module.wrap_forward = wrap_forward


_MMCV_FINDER = _MmcvExtFinder()
_COMPLETING = _CompletingFinder()


def install() -> None:
    """Put the finders into place; imports no toolbox, and a second call does nothing."""
    if _MMCV_FINDER in sys.meta_path:
        return
    # Python asks it only after its ordinary finders found nothing.
    sys.meta_path.append(_MMCV_FINDER)
    sys.meta_path.insert(0, _COMPLETING)
    _complete(
        {
            CONFIG_NAME: _late('configs', 'add_to'),
            SSD_NAME: _add_loss,
            COCO_NAME: _late('coco', 'mend'),
            CHECKPOINTING_NAME: _checkpoint_any_input,
            HISTORY_NAME: _late('checkpoints', 'allow_history'),
            LOGGING_NAME: _late('quiet', 'hush'),
        }
    )


def guard_checkpoints() -> None:
    """Checkpoints run no code when they are read, and are written whole or not at all."""
    _complete(
        {
            READER_NAME: _late('checkpoints', 'guard_reading'),
            WRITER_NAME: _late('checkpoints', 'write_whole'),
        }
    )


def _complete(functions: dict) -> None:
    """Have modules completed: those of now at once, the others once they are imported."""
    for name, complete in functions.items():
        if name in sys.modules:
            complete(sys.modules[name])
        else:
            _COMPLETING[name] = complete
