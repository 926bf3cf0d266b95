"""A trained model as the analysis needs it."""

from collections.abc import Iterable

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmdet_moe.compat.malloc import keep_large_blocks
from mmdet_moe.engine.tested_checkpoint import (
    check_left_out,
    check_unpacked,
    note_other_settings,
)
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.mumoe import Factors


def load_model(cfg: Config, checkpoint: str, device: str | None) -> tuple[nn.Module, dict]:
    """Build the model of a config, with the weights of a checkpoint, ready for predictions.

    Args:
        cfg: The config.
        checkpoint: The file.
        device: Where to; None for a GPU if there is one.

    Returns:
        The model, and what the checkpoint says of itself.

    Raises:
        ConfigError: If config, checkpoint and device do not fit together.
    """
    init_default_scope(cfg.default_scope)
    device = device or get_device()
    if device == 'cpu':
        keep_large_blocks()
    model = build_model(cfg)
    meta = load_weights(model, checkpoint)
    try:
        model.to(device).eval()
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"--device: the model cannot be put on '{device}': {error}") from error
    return model, meta


def task_of(model: nn.Module) -> str:
    """``'detection'`` or ``'classification'``: what the model predicts, boxes or classes."""
    is_detector = hasattr(model, 'bbox_head') or hasattr(model, 'roi_head')
    return 'detection' if is_detector else 'classification'


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config as MMEngine's Runner does.

    MMPretrain's configs have their ``data_preprocessor`` outside the model.
    """
    model = cfg.model.copy()
    if 'data_preprocessor' in cfg:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(model)


def load_weights(model: nn.Module, path: str) -> dict:
    """Load a checkpoint, all of it.

    Returns:
        What the checkpoint says of itself, such as ``dataset_meta``.

    Raises:
        ConfigError: If it is not one of this model.
    """
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    state = checkpoint.get('state_dict', checkpoint)
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    check_unpacked(state)
    expected = model.state_dict()
    missing = [key for key in expected if key not in state and 'num_batches_tracked' not in key]
    if missing:
        hint = 'give the config that it was trained with'
        if _has_router(expected) and not _has_router(state):
            hint = 'it looks like a dense model: train the MoE model first, or use tools/upcycle.py'
        raise ConfigError(
            f"checkpoint: '{path}' lacks {len(missing)} of the model's {len(expected)} tensors, "
            f"such as '{missing[0]}'; {hint}"
        )
    # Edits raise the ranks of factors, which therefore look themselves at what they are given.
    factors = tuple(f'{n}.' for n, module in model.named_modules() if isinstance(module, Factors))
    shared = [key for key in expected if key in state and not key.startswith(factors)]
    wrong = [key for key in shared if state[key].shape != expected[key].shape]
    if wrong:
        key = wrong[0]
        raise ConfigError(
            f"checkpoint: '{key}' has the shape {tuple(state[key].shape)} in '{path}', but "
            f'{tuple(expected[key].shape)} in the model; give the config that it was trained with'
        )
    check_left_out(model, model.load_state_dict(state, strict=False).unexpected_keys)
    meta = checkpoint.get('meta') or {}
    note_other_settings(model, meta)
    return meta


def _has_router(names: Iterable[str]) -> bool:
    return any('.router.' in name or '.gate.' in name for name in names)
