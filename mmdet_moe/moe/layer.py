"""The MoE layer: a router that routes, experts that compute, glued by dispatch and combine."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, final

import torch
import torch.distributed as dist
from mmengine.logging import MessageHub
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from mmdet_moe.checks import check_number
from mmdet_moe.errors import ConfigError, NonFiniteRouterError, explained
from mmdet_moe.moe.build import build_experts, build_router
from mmdet_moe.moe.capacity import overflow
from mmdet_moe.moe.dispatcher import (
    Dispatcher,
    EveryExpert,
    Sorting,
    check_size,
    unpack,
    weighted,
)
from mmdet_moe.moe.expert_layer import ExpertLayer, Observer, find_expert_layers
from mmdet_moe.moe.expert_parallel import spread_over_ranks
from mmdet_moe.moe.experts import Experts, ModuleExperts, upcycle
from mmdet_moe.moe.granularity import GRANULARITIES
from mmdet_moe.moe.items import Items
from mmdet_moe.moe.pass_states import in_backward
from mmdet_moe.moe.routers import Router
from mmdet_moe.moe.routing import Routing
from mmdet_moe.ops.functional import is_exporting, is_one_graph, uncompiled
from mmdet_moe.registry import MODELS

EXPERT_INITS = ('independent', 'shared')
DECISION_WEIGHTS = ('uniform', 'area', 'positives')


@MODELS.register_module()
class MoELayer(ExpertLayer):
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
        whole_maps: Each expert that anybody chose computes the whole feature map, and the outputs
            are mixed patch by patch or pixel by pixel. For experts that see more than their item (a
            subnet of a head, group normalisation), which need to keep the size of the map. It costs
            what all E experts cost.
        decision_weight: What one decision counts in the balancing. ``'uniform'``: 1. ``'area'``:
            the pixels of its part of the feature map. ``'positives'``:
            the positive anchors in it, which only a detection head knows; the head tells them
            with :meth:`weigh_decisions`. Tokens are always ``'uniform'``; ``'area'`` needs maps.
        shortcut: Module added around the MoE: ``y = MoE(x) + shortcut(x)`` (residual variant).
        shared: Dense experts S that every item passes (arXiv 2401.06066). The layer returns the
            mean ``(MoE(x) + sum_j S_j(x)) / (1 + number of them)``, so that copies of one dense
            layer give what that layer gives.
        batch_dim: Which dimension of an input (A, B, C) with granularity ``'image'`` or ``'token'``
            holds the images: 0, or 1 for (T, N, C). Experts that are modules of their own take and
            give the images of ``'image'`` in that layout, too, as do ``shared`` and ``shortcut``.
        expert_init: ``'independent'``: every expert draws its own initial weights. ``'shared'``:
            all start as copies of the first one, so that the untrained layer is the dense one, and
            grow apart with the items that they get.
        upcycle_noise: Relative noise on the experts when a dense checkpoint is loaded into them.
        capacity_factor: In training an expert gets at most this multiple of its fair share
            ``T · k / E`` of the items of one forward pass; the routes with the least weight give 0
            beyond it. Default: no bound. At inference there is none, because what is predicted
            for an image must not depend on the other images of its batch. The bound is on what one
            device computes in one call: each rank drops by itself, and so does each call of a layer
            that is called level after level.
        expert_parallel: N ranks hold the experts together, each E / N of them, and send each other
            the items; see :mod:`mmdet_moe.moe.expert_parallel`. No effect in one process.

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
        shared: Sequence[nn.Module] = (),
        batch_dim: int = 0,
        whole_maps: bool = False,
        expert_parallel: int = 1,
    ) -> None:
        super().__init__()
        _check_options(capacity_factor, expert_init, decision_weight, upcycle_noise, batch_dim)
        if granularity not in GRANULARITIES:
            raise ConfigError(
                f'granularity={granularity!r} is unknown; use one of {tuple(GRANULARITIES)}'
            )
        self.capacity_factor = capacity_factor
        self.expert_init = expert_init
        self.granularity = granularity
        self.grid_size = grid_size
        self.decision_weight = decision_weight
        self.upcycle_noise = upcycle_noise
        self.batch_dim = batch_dim
        if whole_maps and granularity not in ('patch', 'pixel'):
            raise ConfigError(
                f'whole_maps=True has no effect with granularity={granularity!r}; set '
                "granularity='patch' or 'pixel'"
            )
        self.whole_maps = whole_maps
        if batch_dim and granularity in ('patch', 'pixel'):
            raise ConfigError(
                f'batch_dim={batch_dim} is for inputs (T, N, C), but granularity={granularity!r} '
                'divides feature maps (N, C, H, W); leave batch_dim out'
            )
        self.router = build_router(router, in_channels, num_experts, top_k)
        self.num_experts, self.top_k = self.router.num_experts, self.router.top_k
        self.experts = build_experts(expert, num_experts)
        self.shared = nn.ModuleList(shared) if shared else None
        self.shortcut = shortcut
        if whole_maps and self.experts.take_vectors:
            raise ConfigError(
                'whole_maps=True needs experts that take maps, which '
                f'{type(self.experts).__name__} do not; use convolutions, or leave whole_maps out'
            )
        if granularity == 'image' and isinstance(self.experts, ModuleExperts):
            self.experts.batch_dim = batch_dim
        self.share_initial_weights()
        GRANULARITIES[granularity].check(self)
        self.halo, self.stride = (
            self.experts.receptive_field(self.router.in_channels)
            if grid_size > 1 and not whole_maps
            else (0, 1)
        )
        if whole_maps and expert_parallel != 1:
            raise ConfigError(
                f'expert_parallel={expert_parallel} sends items to their experts, but with '
                'whole_maps=True every expert computes every map; leave one of the two out'
            )
        self.experts = spread_over_ranks(self.experts, expert_parallel)
        self._latest = _Calls()
        self._norms_checked = False
        # Of a forward pass on a GPU: flag, event and training iteration, see check_finite.
        self._unread: tuple[Tensor, torch.cuda.Event, int | None] | None = None
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
            self.share_weights()

    def share_weights(self) -> None:
        """Make the experts, and the dense ones beside them, copies of the first one."""
        self.experts.share_weights()
        scope = self.experts.dense_scope
        first = {scope + name: value for name, value in self.experts.entries().items()}
        for module in self.shared or ():
            module.load_state_dict(first)

    def observe(self, observer: Observer) -> RemovableHandle:
        """As :meth:`ExpertLayer.observe`; what the router decided."""

        def tell(_: nn.Module, inputs: tuple, routing: Routing) -> None:
            observer(routing, list(inputs[1]))

        return self.router.register_forward_hook(tell)

    @property
    def routing(self) -> Routing:
        """What the latest forward pass decided, in all its calls, one after the other.

        Raises:
            RuntimeError: Before the first forward pass.
        """
        latest = self._latest
        if not latest.routings:
            raise RuntimeError(f'MoE layer "{self.name}" has not been run yet')
        if latest.merged is None:
            latest.merged = Routing.cat(latest.routings)
        return latest.merged

    @property
    def has_run(self) -> bool:
        """Whether there is a :attr:`routing`."""
        return bool(self._latest.routings)

    def __dir__(self) -> list[str]:
        # torch.jit.trace reads whatever is listed.
        return [n for n in super().__dir__() if n != 'routing' or self.has_run]

    @property
    def items(self) -> tuple[Items, ...]:
        """How each level of the latest :attr:`routing` was divided."""
        return tuple(self._latest.items)

    def upcycle(self, state_dict: dict[str, Tensor], dense_prefix: str, moe_prefix: str) -> None:
        """Turn the dense module's entries of a checkpoint into the layer's own, in place.

        See :func:`~mmdet_moe.moe.upcycle`.
        """
        upcycle(
            state_dict,
            dense_prefix,
            moe_prefix,
            self.experts,
            self.upcycle_noise,
            num_shared=len(self.shared or ()),
            narrow=self.width != 1,
        )

    def begin(self, by: str | None = None) -> None:
        """A forward pass of the model begins, in which the layer may be called several times.

        All its calls make one :attr:`routing`, and one batch for the constraint. Without it each
        call is a pass by itself.

        Args:
            by: Who says so. A pass within one that somebody else has begun is a part of that.
        """
        latest = self._latest
        is_part = latest.is_open and latest.by != by and latest.training == self.training
        # An activation checkpoint computes again what has ended.
        if not is_part and not in_backward():
            self._latest = _Calls(is_open=True, by=by, training=self.training)
            self.router.begin()

    def forget(self) -> None:
        """Forget the latest forward pass, as if there had been none."""
        self._latest = _Calls()

    def end(self, by: str | None = None) -> None:
        """It ends: what all calls decided together is told to the constraint.

        Args:
            by: As it was begun.
        """
        if self._latest.is_open and self._latest.by == by and not in_backward():
            self._latest.is_open = False
            self.router.end()
            self._update_constraint()

    def forward(
        self, x: Tensor | Sequence[Tensor] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor | list[Tensor] | Any:
        """Compute the layer.

        Args:
            x: One map (N, C, H, W), or a sequence of maps with the same N and C. With token
                granularity one input (N, ..., C), or a sequence of inputs with the same N and C.
            *args: What the experts take besides: tensors of the same items as ``x``,
                which are divided and dispatched as it is, and what is no tensor, which belongs to
                no item and goes to every expert as it is.

        Returns:
            One output (N, C', H', W') or (N, ..., C'), or a list of them. Where the experts return
            a structure that holds one tensor, that structure with the output in its place.

        Raises:
            NonFiniteRouterError: If the router's logits are not finite. With ``fullgraph=True`` of
                ``torch.compile`` it is a RuntimeError that says the same; an exported layer does
                not look.
            ConfigError: If an input or an output belongs to no item, or to more than one; if the
                input is on another device than the weights; if one map comes to experts with
                ``impl='sheets'``; and in training within
                ``torch.export``, ``torch.onnx.export`` and ``torch.jit.trace``.
        """
        exports = torch.jit.is_tracing() or is_exporting()
        if exports and self.training:
            raise ConfigError(
                f'MoE layer "{self.name}" is exported or traced in training mode, in which it '
                'routes with noise and counts its decisions; call model.eval() first'
            )
        dense = exports or is_one_graph()
        if self.training and not self._norms_checked:
            self._check_norms()
        single = isinstance(x, Tensor)
        if x is None or (self.replaces and not single):
            given = f'a {type(x).__name__}, which is more than one item'
            if x is None:
                given = 'keywords alone, which do not say what its input is'
            raise ConfigError(
                f'MoE layer "{self.name}" ({self.replaces}) is called with {given}; choose a path '
                'inside of it'
            )
        if single and getattr(self.experts, 'impl', None) == 'sheets':
            raise ConfigError(
                f'MoE layer "{self.name}": impl=\'sheets\' is for layers that get the maps of all '
                "levels at once, as those of MoERetinaHead; here comes one, so use 'auto'"
            )
        maps = [x] if isinstance(x, Tensor) else list(x)
        if self.batch_dim:
            for m in maps:
                if m.dim() < 3 or (m.dim() > 3 and self.granularity == 'image'):
                    raise ConfigError(
                        f'MoE layer "{self.name}" with batch_dim={self.batch_dim} takes inputs '
                        f'(T, N, C), got {tuple(m.shape)}; set batch_dim=0'
                    )
            maps = [m.transpose(0, 1) for m in maps]
        kind = GRANULARITIES[self.granularity]
        items = [kind.divide(self, m) for m in maps]
        maps = [kind.prepare(m) for m in maps]
        if not torch.compiler.is_compiling():
            self._check_has_data(maps[0])
        try:
            routing = self.router(maps, items)
        except RuntimeError:
            self.check_device(maps[0])
            self._check_channels(maps, items)
            raise
        # How many items each expert gets is for the host to know, and differs from call to call.
        mix = self._mix_all if dense else uncompiled(self._mix_all)
        outputs = mix(routing, maps, items, args, kwargs, dense, exports)
        # What stands beside the experts takes the input as the layer was given it.
        outside = [m.transpose(0, 1) for m in maps] if self.batch_dim else maps
        outputs = [self._beside(m, y, args, kwargs) for m, y in zip(outside, outputs, strict=True)]
        return outputs[0] if single else outputs

    def _mix_all(
        self,
        routing: Routing,
        maps: list[Tensor],
        items: list[Items],
        args: tuple,
        kwargs: dict,
        dense: bool,
        exports: bool,
    ) -> list[Any]:
        """Check and remember the decision, then steps 3 to 5 for all maps."""
        is_finite = None
        if not exports:
            is_finite = self._check_finite(routing)
            self._remember(routing, maps, items)
        sorting = None
        if dense:
            dispatchers = self._dense_dispatchers(routing)
        else:
            dispatchers, sorting = self._dispatchers(routing, is_finite)
            shared: dict | None = {} if len(maps) > 1 or self.whole_maps else None
            for dispatcher in dispatchers:
                dispatcher.shared = shared
        joined: Sequence[Any] | None = None
        # What belongs to single items, or stands in for what computes them, goes level by level.
        if sorting and self._may_join_levels(maps) and not (args or kwargs):
            crops = [p.crop(m) for m, p in zip(maps, items, strict=True)]
            joined = self.experts.join_levels(sorting, dispatchers, crops)
        used: set[int] = set()
        outputs = [
            self._mix(m, p, dispatcher, used, args, kwargs, joined and joined[level])
            for level, (m, p, dispatcher) in enumerate(zip(maps, items, dispatchers, strict=True))
        ]
        if is_finite is not None and (sorting is None or sorting.watched):
            self._look_later(is_finite)
        if torch.is_grad_enabled() and not dense:
            outputs[0] = self._keep_in_graph(outputs[0], used)
        return outputs

    def _may_join_levels(self, maps: list[Tensor]) -> bool:
        return (
            len(maps) > 1
            and self.granularity in ('image', 'patch')
            and not self.whole_maps
            and 'run_experts' not in vars(self)  # the analysis replaces it for a while
            and self.experts.joins_levels(maps)
        )

    def _remember(self, routing: Routing, maps: list[Tensor], items: list[Items]) -> None:
        if self.training and self.capacity_factor is not None:
            routing.dropped = overflow(routing, self.capacity_factor)
        if self.decision_weight == 'area':
            routing.decision_weights = _areas(routing, maps, items)
        elif self.decision_weight == 'positives':
            routing.decision_weights = None
        if in_backward():  # an activation checkpoint computes again what has been counted
            return
        latest = self._latest
        if not latest.is_open:  # a call by itself is a forward pass by itself
            self._latest = latest = _Calls()
        latest.routings.append(routing)
        latest.items += items
        latest.merged = None
        if not latest.is_open:
            self._update_constraint()

    def weigh_decisions(self, decision_weights: Tensor) -> None:
        """Say what each decision of the latest forward counts in the balancing.

        Args:
            decision_weights: (T,), non-negative; only their ratios matter. Entries of 0 leave a
                decision out. In a pass that goes on, of less than T: those of the latest calls.

        Raises:
            RuntimeError: If the constraint has counted the decisions already.
            ValueError: If there are other numbers of decisions.
        """
        if self._latest.is_counted and self.router.constraint is not None:
            raise RuntimeError(
                f'The decisions of MoE layer "{self.name}" have been counted by its constraint '
                "already; construct it with decision_weight='positives' to weigh them later"
            )
        self._latest.weigh(decision_weights)
        if not self._latest.is_open:
            self._update_constraint()

    def _update_constraint(self) -> None:
        constraint = self.router.constraint
        if (
            self.training
            and constraint is not None
            and self._latest.routings
            and not self._latest.is_counted
            and self.routing.decision_weights is not None
        ):
            constraint.update(self.routing)
            self._latest.is_counted = True

    def run_experts(self, x_T: Tensor, dispatcher: Dispatcher, *args: Any, **kwargs: Any) -> Any:
        """Steps 3 to 5: evaluate the experts on their items, and sum up.

        May be replaced on an instance for a while, which is how the analysis lets every expert
        compute an input once.

        Args:
            x_T: Items, (T, ...).
            dispatcher: Which expert each goes to, and with what weight.
            *args: What the experts take besides, as items where it is a tensor.
            **kwargs: As well.
        """
        return self.experts(x_T, dispatcher, *args, **kwargs)

    def _run(self, x_T: Tensor, dispatcher: Dispatcher, *args: Any, **kwargs: Any) -> Any:
        """:meth:`run_experts`; what it fails of may be the device."""
        if torch.compiler.is_compiling():
            return self.run_experts(x_T, dispatcher, *args, **kwargs)
        try:
            return self.run_experts(x_T, dispatcher, *args, **kwargs)
        except RuntimeError:
            self.check_device(x_T)
            raise

    def _mix(
        self,
        x: Tensor,
        items: Items,
        dispatcher: Dispatcher,
        used: set[int],
        args: tuple,
        kwargs: dict,
        output: Any = None,
    ) -> Any:
        """Steps 3 to 5 for one map, unless their output is there."""
        if output is not None:
            y, rebuild = unpack(output)
            y = items.place(y)
        elif self.whole_maps:
            y, rebuild = self._mix_maps(x, items, dispatcher, args, kwargs)
        else:
            others = (args, kwargs)
            if args or kwargs:
                others = tree_map(lambda other: self._as_items(other, x, items), others)
            with self._tokens_explained():
                output = self._run(items.crop(x), dispatcher, *others[0], **others[1])
            y, rebuild = unpack(output)
            y = items.place(y)
        if self.batch_dim:
            y = y.transpose(0, 1)
        if torch.is_grad_enabled() and self.experts.separate_parameters and not dispatcher.is_whole:
            used |= self.experts.entered(dispatcher)
        return rebuild(y)

    def _beside(self, x: Tensor, output: Any, args: tuple, kwargs: dict) -> Any:
        """The layer's output for one map, of which ``output`` is what the experts made."""
        y, rebuild = unpack(output)
        for expert in self.shared or ():
            y = y + unpack(expert(x, *args, **kwargs))[0]
        if self.shared:
            y = y / (1 + len(self.shared))
        return rebuild(y if self.shortcut is None else y + self.shortcut(x))

    def _mix_maps(
        self, x: Tensor, items: Items, dispatcher: Dispatcher, args: tuple, kwargs: dict
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """What the experts make of a whole map, mixed item by item; as :func:`unpack` gives it."""
        if isinstance(dispatcher, EveryExpert):
            dispatcher.factors = items.spread(dispatcher.factors)[:, :, None]
            y, rebuild = unpack(self._run(x, dispatcher, *args, **kwargs))
            return self._laid_out(y, items), rebuild
        factors_TE = dispatcher.weights.new_zeros(len(dispatcher.weights), self.num_experts)
        factors_TE = factors_TE.scatter_add(1, dispatcher.expert_ids, dispatcher.weights)
        factors = items.spread(factors_TE)
        total: Tensor | None = None
        # If nobody has a say, because the chosen ones are zeroed: 0 times what any of them gives.
        for expert in sorted(self.experts.entered(dispatcher)) or [0]:
            ids = torch.full((len(x), 1), expert, device=x.device)
            ones = factors.new_ones(ids.shape)
            whole = Dispatcher.to_one(ids, ones, expert, self.num_experts)
            whole.shared = dispatcher.shared
            # A copy, because an expert may change in place what the next one is given.
            y, rebuild = unpack(self._run(x.clone(), whole, *args, **kwargs))
            check_size(y, x.shape[2:], f'MoE layer "{self.name}": ')
            part = weighted(y, factors[:, expert, None])
            total = part if total is None else total + part
        assert total is not None
        return self._laid_out(total.to(y.dtype), items), rebuild

    @staticmethod
    def _laid_out(y: Tensor, items: Items) -> Tensor:
        # Pixels are prepared in another memory format than that of their map.
        return y.to(memory_format=getattr(items, 'memory_format', torch.preserve_format))

    def _as_items(self, other: Any, x: Tensor, items: Items) -> Any:
        if not isinstance(other, Tensor):
            return other
        if self.batch_dim and other.dim() > 1:
            other = other.transpose(0, 1)
        same = other.shape == x.shape
        if self.granularity == 'token':
            same = other.shape[:-1] == x.shape[:-1]
        if not same:
            raise ConfigError(
                f'MoE layer "{self.name}"{f" ({self.replaces})" if self.replaces else ""} is '
                f'called with another tensor of shape {tuple(other.shape)} beside its input of '
                f'shape {tuple(x.shape)}, and which part of it belongs to which item cannot be '
                'told; choose a path inside of it'
            )
        return items.crop(other)

    def _keep_in_graph(self, output: Any, used: set[int]) -> Any:
        """Let unused experts take part in the graph with gradient 0.

        Distributed data parallel waits for a gradient of every parameter; and a weight's gradient
        should be 0, not missing, whether or not another rank used its expert.
        """
        if not self.experts.separate_parameters and self.num_experts > 1:
            return output
        y, rebuild = unpack(output)
        if self.num_experts == 1:
            # There is no choice, and so nothing that the router could learn from the task. A copy,
            # because the expert may need its output as it was for its own gradient.
            unused, y = list(self.router.parameters()), y.clone()
        else:
            experts = (e for e in range(self.num_experts) if e not in used)
            unused = [p for e in experts for p in self.experts.parameters_of(e)]
        unused = [p for p in unused if p.requires_grad]
        return rebuild(_ZeroGradient.apply(y, *unused)) if unused else output

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
            # Remembering it would change what a compiled graph was made for.
            self._norms_checked = not torch.compiler.is_compiling()

    def _check_has_data(self, x: Tensor) -> None:
        """Refuse an input, or experts, of which one is on the ``meta`` device.

        A convolution in PyTorch does not: with weights that hold no numbers it gives whatever lies
        in memory. All other devices it does tell apart, which needs no look before.
        """
        weight = next(self.experts.parameters(), None)
        if weight is None or weight.is_meta == x.is_meta:
            return
        # Hooks, as those that keep weights elsewhere between their uses, may bring them.
        if not any(m._forward_pre_hooks or 'forward' in vars(m) for m in self.experts.modules()):
            self.check_device(x)

    def _check_channels(self, maps: list[Tensor], items: list[Items]) -> None:
        expected = self.router.in_channels
        for x, of_map in zip(maps, items, strict=True):
            if (found := of_map.pool(x).shape[1]) != expected:
                raise ConfigError(
                    f'MoE layer "{self.name}" is given inputs {tuple(x.shape)} of {found} '
                    f'channels, but its router expects {expected}; set in_channels={found}'
                )

    def _tokens_explained(self) -> AbstractContextManager:
        if self.granularity != 'token' or torch.compiler.is_compiling():
            return nullcontext()
        return explained(
            f'The experts of MoE layer "{self.name}"'
            f'{f" ({self.replaces})" if self.replaces else ""}'
            " cannot compute single tokens, as granularity='token' has them do; choose a layer "
            "inside that looks at one token at a time, such as an FFN, or granularity='image'"
        )

    def _dense_dispatchers(self, routing: Routing) -> list[Dispatcher]:
        """One for each map, in which no expert depends on what the router decided."""
        if self.training and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
            for m in self.experts.modules()
        ):
            raise ConfigError(
                f'The experts of MoE layer "{self.name}" hold BN in training mode, whose '
                'statistics would be those of all items in one graph; use BN with norm_eval=True, '
                'or GN, or torch.compile without fullgraph=True'
            )
        factors, sizes = routing.factors, list(routing.items_per_level)
        if routing.dropped is not None:
            factors = factors.masked_fill(routing.dropped, 0)
        parts = [(routing.expert_ids, factors)]
        if len(sizes) > 1:
            parts = list(zip(routing.expert_ids.split(sizes), factors.split(sizes), strict=True))
        return [EveryExpert(*part, self.num_experts) for part in parts]

    def _dispatchers(
        self, routing: Routing, is_finite: Tensor | None
    ) -> tuple[list[Dispatcher], Sorting | None]:
        """One for each map; all of them are sorted together, unless nothing has to be."""
        levels = range(len(routing.items_per_level))
        if self.num_experts == 1 and routing.is_plain:
            return [Dispatcher.to_one(*routing.level(level)) for level in levels], None
        factors, sizes = routing.kept_factors, routing.items_per_level
        sorting = Sorting(
            routing.expert_ids,
            factors,
            self.num_experts,
            sizes,
            routing.level_ids if len(sizes) > 1 else None,
        )
        if is_finite is not None:
            tell = partial(self._refuse_unless, self._training_iteration())
            sorting.watched = (is_finite, tell)
        firsts = accumulate(sizes[:-1], initial=0)
        return [
            Dispatcher(*routing.level(level), self.num_experts, sorting, level, first)
            for level, first in zip(levels, firsts, strict=True)
        ], sorting

    def _check_finite(self, routing: Routing) -> Tensor | None:
        """Raise if the decision is not finite; on a GPU, a flag that says it there.

        Reading the flag would wait for the GPU, so it is read together with the bounds of the
        experts' rows where these are needed, and else when the layer is called again.
        """
        if routing.logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # in a CUDA graph nobody is there to look
        self.check_finite()
        # The weights as well: the noise has parameters of its own. A sum is finite if all is.
        is_finite = (routing.logits.detach().sum() + routing.weights.detach().sum()).isfinite()
        if torch.compiler.is_compiling():
            # The host does not look. Inductor writes the message as it is, quoted, into C++.
            message = self._not_finite(None)
            message = ''.join(c if c.isalnum() or c in ' .:;_-' else '`' for c in message)
            torch._assert_async(is_finite, message)
            return None
        if is_finite.device.type != 'cpu':
            return is_finite
        self._refuse_unless(self._training_iteration(), bool(is_finite))
        return None

    def _training_iteration(self) -> int | None:
        return _current_iteration() if self.training else None

    def _look_later(self, is_finite: Tensor) -> None:
        if is_finite.device.type != 'cuda':
            return
        on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
        on_host.copy_(is_finite, non_blocking=True)
        copied = torch.cuda.Event()
        # Not that of the current device, which need not be the layer's.
        copied.record(torch.cuda.current_stream(is_finite.device))
        self._unread = (on_host, copied, self._training_iteration())

    def check_finite(self) -> None:
        """Raise what the latest forward pass on a GPU left to be looked at, if anything.

        Raises:
            NonFiniteRouterError: If the router's decision was not finite.
        """
        if self._unread is not None:
            on_host, copied, iteration = self._unread
            self._unread = None
            copied.synchronize()
            self._refuse_unless(iteration, bool(on_host))

    def _refuse_unless(self, iteration: int | None, is_finite: bool) -> None:
        if not is_finite:
            raise NonFiniteRouterError(self._not_finite(iteration))

    def _not_finite(self, iteration: int | None) -> str:
        message = f'The router of MoE layer "{self.name}" produced values that are not finite'
        if iteration is not None:
            message += f' at training iteration {iteration}'
        return (
            f'{message}; the input or a weight has become NaN or infinite: lower the learning rate '
            'or clip the gradients'
        )

    def __iter__(self) -> Iterator:
        raise ConfigError(
            f'The model iterates over "{self.name}", which has become experts; choose a path '
            'inside of it'
        )

    def __getstate__(self) -> dict[str, Any]:
        # deepcopy (EMA) and pickle see neither the latest Routing nor the graph behind it.
        return {**self.__dict__, '_latest': _Calls(), '_unread': None}

    def extra_repr(self) -> str:
        return f'granularity={self.granularity!r}, grid_size={self.grid_size}'


@final
@dataclass
class _Calls:
    """The calls of one forward pass of the model.

    Attributes:
        is_open: Whether it goes on.
        by: Who has begun it.
        training: Whether in training mode.
        is_counted: Whether the constraint knows of them.
        merged: Their common Routing, once it has been asked for.
    """

    is_open: bool = False
    by: str | None = None
    training: bool = False
    is_counted: bool = False
    routings: list[Routing] = field(default_factory=list)
    items: list[Items] = field(default_factory=list)
    merged: Routing | None = None

    def weigh(self, decision_weights: Tensor) -> None:
        """Set the ``decision_weights`` of the latest calls, as many as these are of."""
        sizes = [call.num_items for call in self.routings]
        while sum(sizes) > len(decision_weights):
            sizes.pop(0)
        if sum(sizes) != len(decision_weights):
            raise ValueError(
                f'decision_weights are of {len(decision_weights)} decisions, but the latest calls '
                f'of the MoE layer have decided on {sizes} items'
            )
        calls = self.routings[len(self.routings) - len(sizes) :]
        for call, weights in zip(calls, decision_weights.split(sizes), strict=True):
            call.decision_weights = weights.to(call.weights)
        self.merged = None


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
    """All sparse layers of a model by name; each also learns its name, for its messages."""
    return {n: m for n, m in find_expert_layers(model).items() if isinstance(m, MoELayer)}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Active and total parameters; of E equal experts k are active."""
    total = sum(p.numel() for p in model.parameters())
    inactive = 0
    for layer in find_moe_layers(model).values():
        # Spread experts hold more than weights: where they are.
        weights = getattr(layer.experts, 'local', layer.experts)
        experts = sum(p.numel() for p in weights.parameters()) * layer.experts.parts
        total += experts - sum(p.numel() for p in layer.experts.parameters())
        inactive += experts * (layer.num_experts - layer.top_k) // layer.num_experts
    return total - inactive, total


def _check_options(
    capacity_factor: Any, expert_init: Any, decision_weight: Any, upcycle_noise: Any, batch_dim: Any
) -> None:
    if capacity_factor is not None:
        check_number('MoELayer', 'capacity_factor', capacity_factor, above=0)
    if expert_init not in EXPERT_INITS:
        raise ConfigError(f'expert_init={expert_init!r} is unknown; use one of {EXPERT_INITS}')
    if decision_weight not in DECISION_WEIGHTS:
        raise ConfigError(
            f'decision_weight={decision_weight!r} is unknown; use one of {DECISION_WEIGHTS}'
        )
    check_number('MoELayer', 'upcycle_noise', upcycle_noise, least=0)
    if batch_dim not in (0, 1):
        raise ConfigError(f'batch_dim={batch_dim!r} must be 0 or 1')


def _areas(routing: Routing, maps: list[Tensor], items: list[Items]) -> Tensor:
    areas = []
    for m, of_map in zip(maps, items, strict=True):
        pixels = routing.weights.new_ones(1, math.prod(m.shape[2:]))
        areas.append(of_map.total(pixels).repeat(m.shape[0]))
    return torch.cat(areas).to(routing.weights)


def _current_iteration() -> int | None:
    # Set by MMEngine's Runner; None in any other program.
    iteration = MessageHub.get_current_instance().get_info('iter')
    return None if iteration is None else iteration + 1


def _upcycle_same_place(layer: MoELayer, state_dict: dict, prefix: str, *_: Any) -> None:
    # A layer that stands where the dense module stood (backbone.layer4) finds its names there.
    if not layer.siblings:
        layer.upcycle(state_dict, prefix, prefix)
