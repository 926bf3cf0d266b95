"""Child registries of MMEngine's, under the scope ``mmdet_moe``.

MMEngine imports this module by itself when it meets ``type='mmdet_moe.X'``; the ``locations`` are
imported on the first look-up, so a config needs no ``custom_imports``. Inside MoE modules
:data:`MODELS` also finds everything of MMEngine; names of a toolbox keep their prefix
(``mmdet.ResNet``).
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

SCOPE = 'mmdet_moe'

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope=SCOPE,
    locations=['mmdet_moe.moe', 'mmdet_moe.models'],
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope=SCOPE, locations=['mmdet_moe.engine'])
