"""Router and experts of a layer from what its constructor was given."""

import inspect
from collections.abc import Sequence

from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.experts import Experts, ModuleExperts, independent_copies
from mmdet_moe.moe.routers import Router
from mmdet_moe.registry import MODELS, build


def build_router(
    router: dict | Router | None, in_channels: int | None, num_experts: int, top_k: int
) -> Router:
    if isinstance(router, Router):
        if (router.num_experts, router.top_k) != (num_experts, top_k):
            raise ConfigError(
                f'The router routes to {router.top_k} of {router.num_experts} experts, the MoE '
                f'layer wants {top_k} of {num_experts}; give both the same numbers'
            )
        return router
    if router is not None and not isinstance(router, dict):
        raise ConfigError(
            f"router={router!r} must be a config, such as dict(type='mmdet_moe.GAPRouter')"
        )
    router = {'type': 'mmdet_moe.GAPRouter', **(router or {})}
    given = {'in_channels': in_channels, 'num_experts': num_experts, 'top_k': top_k}
    for field, value in given.items():
        if value is not None and router.setdefault(field, value) != value:
            raise ConfigError(
                f"router.{field}={router[field]} contradicts the layer's {field}={value}; "
                'remove it from the router'
            )
    built = build(router)
    if not isinstance(built, Router):
        raise ConfigError(f'router: {type(built).__name__} is not a Router of mmdet_moe')
    return built


def build_experts(
    expert: dict | nn.Module | Experts | Sequence[nn.Module], num_experts: int
) -> Experts:
    if isinstance(expert, dict):
        kind = expert.get('type')
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        if inspect.isclass(kind) and issubclass(kind, Experts):
            if expert.get('num_experts', num_experts) != num_experts:
                raise ConfigError(
                    f"expert.num_experts={expert['num_experts']} contradicts the layer's "
                    f'num_experts={num_experts}; remove it from the experts'
                )
            experts: Experts = build({**expert, 'num_experts': num_experts})
        else:
            experts = ModuleExperts([build(expert) for _ in range(num_experts)])
    elif isinstance(expert, Experts):
        experts = expert
    elif isinstance(expert, nn.Module) and not isinstance(expert, nn.ModuleList):
        experts = ModuleExperts(independent_copies(expert, num_experts))
    else:
        experts = ModuleExperts(expert)
    if experts.num_experts != num_experts:
        raise ConfigError(
            f'num_experts={num_experts}, but {experts.num_experts} experts were given'
        )
    return experts
