"""MMEngine's ``init_weights`` of a model some of whose layers have become experts.

An ``init_cfg`` names layers by their class (``'Conv2d'``) or by their name (``'retina_cls'``), and
classes have code of their own besides. All of that was written for the dense model. So the dense
model is what is initialised: for a moment an expert stands where the dense layer stood.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from mmengine.model import BaseModule, PretrainedInit, initialize
from torch import nn

from mmdet_moe.moe.expert_layer import ExpertLayer
from mmdet_moe.moe.expert_parallel import whole_experts
from mmdet_moe.moe.experts import ModuleExperts
from mmdet_moe.moe.surgery.siblings import Chain

_INFO = '_params_init_info'


@dataclass
class Site:
    """A place where experts stand.

    Attributes:
        layer: The layer of experts.
        parent: The module that holds it.
        name: Its name there.
        stand_ins: What stands where the siblings of a group stood, by name.
    """

    layer: ExpertLayer
    parent: nn.Module
    name: str
    stand_ins: dict[str, nn.Module]

    @contextmanager
    def dense(self, e: int) -> Iterator[None]:
        """Expert e stands where the dense module stood; what becomes of it is kept."""
        experts = self.layer.experts
        if isinstance(experts, ModuleExperts):
            module = experts[e]
        else:
            parameter = next(experts.parameters())
            assert self.layer.dense is not None
            dense = copy.deepcopy(self.layer.dense)
            module = dense.to_empty(device=parameter.device).to(parameter.dtype)
            scope = experts.dense_scope
            module.load_state_dict({scope + n: v[e] for n, v in experts.state_dict().items()})
        children = self.parent._modules
        before = dict(children)
        if isinstance(module, Chain):
            del children[self.name]
            children.update(module.named_children())
        else:
            children[self.name] = module
        try:
            yield
        finally:
            children.clear()
            children.update(before)
        if not isinstance(experts, ModuleExperts):
            experts.set_expert(e, module.get_submodule(experts.dense_scope.rstrip('.')))


class DenseInit:
    """Stands in for the ``init_weights`` of a model with experts.

    Args:
        model: The model.
    """

    def __init__(self, model: BaseModule) -> None:
        self.model = model
        self.sites: list[Site] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Initialise the model; experts get one draw together, or one each."""
        if getattr(self.model, 'is_init', False):
            BaseModule.init_weights(self.model)  # says that it has been done before
            return
        independent = [s.layer for s in self.sites if s.layer.expert_init == 'independent']
        draws = max((layer.num_experts for layer in independent), default=1)
        with (
            _without_records(self.model),
            _files_left_out(self.model) as loading,
            whole_experts(site.layer for site in self.sites),
        ):
            # The last time for the first experts, with which everything else goes.
            for e in reversed(range(draws)):
                with ExitStack() as stack:
                    for site in self.sites:
                        stack.enter_context(site.dense(min(e, site.layer.num_experts - 1)))
                    self._initialise(*args, **kwargs)
                    if e > 0:
                        _forget(self.model)
        for site in self.sites:
            site.layer.is_init = True
            site.layer.share_initial_weights()
            if any(site.layer in set(m.modules()) for m in self.model.modules() if _converts(m)):
                site.layer.share_weights()
        for module, cfgs in loading.items():
            initialize(module, cfgs)

    def _initialise(self, *args: Any, **kwargs: Any) -> None:
        type(self.model).init_weights(self.model, *args, **kwargs)


def _init_cfgs(module: nn.Module) -> list[dict]:
    cfgs = getattr(module, 'init_cfg', None) if isinstance(module, BaseModule) else None
    return [cfgs] if isinstance(cfgs, dict) else list(cfgs or ())


@contextmanager
def _without_records(model: nn.Module) -> Iterator[None]:
    """Parameters of stacked experts are no modules' own, as MMEngine's records want them to be.

    A model inside of another keeps records of its own for as long as it is initialised.
    """
    kept = {m: m.__dict__.pop(_INFO) for m in model.modules() if _INFO in m.__dict__}
    try:
        yield
    finally:
        for module, info in kept.items():
            module.__dict__[_INFO] = info


@contextmanager
def _files_left_out(model: nn.Module) -> Iterator[dict[nn.Module, list[dict]]]:
    """Leave out what is read from files, and tell what it is: parts before what holds them.

    A file may hold a dense model or one with experts, so it is loaded into the model with experts.
    """
    loading, before = {}, {}
    for module in reversed(list(model.modules())):
        cfgs = _init_cfgs(module)
        files = [cfg for cfg in cfgs if cfg.get('type') in ('Pretrained', PretrainedInit)]
        if isinstance(module, BaseModule) and files and not _converts(module):
            loading[module], before[module] = files, module.init_cfg
            module.init_cfg = [cfg for cfg in cfgs if cfg not in files] or None
    try:
        yield loading
    finally:
        for module, cfgs in before.items():
            module.init_cfg = cfgs


def _converts(module: nn.Module) -> bool:
    """Whether a class reads files of its own kind, which hold dense models alone (Swin, PVT)."""
    return bool(_init_cfgs(module)) and bool(getattr(module, 'convert_weights', False))


def _forget(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BaseModule):
            module.is_init = False
