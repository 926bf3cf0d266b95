"""A trained model as the analysis needs it."""

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmdet_moe.analysis.study import load_weights
from mmdet_moe.compat.malloc import keep_large_blocks
from mmdet_moe.errors import ConfigError


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
    model = MODELS.build(cfg.model)
    meta = load_weights(model, checkpoint)
    try:
        model.to(device).eval()
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"--device: the model cannot be put on '{device}': {error}") from error
    return model, meta
