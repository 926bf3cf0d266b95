"""Parts of a model that do not train."""

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.files import replace_file
from mmdet_moe.registry import MODELS

Maps = Tensor | tuple[Tensor, ...]


@MODELS.register_module('Frozen')
def frozen(module: dict, cache: str | None = None) -> nn.Module:
    """Build a module whose parameters and normalisation statistics never change.

    It is frozen from its construction, hence before a distributed wrapper collects the parameters
    that it waits for, and its parameters keep their names in checkpoints::

        neck=dict(_delete_=True, type='mmdet_moe.Frozen', module={{_base_.model.neck}})

    Args:
        module: Config of the module, of any registry.
        cache: Folder for what the module makes of each image, for a backbone (N, C, H, W) → maps.
            An image that comes again, pixel by pixel, in this training or another one with the same
            weights, is read from there. Worth it where images repeat: without augmentation, or with
            flips alone, at one size (``BatchFixedSizePad``, so that the padding does not depend on
            the rest of the batch). The results are those of the module to rounding, which depends
            on how many images it computes together. Nothing is ever deleted there.

    Returns:
        The module itself, with ``requires_grad=False``; its forward pass always runs in eval mode.
    """
    built = MMENGINE_MODELS.build(module)
    built.requires_grad_(False)
    built.register_forward_pre_hook(_stay_in_eval_mode)
    if cache is not None:
        built.forward = _Cached(built, str(module), Path(cache))
    return built


def _stay_in_eval_mode(module: nn.Module, args: tuple) -> None:
    if module.training:
        module.eval()


class _Cached:
    """The forward pass of a frozen module, by way of a folder."""

    def __init__(self, module: nn.Module, config: str, folder: Path) -> None:
        self.module, self.config, self.folder = module, config, folder
        self._seen: list | None = None
        self._fingerprint = b''

    def __call__(self, x: Tensor) -> Maps:
        # That of the class, because this object stands in the place of the module's.
        compute: Callable[[Tensor], Maps] = type(self.module).forward.__get__(self.module)
        if not isinstance(x, Tensor):
            raise ConfigError(
                f'Frozen: cache is for a backbone, but {type(self.module).__name__} is given a '
                f'{type(x).__name__} instead of images; leave cache out'
            )
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.requires_grad or not len(x):
            return compute(x)
        paths = self._paths(x)
        found = [_read(path, x.device) for path in paths]
        if missing := [i for i, maps in enumerate(found) if maps is None]:
            with torch.no_grad():
                computed = compute(x if len(missing) == len(x) else x[missing])
            self._check(computed, len(missing))
            for row, i in enumerate(missing):
                is_one = isinstance(computed, Tensor)
                # A view would be written with all of its batch.
                of_image = (m[row].clone() for m in ((computed,) if is_one else computed))
                found[i] = next(of_image) if is_one else tuple(of_image)
                self._write(paths[i], found[i])
        if isinstance(found[0], Tensor):
            return torch.stack(found)
        return tuple(torch.stack(of_images) for of_images in zip(*found, strict=True))

    def _paths(self, x: Tensor) -> list[Path]:
        """Where the maps of each image are, or will be."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        begun = hashlib.blake2b(self._of_module() + str((dtype, x.shape[1:])).encode())
        names = []
        for image in x.detach().cpu().contiguous():
            of_image = begun.copy()
            of_image.update(image.reshape(-1).view(torch.uint8).numpy())
            names.append(of_image.hexdigest()[:40])
        return [self.folder / name[:2] / f'{name[2:]}.pt' for name in names]

    def _of_module(self) -> bytes:
        """A fingerprint of config and weights, taken anew when they have changed."""
        state = self.module.state_dict(keep_vars=True)
        seen = [(t._version, t.data_ptr(), t.dtype) for t in state.values()]
        if seen != self._seen:
            if trained := [name for name, tensor in state.items() if tensor.requires_grad]:
                raise ConfigError(
                    f'Frozen: cache would keep {trained[0]} from training, which is a part of '
                    f'{type(self.module).__name__}; leave cache out, or put no experts into it'
                )
            digest = hashlib.blake2b(self.config.encode())
            for name, tensor in state.items():
                digest.update(name.encode())
                content = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(content.view(torch.uint8).numpy())
            self._seen, self._fingerprint = seen, digest.digest()
        return self._fingerprint

    def _check(self, computed: object, num_images: int) -> None:
        maps = (computed,) if isinstance(computed, Tensor) else computed
        if not isinstance(maps, (tuple, list)) or not all(
            isinstance(m, Tensor) and len(m) == num_images for m in maps
        ):
            raise ConfigError(
                f'Frozen: cache is for maps, one of each image, but {type(self.module).__name__} '
                f'gives a {type(computed).__name__} of something else; leave cache out'
            )

    def _write(self, path: Path, maps: Maps) -> None:
        content = io.BytesIO()
        torch.save(maps, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content.getvalue())
        except OSError as error:
            raise ConfigError(
                f"Frozen: cache='{self.folder}' cannot be written: {error.strerror}; choose "
                'another folder, or leave cache out'
            ) from error


def _read(path: Path, device: torch.device) -> Maps | None:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return None  # missing, or damaged: computed again, and replaced
