"""Which files are checkpoints, and from which one a run goes on."""

import os.path as osp
import re
import zipfile
from pathlib import Path

from mmdet_moe.engine.preflight.datasets import is_remote
from mmdet_moe.errors import ConfigError

_RECORD = 'last_checkpoint'
# Of CheckpointHook, by epochs or iterations; others may be best or published ones.
_SAVED = re.compile(r'(?:epoch|iter)_(\d+)\.pth')


def check_checkpoint(path: str, field: str) -> None:
    """Complain about a local checkpoint that is missing or no checkpoint.

    Addresses (``https://``, ``torchvision://``, ...) are left to MMEngine.

    Args:
        path: file or address.
        field: what to call it in the message.

    Raises:
        ConfigError: the file does not exist or was not written by PyTorch.
    """
    if is_remote(path):
        return
    if not osp.isfile(path):
        fix = (
            'give the path of an existing checkpoint (`python tools/prepare_data.py --help` lists '
            'the weights that it prepares)'
        )
        if field == 'load_from':
            fix = 'train that model first, or choose with --cfg-options load_from=FILE (or None)'
        raise ConfigError(f"{field}: there is no file '{path}'; {fix}")
    if not _is_complete(path):
        raise ConfigError(
            f"{field}: '{path}' is not a PyTorch checkpoint, or an incomplete one; copy or "
            'download it again'
        )


def _is_complete(path: str) -> bool:
    # PyTorch writes zip archives since 1.6, and wrote bare pickles (first byte 0x80) before. The
    # directory of a zip archive is its end, which a file lacks that was not written out.
    with open(path, 'rb') as file:
        is_pickle = file.read(1) == b'\x80'
    return is_pickle or zipfile.is_zipfile(path)


def recorded_checkpoint(work_dir: str | Path) -> str | None:
    """What MMEngine noted as the last checkpoint of a run, also after its folder was moved.

    The file itself may be missing. None before the first checkpoint.
    """
    record = Path(work_dir, _RECORD)
    path = record.read_text('utf-8', 'replace').strip() if record.is_file() else ''
    if not path:
        return None
    # The file beside the note comes first: of a copied run, the path is that of the original.
    beside = osp.join(work_dir, osp.basename(path))
    return path if is_remote(path) or (osp.isfile(path) and not osp.isfile(beside)) else beside


def resumable_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint from which a run goes on; None if it has to start anew.

    That is the recorded one, or else the one that was written last, of those that are complete:
    MMEngine deletes a checkpoint before it writes the next one, and notes that one only after it,
    so that an interruption in between leaves a note of a deleted file beside half of a new one.
    """
    recorded = recorded_checkpoint(work_dir)
    if recorded is not None and is_remote(recorded):
        return recorded
    # By time, for an older and longer training may have left higher numbers in the folder.
    saved = sorted(
        (path for path in Path(work_dir).glob('*.pth') if _SAVED.fullmatch(path.name)),
        key=lambda path: (path.stat().st_mtime_ns, int(_SAVED.fullmatch(path.name)[1])),
        reverse=True,
    )
    candidates = [path for path in (recorded, *map(str, saved)) if path and osp.isfile(path)]
    return next(filter(_is_complete, candidates), None)
