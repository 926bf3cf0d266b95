"""Whether a checkpoint is one of the model and of the classes that it is tested on."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmengine.runner import Runner
from torch import Tensor, int8, nn

from mmdet_moe.compat.distributed import note
from mmdet_moe.engine.hooks.layers import unwrapped_model
from mmdet_moe.engine.preflight import check_trained_classes
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.expert_layer import ExpertLayer, find_expert_layers

#: Entries of a layer of experts that inference does not ask: of a router's start, its noise, masks.
_IN_TRAINING_ALONE = re.compile(
    r'\.router\.(start|noise_fc|constraint\.(relative_importance|mean_importance|num_batches))\b'
)

#: What may be missing of one, because inference does not ask it, or because it begins at nothing.
_NOT_NEEDED = re.compile(r'\.router\.(start|noise_fc|constraint)\b')

#: Settings of a layer of experts that change what it computes, and that no weight tells.
_SETTINGS = ('top_k', 'granularity', 'grid_size')


class TestedCheckpointHook(Hook):
    """Compares a checkpoint with the model and the data, once all are there.

    That is before a test, and before a training goes on; one that begins from other weights may
    have classes, and lack weights, of its own. MMEngine tests a model whose weights are not in the
    checkpoint as they were drawn, with a warning among its first lines. What no weight tells of the
    layers of experts, such as k, goes into the checkpoint's ``meta``.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add it."""
        checkpoint['meta']['expert_layers'] = _settings_of(unwrapped_model(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare them.

        Raises:
            ConfigError: The numbers of the classes do not mean the same, weights are missing or
                packed, or a training would go on with another model.
        """
        tested = getattr(runner._test_loop, 'dataloader', None)
        model, state = unwrapped_model(runner), checkpoint.get('state_dict', checkpoint)
        state = {key.removeprefix('module.'): state[key] for key in state}
        check_unpacked(state)
        if tested is None and not runner._resume:
            if lost := lost_experts(model, state):
                note(
                    f'load_from: the checkpoint has experts in {", ".join(lost)}, where the model '
                    'has none: what they learned is left out'
                )
            return
        field = 'train_dataloader.dataset' if tested is None else 'test_dataloader.dataset'
        loader = runner.train_dataloader if tested is None else tested
        metainfo = getattr(loader.dataset, 'metainfo', None)
        meta = checkpoint.get('meta') or {}
        check_trained_classes(meta, metainfo, field)
        if isinstance(model, BaseTTAModel):
            model = model.module
        check_weights(model, state, resumed=tested is None)
        note_other_settings(model, meta)


def note_other_settings(model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Say where layers of experts are set to something else than in the training.

    Args:
        model: What the config builds.
        meta: What the checkpoint says of itself; those of other programs do not tell.
    """
    here, trained = _settings_of(model), meta.get('expert_layers') or {}
    others = [
        f'{key}={there[key]!r} in {name}, which has {here[name].get(key)!r} here'
        for name, there in trained.items()
        for key in there
        if name in here and there[key] != here[name].get(key)
    ]
    if others:
        more = f' ({len(others) - 1} more of this kind)' if others[1:] else ''
        note(
            f'the checkpoint was trained with {others[0]}{more}: all figures are those of a model '
            'that was not trained so'
        )


def _settings_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {key: getattr(layer, key) for key in _SETTINGS if key in vars(layer)}
        for name, layer in find_expert_layers(model).items()
    }


def check_unpacked(state: dict[str, Any]) -> None:
    """Refuse weights in 8 bits, which would be taken for numbers of -127 to 127.

    Raises:
        ConfigError: They are such, as :func:`mmdet_moe.analysis.look.pack` writes them.
    """
    if any(
        isinstance(weight, Tensor) and weight.dtype == int8 and f'{key}.scale' in state
        for key, weight in state.items()
    ):
        raise ConfigError(
            'checkpoint: its weights are packed in 8 bits, as those that ship with mmdet_moe; run '
            'tools/look.py once, and give the file of the same name in its output folder'
        )


def lost_experts(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """The layers of experts in a checkpoint that are none in the model."""
    there, wanted = (
        dict.fromkeys(key.partition('.experts.')[0] for key in keys if '.experts.' in key)
        for keys in (state, model.state_dict())
    )
    return [name for name in there if name not in wanted]


def check_weights(model: nn.Module, state: dict[str, Any], resumed: bool = False) -> list[str]:
    """Load the weights, all of them.

    The routers of layers that the checkpoint has dense may be missing, because they choose among
    equal experts; but not where a training is resumed, whose optimizer would have no state for
    them. So may the state of a constraint, which begins at one that changes no decision.

    Returns:
        The names of those that the model has no place for.

    Raises:
        ConfigError: A weight is missing, or has another shape; one of a layer of experts, or, if
            resumed, any one, is not the model's.
    """
    fix = 'give the config that the checkpoint was trained with'
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if '\n' in str(error) else str(error)
        raise ConfigError(f'checkpoint: {first}; {fix}') from error
    missing = [key for key in missing if not key.endswith('num_batches_tracked')]
    sparse = {key.partition(f'.{part}.')[0] for key in state for part in ('router', 'experts')}
    needed = [key for key in missing if not _NOT_NEEDED.search(key)]
    untrained = [
        key for key in needed if '.router.' in key and key.partition('.router.')[0] not in sparse
    ]
    if others := [key for key in needed if key not in untrained]:
        raise ConfigError(
            f"checkpoint: it lacks {len(others)} of the model's {len(model.state_dict())} tensors, "
            f"such as '{others[0]}'; {fix}"
        )
    if resumed and (missing or unexpected):
        what = f"it lacks '{missing[0]}'" if missing else f"the model has no '{unexpected[0]}'"
        raise ConfigError(
            f'--resume: the checkpoint is of another model, {what}; {fix}, or begin a new '
            'training from its weights with --cfg-options load_from=FILE'
        )
    check_left_out(model, unexpected)
    if untrained:
        note(
            'the checkpoint is of a dense model: each expert has its weights, routers are untrained'
        )
    return unexpected


def check_left_out(model: nn.Module, unexpected: Iterable[str]) -> None:
    """Refuse what a checkpoint has of a layer of experts, and the model has no place for.

    Args:
        model: Into which it is loaded.
        unexpected: The names of what is left out.

    Raises:
        ConfigError: One of them is of such a layer, and changes what it computes.
    """
    layers = tuple(f'{n}.' for n, m in model.named_modules() if isinstance(m, ExpertLayer) and n)
    for key in unexpected:
        if key.startswith(layers) and not _IN_TRAINING_ALONE.search(key):
            raise ConfigError(
                f"checkpoint: it has '{key}', for which the layer of experts has no place, so that "
                'it would compute something else; give the config that the checkpoint was trained '
                'with'
            )
