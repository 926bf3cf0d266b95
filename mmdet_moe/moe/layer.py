"""The MoE layer: a router that routes, experts that compute, glued by dispatch and combine."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError, NonFiniteRouterError
from mmdet_moe.moe.capacity import overflow
from mmdet_moe.moe.dispatcher import Dispatcher
from mmdet_moe.moe.experts import (
    Experts,
    ModuleExperts,
    StackedExperts,
    independent_copies,
    upcycle,
)
from mmdet_moe.moe.items import Items, Pixels, Tokens
from mmdet_moe.moe.patches import PatchGrid
from mmdet_moe.moe.routers import Router
from mmdet_moe.moe.routing import Routing
from mmdet_moe.registry import MODELS

EXPERT_INITS = ('independent', 'shared')
GRANULARITIES = ('image', 'patch', 'pixel', 'token')
DECISION_WEIGHTS = ('uniform', 'area', 'positives')


@MODELS.register_module()
class MoELayer(BaseModule):
    """``y = sum_i w_i(x) E_i(x)`` over the k experts that the router chose for each item.

    The journey of a batch:

    1. Every feature map (one, or all pyramid levels) is divided into items: its images, or the
       patches or pixels of its images.
    2. The router decides once for all items of all maps: one :class:`Routing`.
    3. Per map, the items are copied to the experts that they were sent to, sorted by expert
       (dispatch). An expert without items is not evaluated.
    4. Each expert computes its sub-batch.
    5. The rows go back to the order of the items and are summed with their weights (combine).

    Args:
        expert: A config (built ``num_experts`` times), a module (copied, with fresh weights), a
            sequence of modules that are used as they are, or a kind of
            :class:`~mmdet_moe.moe.Experts` (a config or an instance), which evaluates all of them
            together.
        num_experts: E.
        top_k: k.
        router: Config of a :class:`~mmdet_moe.moe.Router`, without the numbers given here, or an
            instance.
        in_channels: Channels of the input; needed when ``router`` is a config without it.
        granularity: What one decision covers: ``'image'`` (one image of one feature map),
            ``'patch'`` (one cell of a ``grid_size`` × ``grid_size`` grid over it) or ``'pixel'``
            (experts that see one pixel at a time: 1×1 convolutions, as maps of that size, or
            :class:`~mmdet_moe.moe.LinearExperts`). ``'token'``: every vector along the last
            dimension of an input (N, ..., C), which is no feature map.
        grid_size: g for patch granularity. Small maps get fewer patches.
        decision_weight: What one decision counts in the balancing. ``'uniform'``: 1. ``'area'``:
            the pixels of its part of the feature map. ``'positives'``:
            the positive anchors in it, which only a detection head knows; the head tells them
            with :meth:`weigh_decisions`. Tokens are always ``'uniform'``.
        shortcut: Module added around the MoE: ``y = MoE(x) + shortcut(x)`` (residual variant).
        expert_init: ``'independent'``: every expert draws its own initial weights. ``'shared'``:
            all start as copies of the first one, so that the untrained layer is the dense one, and
            grow apart with the items that they get.
        upcycle_noise: Relative noise on the experts when a dense checkpoint is loaded into them.
        capacity_factor: In training an expert gets at most this multiple of its fair share
            ``T · k / E`` of the items of one forward pass; the routes with the least weight give 0
            beyond it. Default: no bound. At inference there is none, because what is predicted
            for an image must not depend on the other images of its batch. The bound is on what one
            device computes: each rank drops by itself.

    Raises:
        ConfigError: For options out of range.
    """

    def __init__(
        self,
        expert: dict | nn.Module | Experts | Sequence[nn.Module],
        num_experts: int,
        top_k: int,
        router: dict | Router | None = None,
        in_channels: int | None = None,
        granularity: str = 'image',
        grid_size: int = 1,
        decision_weight: str = 'uniform',
        shortcut: nn.Module | None = None,
        expert_init: str = 'independent',
        upcycle_noise: float = 0.0,
        capacity_factor: float | None = None,
    ) -> None:
        super().__init__()
        if capacity_factor is not None and not (
            isinstance(capacity_factor, (int, float)) and 0 < capacity_factor < float('inf')
        ):
            raise ConfigError(
                f'capacity_factor={capacity_factor!r} must be a number above 0 (1.25 is usual), or '
                'None for no bound'
            )
        self.capacity_factor = capacity_factor
        if expert_init not in EXPERT_INITS:
            raise ConfigError(f'expert_init={expert_init!r} is unknown; use one of {EXPERT_INITS}')
        self.expert_init = expert_init
        self.router = _build_router(router, in_channels, num_experts, top_k)
        self.experts = _build_experts(expert, num_experts)
        self.share_initial_weights()
        self.shortcut = shortcut
        if decision_weight not in DECISION_WEIGHTS:
            raise ConfigError(
                f'decision_weight={decision_weight!r} is unknown; use one of {DECISION_WEIGHTS}'
            )
        if not isinstance(upcycle_noise, (int, float)) or upcycle_noise < 0:
            raise ConfigError(f'upcycle_noise={upcycle_noise!r} must be a number of at least 0')
        self.granularity = granularity
        self.grid_size = grid_size
        self.decision_weight = decision_weight
        self._check_granularity()
        self.halo, self.stride = (
            self.experts.receptive_field(self.router.in_channels) if grid_size > 1 else (0, 1)
        )
        self.upcycle_noise = upcycle_noise
        self.name = type(self).__name__
        self._routing: Routing | None = None
        self._counted: Routing | None = None
        self._norms_checked = False
        self.register_load_state_dict_pre_hook(_upcycle_same_place)

    def init_weights(self) -> None:
        """Initialise as MMEngine's modules do, then share the weights if asked to."""
        first_call = not self.is_init  # MMEngine's modules ignore all later ones
        super().init_weights()
        if first_call:
            self.share_initial_weights()

    def share_initial_weights(self) -> None:
        """Make the experts copies of the first one, if ``expert_init`` says so."""
        if self.expert_init == 'shared':
            self.experts.share_weights()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router.num_experts

    @property
    def top_k(self) -> int:
        """k."""
        return self.router.top_k

    @property
    def routing(self) -> Routing:
        """The Routing of the latest forward pass.

        Raises:
            RuntimeError: Before the first forward pass.
        """
        if self._routing is None:
            raise RuntimeError(f'MoE layer "{self.name}" has not been run yet')
        return self._routing

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Compute the layer.

        Args:
            x: One map (N, C, H, W), or a sequence of maps with the same N and C. With token
                granularity one input (N, ..., C), or a sequence of inputs with the same N and C.

        Returns:
            One output (N, C', H', W') or (N, ..., C'), or a list of them.

        Raises:
            NonFiniteRouterError: If the router's logits are not finite.
        """
        if self.training and not self._norms_checked:
            self._check_norms()
        single = isinstance(x, Tensor)
        maps = [x] if single else list(x)
        items = [self._divide(m) for m in maps]
        if self.granularity == 'pixel':
            # Copied here once: the pixels are then rows, for the router as for the experts.
            maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
        self._routing = None
        routing = self.router(maps, items)
        self._check_finite(routing)
        if self.training and self.capacity_factor is not None:
            routing.dropped = overflow(routing, self.capacity_factor)
        self._routing = routing
        if self.decision_weight == 'area':
            self.weigh_decisions(_areas(routing, maps, items))
        elif self.decision_weight == 'positives':
            routing.decision_weights = None
        else:
            self._update_constraint()
        outputs = [
            self._mix(m, p, *routing.level(i))
            for i, (m, p) in enumerate(zip(maps, items, strict=True))
        ]
        if torch.is_grad_enabled():
            outputs[0] = self._keep_in_graph(outputs[0], routing)
        return outputs[0] if single else outputs

    def _divide(self, x: Tensor) -> Items:
        """Step 1 for one map."""
        if self.granularity == 'token':
            return Tokens.of(x)
        if x.dim() != 4:
            raise ValueError(
                f'MoE layer "{self.name}" with granularity={self.granularity!r} takes inputs '
                f'(N, C, H, W), got {tuple(x.shape)}'
            )
        if self.granularity == 'pixel':
            return Pixels.of(x)
        return PatchGrid(tuple(x.shape[-2:]), self.grid_size, self.stride, self.halo)

    def weigh_decisions(self, decision_weights: Tensor) -> None:
        """Say what each decision of the latest forward counts in the balancing.

        Args:
            decision_weights: (T,), non-negative; only their ratios matter. Entries of 0 leave a
                decision out.
        """
        routing = self.routing
        if self._counted is routing and self.router.constraint is not None:
            raise RuntimeError(
                f'The decisions of MoE layer "{self.name}" have been counted by its constraint '
                "already; construct it with decision_weight='positives' to weigh them later"
            )
        routing.decision_weights = decision_weights.to(routing.weights)
        self._update_constraint()

    def _update_constraint(self) -> None:
        constraint = self.router.constraint
        if self.training and constraint is not None:
            constraint.update(self.routing)
            self._counted = self.routing

    def _mix(self, x: Tensor, items: Items, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Steps 3 to 5 for one map."""
        dispatcher = Dispatcher(expert_ids, weights, self.num_experts)
        y = items.place(self.experts(items.crop(x), dispatcher))
        return y if self.shortcut is None else y + self.shortcut(x)

    def _keep_in_graph(self, output: Tensor, routing: Routing) -> Tensor:
        """Let unused experts take part in the graph with gradient 0.

        Distributed data parallel waits for a gradient of every parameter; and a weight's gradient
        should be 0, not missing, whether or not another rank used its expert.
        """
        unused = (routing.load() == 0).nonzero().flatten().tolist()
        parameters = [p for e in unused for p in self.experts.parameters_of(e) if p.requires_grad]
        return _ZeroGradient.apply(output, *parameters) if parameters else output

    def _check_granularity(self) -> None:
        granularity, grid_size = self.granularity, self.grid_size
        if granularity not in GRANULARITIES:
            raise ConfigError(f'granularity={granularity!r} is unknown; use one of {GRANULARITIES}')
        if granularity == 'patch' and grid_size < 2:
            raise ConfigError(f"granularity='patch' needs grid_size of at least 2, got {grid_size}")
        if granularity != 'patch' and grid_size != 1:
            raise ConfigError(
                f'grid_size={grid_size} has no effect with granularity={granularity!r}; '
                "set granularity='patch'"
            )
        if granularity == 'pixel' and not self.experts.take_vectors:
            radius, stride = self.experts.receptive_field(self.router.in_channels)
            if radius > 0 or stride > 1:
                raise ConfigError(
                    "granularity='pixel' needs experts that see one pixel at a time, but these "
                    f'have a receptive field of radius {radius} and stride {stride}; use 1×1 '
                    "convolutions, or granularity='patch'"
                )
        stacked = isinstance(self.experts, StackedExperts)
        if granularity == 'token' and stacked and not self.experts.take_vectors:
            raise ConfigError(
                f'expert.type={type(self.experts).__name__} computes feature maps, which '
                "granularity='token' has not; use LinearExperts or MLPExperts"
            )
        if granularity == 'token' and self.router.needs_maps:
            raise ConfigError(
                f'router.type={type(self.router).__name__} routes feature maps, which '
                "granularity='token' has not; use mmdet_moe.GAPRouter"
            )
        if granularity == 'token' and self.decision_weight != 'uniform':
            raise ConfigError(
                f'decision_weight={self.decision_weight!r} is about feature maps, which '
                "granularity='token' has not; use decision_weight='uniform'"
            )

    def _check_norms(self) -> None:
        """Refuse collective normalisation in experts, once it is known how the model is run."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for module in self.experts.modules():
                if 'SyncBatchNorm' in type(module).__name__:
                    raise ConfigError(
                        f'The experts of MoE layer "{self.name}" hold SyncBN, which would wait for '
                        'ranks whose images went to other experts; use BN with norm_eval=True, or '
                        'GN, and no sync_bn'
                    )
        self._norms_checked = True

    def _check_finite(self, routing: Routing) -> None:
        # The weights as well: the noise has parameters of its own.
        if torch.isfinite(routing.logits).all() & torch.isfinite(routing.weights).all():
            return
        message = f'The router of MoE layer "{self.name}" produced values that are not finite'
        if self.training and (iteration := _current_iteration()) is not None:
            message += f' at training iteration {iteration}'
        raise NonFiniteRouterError(
            f'{message}; the input or a weight has become NaN or infinite: lower the learning rate '
            'or clip the gradients'
        )

    def __getstate__(self) -> dict[str, Any]:
        # deepcopy (EMA) and pickle see neither the latest Routing nor the graph behind it.
        return {**self.__dict__, '_routing': None, '_counted': None}

    def extra_repr(self) -> str:
        return f'granularity={self.granularity!r}, grid_size={self.grid_size}'


class _ZeroGradient(torch.autograd.Function):
    """Identity on the first argument that gives the others a gradient of zeros."""

    @staticmethod
    def forward(ctx, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        # "Changed in place": a view instead would forbid a later nn.ReLU(inplace=True).
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(p) for p in ctx.parameters)


def find_moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """All MoE layers of a model by name; each layer also learns its name, for its messages."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MoELayer)}
    for name, layer in layers.items():
        layer.name = name or type(layer).__name__
    return layers


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Active and total parameters; of E equal experts k are active."""
    total = sum(p.numel() for p in model.parameters())
    inactive = 0
    for layer in find_moe_layers(model).values():
        experts = sum(p.numel() for p in layer.experts.parameters())
        inactive += experts * (layer.num_experts - layer.top_k) // layer.num_experts
    return total - inactive, total


def _build_router(
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
    built = MODELS.build(router)
    if not isinstance(built, Router):
        raise ConfigError(f'router: {type(built).__name__} is not a Router of mmdet_moe')
    return built


def _build_experts(
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
            expert = MODELS.build({**expert, 'num_experts': num_experts})
        else:
            expert = [MODELS.build(expert) for _ in range(num_experts)]
    elif isinstance(expert, nn.Module) and not isinstance(expert, (nn.ModuleList, Experts)):
        expert = independent_copies(expert, num_experts)
    experts = expert if isinstance(expert, Experts) else ModuleExperts(expert)
    if experts.num_experts != num_experts:
        raise ConfigError(
            f'num_experts={num_experts}, but {experts.num_experts} experts were given'
        )
    return experts


def _areas(routing: Routing, maps: list[Tensor], items: list[Items]) -> Tensor:
    per_level = [m.shape[-2] * m.shape[-1] / len(p) for m, p in zip(maps, items, strict=True)]
    return routing.weights.new_tensor(per_level)[routing.level_ids]


def _current_iteration() -> int | None:
    # Set by MMEngine's Runner; None in any other program.
    iteration = MessageHub.get_current_instance().get_info('iter')
    return None if iteration is None else iteration + 1


def _upcycle_same_place(layer, state_dict, prefix, *_) -> None:
    # A layer that stands where the dense module stood (backbone.layer4) finds its names there.
    upcycle(state_dict, prefix, prefix, layer.experts, layer.upcycle_noise)
