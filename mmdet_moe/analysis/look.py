"""``tools/look.py``: a first look at experts, before any training of one's own.

The trained model comes with the package: the mixture of experts of ``make demo``, its weights in 8
bits. The images are generated, the analysis is that of ``tools/analyze_experts.py``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmdet_moe.analysis.command import analyse, parse
from mmdet_moe.analysis.measuring import write_checkpoint
from mmdet_moe.cli import check_folder, fail
from mmdet_moe.compat.configs import config_path
from mmdet_moe.datasets import digit_scenes
from mmdet_moe.errors import ConfigError

__all__ = ['ASSET', 'pack', 'run_look', 'unpack']

#: `pack` made it of a run of ``make demo``.
ASSET = Path(__file__).parents[1] / 'assets' / 'retinanet_moe_soft_digits.pth'
CONFIG = 'demo/retinanet_moe_soft_digits.py'
_LEVELS = 127
_SCALE = '.scale'


def pack(checkpoint: str | Path, out: str | Path = ASSET) -> None:
    """Write the weights of a checkpoint in 8 bits, without the state of its training.

    Every slice ``w`` along the first dimension of a weight of two dimensions or more becomes
    ``round(w / s)``, int8, and ``s = max |w| / 127``, float32; other tensors stay as they are.

    Args:
        checkpoint: One of MMEngine, of floating-point weights.
        out: The file to write.
    """
    content = torch.load(checkpoint, map_location='cpu', weights_only=True)
    packed = {}
    for name, tensor in content['state_dict'].items():
        if tensor.is_floating_point() and tensor.dim() > 1:
            scale = tensor.abs().flatten(1).amax(1).clamp(min=1e-12) / _LEVELS
            packed[name + _SCALE] = scale
            tensor = (tensor / _per_slice(scale, tensor)).round().to(torch.int8)
        packed[name] = tensor.clone()
    meta = {'dataset_meta': dict(content['meta']['dataset_meta'])}
    torch.save({'meta': meta, 'state_dict': packed}, out)


def unpack(path: str | Path = ASSET) -> dict[str, Any]:
    """The checkpoint that :func:`pack` wrote, in float32, as MMEngine loads it."""
    content = torch.load(path, map_location='cpu', weights_only=True)
    packed = content['state_dict']
    content['state_dict'] = {
        name: tensor * _per_slice(packed[name + _SCALE], tensor)
        if name + _SCALE in packed
        else tensor
        for name, tensor in packed.items()
        if not name.endswith(_SCALE)
    }
    return content


def _per_slice(scale: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return scale.reshape(-1, *[1] * (tensor.dim() - 1))


def run_look(argv: Sequence[str] | None = None) -> None:
    """Run ``tools/look.py``.

    Args:
        argv: arguments; those of the process if None.

    Raises:
        SystemExit: with status 2 after a mistake in the command line.
    """
    parser = argparse.ArgumentParser(
        description='Look at the experts of the trained detector that ships with mmdet_moe, on '
        'freshly generated images.'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs', 'look'), metavar='DIR', help='(%(default)s)'
    )
    parser.add_argument('--images', type=int, default=100, metavar='N', help='(%(default)s)')
    parser.add_argument('--verbose', action='store_true', help='print the whole verdict')
    args = parser.parse_args(argv)
    try:
        look(args.out, args.images, args.verbose)
    except Exception as error:
        fail(error, running=False)


def look(out: Path, images: int = 100, verbose: bool = False) -> dict:
    """Generate images, and analyse the shipped model on them.

    Args:
        out: Folder of the images, the checkpoint and the results, which a second call reuses.
        images: Their number.
        verbose: Whether to print the whole verdict.

    Returns:
        The content of ``experts.json``.

    Raises:
        ConfigError: If ``out`` cannot be written, or scikit-learn or scikit-image is missing.
    """
    if images < 1:
        raise ConfigError(f'--images={images} must be at least 1')
    check_folder(out, '--out')
    data, checkpoint = out / f'images_{images}', out / ASSET.name
    digit_scenes.generate(data, num_train=1, num_val=images, size=256, seed=0)
    content = unpack()
    # Again each time: what is there may be that of an earlier version, or of an interrupted run.
    write_checkpoint(checkpoint, content['state_dict'], content['meta'])
    arguments = [config_path(CONFIG), str(checkpoint), f'--out={out / f"experts_{images}"}']
    if verbose:
        arguments.append('--verbose')
    return analyse(parse([*arguments, '--cfg-options', f'data_root={data}']))
