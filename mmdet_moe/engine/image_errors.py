"""Say which image cannot be read.

OpenCV reports an empty file as a failed assertion without the file's name, and a DataLoader worker
hands every error on inside a long text. The hook wraps the transforms that read images so that the
error is one :class:`~mmdet_moe.errors.ConfigError` sentence with the name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_moe.errors import ConfigError

# Where data set wrappers, pipelines and transforms of transforms keep their parts.
_PART_NAMES = ('dataset', 'datasets', 'pipeline', 'transforms', 'subroutines')


class ImageReader(BaseTransform):
    """Calls another transform and names the image when that fails."""

    def __init__(self, transform: LoadImageFromFile) -> None:
        self.inner = transform

    def transform(self, results: dict) -> dict | None:
        """Read the image.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            return self.inner(results)
        except MemoryError:
            raise
        except Exception as error:
            path = results.get('img_path')
            reason = (
                'the file is damaged or no image; copy it again, or take it out of the data set'
            )
            if isinstance(error, OSError) and error.strerror:
                reason = error.strerror
            raise ConfigError(f"cannot read the image '{path}': {reason}") from error

    def __repr__(self) -> str:
        return repr(self.inner)


def _parts(owner: Any) -> Iterator[Any]:
    for name in _PART_NAMES:
        part = getattr(owner, name, None)
        if isinstance(part, (list, tuple)):
            yield from part
        elif part is not None:
            yield part


def wrap_readers(owner: Any, seen: set[int]) -> None:
    """Wrap the readers in the pipelines of ``owner`` and of its parts, but for those in ``seen``.

    Args:
        owner: A data set, or a wrapper of some.
        seen: The ids of what was met before; added to.
    """
    if id(owner) in seen or isinstance(owner, (ImageReader, str, Mapping)):
        return
    seen.add(id(owner))
    transforms = getattr(owner, 'transforms', None)
    if isinstance(transforms, list):
        owner.transforms = [
            ImageReader(item) if isinstance(item, LoadImageFromFile) else item
            for item in transforms
        ]
    for part in _parts(owner):
        wrap_readers(part, seen)


class ImageErrorHook(Hook):
    """Wraps the image readers of all data loaders once they exist and before they start."""

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        """Wrap the readers of the loops that are built, the others being plain configs still."""
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            loader = getattr(loop, 'dataloader', None)
            if loader is not None:
                wrap_readers(loader.dataset, set())
