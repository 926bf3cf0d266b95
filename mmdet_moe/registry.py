"""Child registries of MMEngine's, under the scope ``mmdet_moe``.

MMEngine imports this module by itself when it meets ``type='mmdet_moe.X'``; the ``locations`` are
imported on the first look-up, so a config needs no ``custom_imports``, except for a project's
classes. Inside MoE modules :data:`MODELS` also finds everything of MMEngine; names of a toolbox
keep their prefix (``mmdet.ResNet``).
"""

from typing import Any

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import OPTIMIZERS as MMENGINE_OPTIMIZERS
from mmengine.registry import Registry

from mmdet_moe.compat import guard_checkpoints

guard_checkpoints()

SCOPE = 'mmdet_moe'

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope=SCOPE,
    locations=['mmdet_moe.moe', 'mmdet_moe.models'],
)


def build(config: dict) -> Any:
    """Build what a config of :data:`MODELS` describes; of our own core without any toolbox.

    A look-up in the registry imports all its locations, and with them the toolboxes.
    """
    options = dict(config)
    kind = options.pop('type', None)
    own = kind.removeprefix(f'{SCOPE}.') if isinstance(kind, str) else None
    if own in MODELS.module_dict:
        obj_cls = MODELS.module_dict[own]  # by the name by which a wrong field finds its class
        return obj_cls(**options)
    return MODELS.build(config)


HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope=SCOPE, locations=['mmdet_moe.engine'])
MODEL_WRAPPERS = Registry(
    'model_wrapper', parent=MMENGINE_WRAPPERS, scope=SCOPE, locations=['mmdet_moe.engine']
)
METRICS = Registry(
    'metric', parent=MMENGINE_METRICS, scope=SCOPE, locations=['mmdet_moe.engine.metrics']
)
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope=SCOPE,
    locations=['mmdet_moe.datasets', 'mmdet_moe.datasets.of_toolboxes'],
)
# The package itself registers nothing in these; projects do.
FUNCTIONS = Registry('function', parent=MMENGINE_FUNCTIONS, scope=SCOPE)
OPTIMIZERS = Registry('optimizer', parent=MMENGINE_OPTIMIZERS, scope=SCOPE)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor', parent=MMENGINE_CONSTRUCTORS, scope=SCOPE
)
