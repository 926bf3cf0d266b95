"""``tools/look.py``: a first look at experts, before any training of one's own.

The trained models come with the package, their weights in 8 bits: the detector of ``make demo``,
whose images are generated, and a classifier of CIFAR-100, whose images are not there. The analysis
is that of ``tools/analyze_experts.py``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdet_moe.analysis.command import analyse, parse
from mmdet_moe.analysis.measuring import write_checkpoint
from mmdet_moe.cli import check_folder, fail, load_config, parse_options
from mmdet_moe.compat.configs import config_path
from mmdet_moe.datasets import digit_scenes
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError

__all__ = ['MODELS', 'Shipped', 'pack', 'run_look', 'unpack']

ASSETS = Path(__file__).parents[1] / 'assets'


@dataclass(frozen=True)
class Shipped:
    """A trained model that comes with the package.

    Attributes:
        name: Of its config in ``configs/demo`` and of its weights in :data:`ASSETS`, which
            :func:`pack` made.
        images: How many it is looked at with; None: all.
        generated: Whether they are made on the spot.
    """

    name: str
    images: int | None = None
    generated: bool = False

    @property
    def asset(self) -> Path:
        """Its weights."""
        return ASSETS / f'{self.name}.pth'

    @property
    def config(self) -> str:
        """The path of its config."""
        return config_path(f'demo/{self.name}.py')


MODELS = {
    'digits': Shipped('retinanet_moe_soft_digits', images=100, generated=True),
    'cifar100': Shipped('resnet18_moe_soft_kl_cifar100'),
}
_LEVELS = 127
_SCALE = '.scale'


def pack(checkpoint: str | Path, out: str | Path) -> None:
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


def unpack(path: str | Path) -> dict[str, Any]:
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
        description='Look at the experts of a trained model that ships with mmdet_moe: a detector '
        'of digits, on freshly generated images, or a classifier of CIFAR-100.'
    )
    parser.add_argument('model', nargs='?', choices=MODELS, default='digits', help='(%(default)s)')
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs', 'look'), metavar='DIR', help='(%(default)s)'
    )
    parser.add_argument(
        '--images', type=int, metavar='N', help='how many (digits: 100, cifar100: all 10,000)'
    )
    parser.add_argument(
        '--data',
        type=Path,
        metavar='DIR',
        help='folder of CIFAR-100, as `tools/prepare_data.py cifar100` makes it (CIFAR100_ROOT, or '
        'data/cifar100)',
    )
    parser.add_argument('--verbose', action='store_true', help='print the whole verdict')
    args = parser.parse_args(argv)
    try:
        look(args.out, args.model, args.images, args.data, args.verbose)
    except Exception as error:
        fail(error, running=False)


def look(
    out: Path,
    model: str = 'digits',
    images: int | None = None,
    data: Path | None = None,
    verbose: bool = False,
) -> dict:
    """Analyse a shipped model, on images that are generated where it is one of those.

    Args:
        out: Folder of generated images, the checkpoint and the results, which a second call reuses.
        model: One of :data:`MODELS`.
        images: How many; by default the model's own number.
        data: Folder of images that are not generated; by default what the config says.
        verbose: Whether to print the whole verdict.

    Returns:
        The content of ``experts.json``.

    Raises:
        ConfigError: If ``out`` cannot be written, images are missing or not asked for, or
            scikit-learn or scikit-image is missing.
    """
    shipped = MODELS[model]
    images = shipped.images if images is None else images
    if images is not None and images < 1:
        raise ConfigError(f'--images={images} must be at least 1')
    check_folder(out, '--out')
    number = 'all' if images is None else images
    if shipped.generated:
        if data is not None:
            raise ConfigError(f'--data: the images of {model} are generated; leave it out')
        data = out / f'images_{number}'
        digit_scenes.generate(data, num_train=1, num_val=images, size=256, seed=0)
    options = [] if data is None else [f'data_root={data}']
    check_config(load_config(shipped.config, parse_options(options)), 'val', str(shipped.asset))
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, content = out / shipped.asset.name, unpack(shipped.asset)
    # Again each time: what is there may be that of an earlier version, or of an interrupted run.
    write_checkpoint(checkpoint, content['state_dict'], content['meta'])
    folder = f'experts_{number}' if shipped.generated else f'experts_{model}_{number}'
    arguments = [shipped.config, str(checkpoint), f'--out={out / folder}']
    if images is not None:
        arguments.append(f'--max-images={images}')
    if verbose:
        arguments.append('--verbose')
    return analyse(parse([*arguments, *(['--cfg-options', *options] if options else [])]))
