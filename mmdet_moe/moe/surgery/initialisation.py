"""MMEngine's ``init_weights`` of a model some of whose layers have become experts.

An ``init_cfg`` names layers by their class (``'Conv2d'``) or by their name (``'retina_cls'``), and
classes have code of their own besides. All of that was written for the dense model. So the dense model
is what is initialised: for a moment an expert stands where the dense layer stood.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmengine.model import BaseModule
from torch import nn

from mmdet_moe.moe.experts import ModuleExperts
from mmdet_moe.moe.experts.upcycling import perturb
from mmdet_moe.moe.layer import MoELayer
from mmdet_moe.moe.surgery.siblings import Chain

_INFO = '_params_init_info'


@dataclass
class Site:
    """A place where experts stand.

    Attributes:
        layer: The MoE layer.
        parent: The module that holds it.
        name: Its name there.
        stand_ins: What stands where the siblings of a group stood, by name.
        twin: The dense module on the ``meta`` device, of experts that are stacked.
    """

    layer: MoELayer
    parent: nn.Module
    name: str
    stand_ins: dict[str, nn.Module]
    twin: nn.Module | None = None

    @contextmanager
    def dense(self, e: int) -> Iterator[None]:
        """Expert e stands where the dense module stood; what becomes of it is kept."""
        experts = self.layer.experts
        if isinstance(experts, ModuleExperts):
            module = experts[e]
        else:
            parameter = next(experts.parameters())
            module = copy.deepcopy(self.twin).to_empty(device=parameter.device).to(parameter.dtype)
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
        if self.twin is not None:
            experts.set_expert(e, module.get_submodule(experts.dense_scope.rstrip('.')))


class DenseInit:
    """Stands in for the ``init_weights`` of a model with experts.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: list[Site] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Initialise the model; experts get one draw together, or one each."""
        if getattr(self.model, 'is_init', False):
            self._initialise(*args, **kwargs)  # says that it has been done before
            return
        independent = [s for s in self.sites if s.layer.expert_init == 'independent']
        draws = max((s.layer.num_experts for s in independent if not self._is_loaded(s)), default=1)
        with _without_records(self.model):
            # The last time for the first experts, with which everything else goes.
            for e in reversed(range(draws)):
                with _entered([site.dense(min(e, site.layer.num_experts - 1)) for site in self.sites]):
                    with _pretrained_left_out(self.model, leave_out=e > 0):
                        self._initialise(*args, **kwargs)
                    if e > 0:
                        _forget(self.model)
        for site in self.sites:
            site.layer.is_init = True
            if site not in independent or self._is_loaded(site):
                site.layer.share_weights()
            if self._is_loaded(site) and site.layer.upcycle_noise > 0:
                perturb(site.layer.experts, site.layer.upcycle_noise, site.layer.name)

    def _initialise(self, *args: Any, **kwargs: Any) -> None:
        type(self.model).init_weights(self.model, *args, **kwargs)

    def _is_loaded(self, site: Site) -> bool:
        """Whether a file of weights covers the place: all experts are then copies."""
        inside = set(site.layer.modules())
        return any(
            module in inside or any(part is site.layer for part in module.modules())
            for module in self.model.modules()
            if any(cfg.get('type') == 'Pretrained' for cfg in _init_cfgs(module))
        )


def _init_cfgs(module: nn.Module) -> list[dict]:
    cfgs = getattr(module, 'init_cfg', None) if isinstance(module, BaseModule) else None
    return [cfgs] if isinstance(cfgs, dict) else list(cfgs or ())


@contextmanager
def _entered(contexts: list) -> Iterator[None]:
    if not contexts:
        yield
        return
    with contexts[0], _entered(contexts[1:]):
        yield


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
def _pretrained_left_out(model: nn.Module, leave_out: bool) -> Iterator[None]:
    """No file is read for a draw that is thrown away."""
    changed = {}
    for module in model.modules() if leave_out else ():
        cfgs = _init_cfgs(module)
        kept = [cfg for cfg in cfgs if cfg.get('type') != 'Pretrained']
        if len(kept) < len(cfgs):
            changed[module], module.init_cfg = module.init_cfg, kept
    try:
        yield
    finally:
        for module, cfgs in changed.items():
            module.init_cfg = cfgs


def _forget(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BaseModule):
            module.is_init = False
