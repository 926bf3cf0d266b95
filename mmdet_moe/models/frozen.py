"""Parts of a model that do not train."""

from mmengine.registry import MODELS as MMENGINE_MODELS
from torch import nn

from mmdet_moe.registry import MODELS


@MODELS.register_module('Frozen')
def frozen(module: dict) -> nn.Module:
    """Build a module whose parameters and normalisation statistics never change.

    It is frozen from its construction, hence before a distributed wrapper collects the parameters
    that it waits for, and its parameters keep their names in checkpoints::

        neck=dict(_delete_=True, type='mmdet_moe.Frozen', module={{_base_.model.neck}})

    Args:
        module: Config of the module, of any registry.

    Returns:
        The module itself, with ``requires_grad=False``; its forward pass always runs in eval mode.
    """
    built = MMENGINE_MODELS.build(module)
    built.requires_grad_(False)
    built.register_forward_pre_hook(_stay_in_eval_mode)
    return built


def _stay_in_eval_mode(module: nn.Module, args: tuple) -> None:
    if module.training:
        module.eval()
