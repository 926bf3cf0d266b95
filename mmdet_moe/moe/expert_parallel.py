"""Experts spread over ranks: N of them together hold the experts of one layer, each E / N.

Ranks ``gN … gN + N − 1`` are expert group g, in which rank i holds the experts ``iE/N`` to
``(i+1)E/N − 1``; ranks with the same i in their groups are replicas of each other. Rows travel to
their experts and back by ``torch.distributed``'s all-to-all within the group. Everything else is
data parallelism: each rank has its own images, and a copy of all other weights.

Letters besides those of :mod:`mmdet_moe.moe.routing`: N ranks of a group, S = E / N experts here.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.dispatcher import Dispatcher, EveryExpert, unpack
from mmdet_moe.moe.distributed import from_first_rank_, is_distributed, is_sharded
from mmdet_moe.moe.experts import Experts, ModuleExperts, StackedExperts
from mmdet_moe.moe.precision import autocast

_LOCAL, _PLACE = 'local.', 'place.0'
#: Attribute of the parameters of spread experts: N.
_MARK = 'spread_over'


def spread_over_ranks(experts: Experts, parts: int) -> Experts:
    """The part of some experts that this rank holds, with the way to all others.

    A collective operation: all ranks call it. The experts of the first one count, as data
    parallelism has it for all other weights.

    Args:
        experts: All E of them.
        parts: N. Without several processes there is nothing to spread, and they stay as they are.

    Raises:
        ConfigError: If N divides E or the number of ranks with a remainder, or if the experts are
            of a kind that cannot be cut into parts, or differ in their shapes.
    """
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise ConfigError(f'expert_parallel={parts!r} must be an integer of at least 1')
    if parts == 1:
        return experts
    if experts.num_experts % parts:
        raise ConfigError(
            f'expert_parallel={parts} does not divide num_experts={experts.num_experts}, so that '
            'ranks would hold unequal parts; choose numbers of which one divides the other'
        )
    if not isinstance(experts, ModuleExperts) and not (
        isinstance(experts, StackedExperts)
        and all(v.shape[:1] == (experts.num_experts,) for v in experts.state_dict().values())
    ):
        raise ConfigError(
            f'expert_parallel={parts}: {type(experts).__name__} can be cut into parts only if they '
            'are ModuleExperts, or StackedExperts all of whose entries are stacked along a first '
            'axis; leave expert_parallel out'
        )
    if isinstance(experts, ModuleExperts):
        shapes = [{name: v.shape for name, v in e.state_dict().items()} for e in experts]
        if any(of_one != shapes[0] for of_one in shapes):
            raise ConfigError(
                f'expert_parallel={parts}: the experts differ in the shapes of their weights, so '
                'that ranks would hold unequal parts; leave expert_parallel out'
            )
    if not is_distributed():
        print_log(
            f'expert_parallel={parts} has no effect in one process, which holds all experts.',
            logger='current',
        )
        return experts
    if dist.get_world_size() % parts:
        raise ConfigError(
            f'expert_parallel={parts} does not divide the {dist.get_world_size()} ranks; start a '
            f'multiple of {parts} processes'
        )
    device = _mesh(parts, dist.group.WORLD).device_type
    for value in experts.state_dict().values():
        first = value.to(device)
        from_first_rank_([first])
        value.copy_(first)
    return SpreadExperts(experts, parts)


@lru_cache
def _mesh(parts: int, _world: Any) -> Any:
    """The ranks as (replicas, N); made once for each N and world."""
    from mmengine.device import get_device
    from torch.distributed.device_mesh import init_device_mesh

    device = get_device() if dist.get_backend() != 'gloo' else 'cpu'
    shape = (dist.get_world_size() // parts, parts)
    return init_device_mesh(device, shape, mesh_dim_names=('replicas', 'experts'))


def _group(parts: int, dimension: str) -> dist.ProcessGroup:
    # Looked up and never kept by a module, because groups can be neither copied nor pickled.
    return _mesh(parts, dist.group.WORLD).get_group(dimension)


class SpreadExperts(Experts):
    """Experts of which this rank holds a part.

    1. The items are copied to rows, sorted by expert, as always (dispatch).
    2. The ranks of the group tell each other how many rows, of which size, go to which expert.
    3. All-to-all: the rows travel to the ranks that hold their experts.
    4. These evaluate them as they would evaluate items of their own.
    5. All-to-all: the results travel home, where they are summed up (combine).

    Every rank has to call it equally often, and run a backward pass through it equally often; ranks
    without items, or whose maps have another size, take part like all others.

    Gradients of the parameters are, when the backward pass is over, those of the mean over all
    ranks of what each of them called ``backward`` of, as distributed data parallel has them for all
    other parameters: the sum over the group divided by N, averaged over the replicas.

    Args:
        experts: All E of them; used up.
        parts: N, which divides E and the number of ranks.
    """

    separate_parameters = False

    def __init__(self, experts: Experts, parts: int) -> None:
        super().__init__()
        self.parts, self._num_experts = parts, experts.num_experts
        self.take_vectors, self.dense_scope = experts.take_vectors, experts.dense_scope
        self._whole = (copy.deepcopy(experts).to('meta'),)  # in a tuple: no part of the model
        rank = dist.get_rank(self.group)
        self.first = rank * self._num_local
        self.local = _cut(experts, self.first, self.first + self._num_local)
        self._mark()
        #: Data parallelism that does not know better gives it the value of the first rank. No
        #: buffer, because MMEngine has those left alone.
        self.place = nn.ParameterList([nn.Parameter(torch.tensor([float(rank)]), False)])
        self._is_checked = False
        #: All entries on the host, within :func:`all_experts`.
        self._all: dict[str, Tensor] | None = None
        #: Whether ``state_dict()`` gives a part outside of it, instead of raising.
        self.gives_part = False
        self.register_state_dict_post_hook(_save)
        self.register_load_state_dict_pre_hook(_load)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # copies of parameters do not keep attributes

    def _mark(self) -> None:
        for parameter in self.local.parameters():
            setattr(parameter, _MARK, self.parts)

    @property
    def num_experts(self) -> int:
        return self._num_experts

    @property
    def group(self) -> dist.ProcessGroup:
        """The N ranks that hold the experts together."""
        return _group(self.parts, 'experts')

    @property
    def _num_local(self) -> int:
        return self._num_experts // self.parts

    def forward(self, x_T: Tensor, dispatcher: Dispatcher, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`ModuleExperts.forward`; every rank of the group calls it."""
        if isinstance(dispatcher, EveryExpert):
            raise ConfigError(
                f'expert_parallel={self.parts}: experts of several ranks are in no graph that is '
                'exported, traced or compiled with fullgraph=True; load the checkpoint in one '
                'process'
            )
        self._check()
        if self.take_vectors:
            x_T = autocast(x_T)  # before it travels: half the bytes
        trip = _Trip(self, dispatcher, x_T.shape[1:])
        leaves, spec = tree_flatten((x_T, args, kwargs))
        parts = [
            trip.there(dispatcher.dispatch(leaf)) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        y_by_source: list[Tensor] = [x_T] * self.parts
        for sources in trip.by_shape():
            own = [
                trip.rows_of(part, sources) if isinstance(part, list) else part for part in parts
            ]
            x_R, more, named = tree_unflatten(own, spec)
            here = trip.dispatcher(sources)
            here.shared = dispatcher.shared
            y, rebuild_this = unpack(self.local(x_R, here, *more, **named))
            if trip.rank in sources:
                rebuild, shape = rebuild_this, y.shape[1:]
            rows = y.split([trip.received[s] for s in sources])
            for s, part in zip(sources, rows, strict=True):
                y_by_source[s] = part
        return rebuild(dispatcher.combine(trip.back(y_by_source, shape)))

    def _check(self) -> None:
        """Once: that nobody else has moved the weights, and that replicas start alike."""
        if self._is_checked:
            return
        if is_sharded(self) or not all(hasattr(p, _MARK) for p in self.local.parameters()):
            raise ConfigError(
                f'expert_parallel={self.parts}: the parameters of the experts have been replaced, '
                'as fully_shard does, which would cut them as if all ranks had the same; give it '
                'ignored_params=set(mmdet_moe.moe.expert_parallel.expert_parameters(model))'
            )
        # Told to each other, so that all of them stop.
        trains = any(parameter.requires_grad for parameter in self.local.parameters())
        found = self.place[0].new_tensor([trains, not trains, 0], dtype=torch.uint8)
        found[2] = self.place[0].item() != dist.get_rank(self.group)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        some, not_all, wrong = found.tolist()
        if some and not_all:
            raise ConfigError(
                f'expert_parallel={self.parts}: all experts of one rank are frozen, and not those '
                'of another one, which would wait for their gradients; freeze all of them or none'
            )
        if wrong:
            raise ConfigError(
                f'expert_parallel={self.parts}: the first rank has given its experts to all '
                'others; call mmdet_moe.moe.expert_parallel.keep_from_ddp(model) before '
                'DistributedDataParallel(model), or with a Runner set '
                "model_wrapper_cfg=dict(type='mmdet_moe.ExpertParallelDDP')"
            )
        replicas = _group(self.parts, 'replicas')
        if dist.get_world_size(replicas) > 1:
            for value in (*self.local.parameters(), *self.local.buffers()):
                dist.broadcast(value.detach(), group=replicas, group_src=0)
        self._is_checked = True

    def finish_backward(self) -> None:
        """Average the gradients over the replicas; an expert without items has one of zeros.

        All at once at the end, because experts get their gradients in an order that differs from
        replica to replica. What has been averaged before, by an earlier backward pass of the same
        step, stays as it is.
        """
        trained = [p for p in self.local.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        replicas = _group(self.parts, 'replicas')
        number = dist.get_world_size(replicas)
        if number == 1 or not trained:
            return
        grads = [p.grad for p in trained if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat, group=replicas)
        flat /= number
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def receptive_field(self, in_channels: int) -> tuple[int, int]:
        return self._whole[0].receptive_field(in_channels)

    def share_weights(self) -> None:
        """As of all experts; a collective operation."""
        self.local.share_weights()
        for value in self.local.state_dict().values():
            dist.broadcast(value, group=self.group, group_src=0)

    def entries(self, expert: int = 0) -> dict[str, Tensor]:
        """Of one of those that are here, from 0."""
        return self.local.entries(expert)

    def count(self, state_dict: dict[str, Tensor], prefix: str) -> int:
        return self._whole[0].count(state_dict, prefix)

    def store(
        self, state_dict: dict[str, Tensor], prefix: str, name: str, copies: list[Tensor]
    ) -> None:
        self._whole[0].store(state_dict, prefix, name, copies)

    def init_weights(self) -> None:
        """As of all experts; a collective operation."""
        with self.whole() as experts:
            initialise = getattr(experts, 'init_weights', None)
            if initialise is not None:
                initialise()

    @contextmanager
    def whole(self) -> Iterator[Experts]:
        """All experts, as one process has them, for a change that all ranks make alike.

        Every rank keeps its part of what becomes of them. A collective operation.
        """
        parameter = next(self.local.parameters())
        experts = copy.deepcopy(self._whole[0]).to_empty(device=parameter.device).to(parameter)
        experts.load_state_dict(self.gather())
        yield experts
        self.local.load_state_dict(self._own(experts.state_dict()))

    def gather(self) -> dict[str, Tensor]:
        """The entries of all experts by their names in one process; a collective operation."""
        group = self.group
        gathered = {}
        for name, value in self.local.state_dict().items():
            everywhere = [torch.empty_like(value) for _ in range(self.parts)]
            dist.all_gather(everywhere, value.contiguous(), group=group)
            if isinstance(self.local, ModuleExperts):
                e, rest = name.split('.', 1)
                for rank, of_rank in enumerate(everywhere):
                    gathered[f'{rank * self._num_local + int(e)}.{rest}'] = of_rank
            else:
                gathered[name] = torch.cat(everywhere)
        return {name: gathered[name] for name in self._whole[0].state_dict()}

    def _own(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank holds of the entries of all experts, by its names here."""
        last = self.first + self._num_local
        if not isinstance(self.local, ModuleExperts):
            return {name: value[self.first : last] for name, value in whole.items()}
        own = {}
        for name, value in whole.items():
            e, rest = name.split('.', 1)
            if self.first <= int(e) < last:
                own[f'{int(e) - self.first}.{rest}'] = value
        return own

    def extra_repr(self) -> str:
        last = self.first + self._num_local - 1
        return f'num_experts={self._num_experts}, {self.first} to {last} here'


class _Trip:
    """One call's way to the ranks of the experts and back.

    Attributes:
        rank: Of this one in its group.
        received: How many rows it gets from each rank.
    """

    def __init__(
        self, experts: SpreadExperts, dispatcher: Dispatcher, shape: tuple[int, ...]
    ) -> None:
        self._experts, self._shape = experts, tuple(shape)
        group = experts.group
        self.rank = dist.get_rank(group)
        counts_NS = dispatcher.offsets.diff().view(experts.parts, -1)
        size = torch.tensor(self._shape, device=counts_NS.device).expand(experts.parts, -1)
        tell = torch.cat([counts_NS, size], 1)
        told = torch.empty_like(tell)
        dist.all_to_all_single(told, tell, group=group)
        sent, got = torch.stack([tell, told]).tolist()  # waits for the device
        num_local = counts_NS.shape[1]
        self._sent = [sum(row[:num_local]) for row in sent]
        self._counts = [row[:num_local] for row in got]
        self.received = [sum(row) for row in self._counts]
        self._shapes = [tuple(row[num_local:]) for row in got]

    def by_shape(self) -> list[list[int]]:
        """The ranks, those together whose rows have the same shape and can be computed as one."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for source, shape in enumerate(self._shapes):
            groups.setdefault(shape, []).append(source)
        return list(groups.values())

    def there(self, x_R: Tensor) -> list[Tensor]:
        """Own rows to those that came from each rank: (R, ...) to N times (R', ...)."""
        own = tuple(x_R.shape[1:])
        shapes = [shape if own == self._shape else own for shape in self._shapes]
        sizes = [n * prod(shape) for n, shape in zip(self.received, shapes, strict=True)]
        sent = [n * prod(own) for n in self._sent]
        # Distributed data parallel divides all gradients by the number of ranks, but what flows
        # back to the items here must be whole; see `back`.
        flat = _Exchange.apply(x_R.flatten(), sent, sizes, self._experts, self._experts.parts)
        parts = flat.split(sizes)
        return [
            p.view(-1, *s) if p.numel() else p.view(0, *s)
            for p, s in zip(parts, shapes, strict=True)
        ]

    def rows_of(self, parts: list[Tensor], sources: list[int]) -> Tensor:
        return torch.cat([parts[s] for s in sources])

    def dispatcher(self, sources: list[int]) -> Dispatcher:
        """To the experts here, of the rows from some ranks."""
        counts = torch.tensor([self._counts[s] for s in sources])
        num_local = counts.shape[1]
        ids = torch.arange(num_local).repeat(len(sources)).repeat_interleave(counts.flatten())
        ids_R1 = ids[:, None].to(next(self._experts.local.parameters()).device)
        ones = torch.ones(ids_R1.shape, device=ids_R1.device)
        if num_local == 1:
            return Dispatcher.to_one(ids_R1, ones)
        return Dispatcher(ids_R1, ones, num_local)

    def back(self, y_by_source: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The results of each rank's rows to those of the own rows: N times (R', ...) to (R, ...).

        Args:
            y_by_source: The results here.
            shape: Of one of the own rows' results.
        """
        sent = [y.numel() for y in y_by_source]
        sizes = [n * prod(shape) for n in self._sent]
        flat = torch.cat([y.flatten() for y in y_by_source])
        scale = 1 / self._experts.parts
        flat = _Exchange.apply(flat, sent, sizes, self._experts, scale)
        return flat.view(sum(self._sent), *shape)


class _Exchange(torch.autograd.Function):
    """All-to-all of flat numbers; gradients go the way back, times a factor.

    Written out because PyTorch's own differentiable one is deprecated (``torch.distributed.nn``) or
    private (``_functional_collectives``).
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, sent: list[int], received: list[int], experts: SpreadExperts, scale: float
    ) -> Tensor:
        ctx.settings = sent, received, experts, scale
        y = x.new_empty(sum(received))
        group = experts.group
        dist.all_to_all_single(y, x.contiguous(), received, sent, group=group)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        sent, received, experts, scale = ctx.settings
        _at_end_of_backward(experts)
        back = _Exchange.apply(grad * scale, received, sent, experts, 1 / scale)
        return back, None, None, None, None


def _at_end_of_backward(experts: SpreadExperts) -> None:
    """Let the experts finish the backward pass that is running, once."""
    task = torch._C._current_graph_task_id()
    if vars(experts).get('_task') != task:
        vars(experts)['_task'] = task
        torch.autograd.Variable._execution_engine.queue_callback(experts.finish_backward)


def _cut(experts: Experts, first: int, last: int) -> Experts:
    """The experts ``first`` to ``last − 1`` alone."""
    if isinstance(experts, ModuleExperts):
        local = ModuleExperts(list(experts)[first:last])
        local.batch_dim = experts.batch_dim
        return local
    for module in experts.modules():
        for name, parameter in module.named_parameters(recurse=False):
            part = nn.Parameter(parameter.detach()[first:last].clone(), parameter.requires_grad)
            module.register_parameter(name, part)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer[first:last].clone()
    return experts


def _save(experts: SpreadExperts, state_dict: dict, prefix: str, _: Any) -> None:
    state_dict.pop(prefix + _PLACE)
    local = {}
    for key in [key for key in state_dict if key.startswith(prefix + _LOCAL)]:
        local[key.removeprefix(prefix + _LOCAL)] = state_dict.pop(key)
    if experts._all is not None:
        state_dict.update({prefix + name: value for name, value in experts._all.items()})
    elif experts.gives_part:
        for name, value in local.items():
            if isinstance(experts.local, ModuleExperts):
                e, rest = name.split('.', 1)
                name = f'{int(e) + experts.first}.{rest}'
            # A copy, which MMEngine may overwrite by that of the first rank.
            state_dict[prefix + name] = value.clone()
    else:
        raise ConfigError(
            f'expert_parallel={experts.parts}: one rank holds a part of the experts alone; call '
            'state_dict() within mmdet_moe.moe.expert_parallel.all_experts(model) on all ranks, '
            "or train with the hook dict(type='mmdet_moe.ExpertParallelHook')"
        )


def _load(experts: SpreadExperts, state_dict: dict, prefix: str, *_: Any) -> None:
    names = [key for key in state_dict if key.startswith(prefix)]
    if not names:
        return
    whole = {key.removeprefix(prefix): state_dict.pop(key) for key in names}
    state_dict.update({prefix + _LOCAL + k: v for k, v in experts._own(whole).items()})
    state_dict[prefix + _PLACE] = experts.place[0].detach()


# What a training has to know of spread experts ----------------------------------------------------


def spread_experts(model: nn.Module) -> list[SpreadExperts]:
    """Those of all layers of a model."""
    return [module for module in model.modules() if isinstance(module, SpreadExperts)]


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that differ from rank to rank."""
    return [p for experts in spread_experts(model) for p in experts.parameters()]


def keep_from_ddp(model: nn.Module) -> None:
    """Let distributed data parallel leave spread experts alone, which take care of themselves.

    ``add_experts`` does it for the model that it is given, and ``tools/train.py`` for every model.

    Args:
        model: What ``DistributedDataParallel`` will be given.
    """
    inside = {id(t) for s in spread_experts(model) for t in (*s.parameters(), *s.buffers())}
    if inside:
        named = [*model.named_parameters(), *model.named_buffers()]
        names = [name for name, value in named if id(value) in inside]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@contextmanager
def whole_experts(layers: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, all experts stand in layers where they are spread; a collective operation."""
    with ExitStack() as stack:
        for layer in layers:
            spread = layer.experts
            if isinstance(spread, SpreadExperts):
                whole = stack.enter_context(spread.whole())
                stack.callback(setattr, layer, 'experts', spread)
                layer.experts = whole
        yield


@contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's ``state_dict()`` holds all experts, as one process has them.

    A collective operation: all ranks enter it, even if one of them saves. The entries of the
    experts lie on the CPU.
    """
    spread = spread_experts(model)
    try:
        for experts in spread:
            experts._all = {name: value.cpu() for name, value in experts.gather().items()}
        yield
    finally:
        for experts in spread:
            experts._all = None


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` by the norm that one process would have.

    A collective operation where some parameters are those of spread experts.

    Args:
        parameters: Those of this rank. All others as of PyTorch's.

    Returns:
        The norm of all gradients, the same on every rank.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    by_parts: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_parts.setdefault(getattr(parameter, _MARK, 1), []).append(parameter.grad)
    norms = []
    for parts, grads in sorted(by_parts.items()):
        norm = get_total_norm(grads, norm_type, foreach=foreach)
        if parts > 1:
            everywhere = [torch.empty_like(norm) for _ in range(parts)]
            dist.all_gather(everywhere, norm, group=_group(parts, 'experts'))
            norm = torch.linalg.vector_norm(torch.stack(everywhere), norm_type)
        norms.append(norm)
    total = get_total_norm(norms, norm_type, error_if_nonfinite)
    clip_grads_with_norm_(parameters, max_norm, total, foreach)
    return total
