"""Whether modules can become experts: each is made a layer, and has to compute what it computed."""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmdet_moe.errors import ConfigError, UserError, explained
from mmdet_moe.moe.dispatcher import unpack
from mmdet_moe.moe.expert_layer import ExpertLayer, Observer
from mmdet_moe.moe.experts.modules import structure_of
from mmdet_moe.moe.flops import evaluating
from mmdet_moe.moe.granularity import GRANULARITIES
from mmdet_moe.moe.routing import Routing
from mmdet_moe.moe.surgery import Entry, build_site, check_places
from mmdet_moe.moe.surgery.experts import find_in_channels
from mmdet_moe.moe.surgery.paths import Place

if TYPE_CHECKING:
    from mmdet_moe.moe.surgery.survey import LayerInfo


def try_as_experts(
    model: nn.Module, infos: Sequence['LayerInfo'], runs: Sequence[Callable[[], Any]]
) -> None:
    """Find out what modules can be, and note it.

    While the model runs, each of them has a stand-in, which tries on every call what
    :func:`add_experts` would put there.

    Args:
        model: Left as it was.
        infos: Of one path each.
        runs: Run it, in eval mode. All but the first may fail, and are passed by then.
    """
    trial, candidates = _Trial(model), []
    for info in infos:
        above, _, name = info.paths[0].rpartition('.')
        try:
            check_places(model, [Place(above, (name,))])
        except ConfigError as error:
            info.obstacle = _reason(error, info.paths[0])
            continue
        module = model.get_submodule(info.paths[0])
        siblings = model.get_submodule(above)._modules
        candidates.append((siblings, name, module, _Candidate(info, module, trial)))
    with evaluating(model):
        for siblings, name, _, candidate in candidates:
            siblings[name] = candidate
        try:
            runs[0]()
            for run in runs[1:]:
                with suppress(Exception):  # of any kind, out of the model's own code
                    run()
        finally:
            for siblings, name, module, _ in candidates:
                siblings[name] = module
    for info in infos:
        if not (info.obstacle or info.granularities):
            info.obstacle = 'is not called by this path, or on nothing'


class _Trial:
    """Makes experts of modules, and compares what they compute with what was there.

    Args:
        model: A copy of it is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self._reasons: dict[tuple, str | None] = {}

    def refusal(self, entry: Entry, like: tuple, *call: Any) -> str | None:
        """Why an entry is impossible, or None.

        Args:
            entry: Of one path.
            like: Modules and calls for which this is the same are tried once.
            *call: Arguments, keywords and output of the module.
        """
        key = (*like, entry.granularity, entry.in_channels)
        if key not in self._reasons:
            self._reasons[key] = self._refusal(entry, *call)
        return self._reasons[key]

    def _refusal(self, entry: Entry, args: tuple, kwargs: dict, output: Any) -> str | None:
        above, _, name = entry.at.rpartition('.')
        try:
            with explained('its experts fail'):
                layer = build_site(self.model, entry, Place(above, (name,))).layer
                layer.router.register_forward_hook(_take_turns)
                y, dense = (unpack(result)[0] for result in (layer(*args, **kwargs), output))
        except UserError as error:
            return _reason(error, entry.at)
        like = y.shape == dense.shape
        if like and torch.allclose(y, dense, 0, 0.01 * float(dense.abs().max()), equal_nan=True):
            return None
        return 'its experts do not compute what it does'


def _take_turns(_: nn.Module, __: tuple, routing: Routing) -> Routing:
    """The items to both experts; blank images would all go to one."""
    ids = torch.arange(routing.num_items, device=routing.expert_ids.device)[:, None] % 2
    return replace(routing, expert_ids=ids)


def _reason(error: Exception, path: str) -> str:
    """What an error says of a path, without its name."""
    mine = rf'^(The experts of )?(MoE layer )?"{re.escape(path)}"( \(\w+\))?:? '
    return re.sub(mine, '', str(error))


class _Candidate(ExpertLayer):
    """Stands in for a module, and finds out of its calls what it can be.

    As a layer of experts it refuses what the model reads of it; then it gives what was asked for.
    """

    def __init__(self, info: 'LayerInfo', module: nn.Module, trial: _Trial) -> None:
        super().__init__()
        self.name, self.replaces, self._dense = info.paths[0], info.kind, (module,)
        self._info, self._trial = info, trial
        self._structure = structure_of(trial.model.get_submodule(self.name))
        self._seen: set[tuple] = set()

    def observe(self, observer: Observer) -> NoReturn:
        """It decides nothing."""
        raise RuntimeError(f'"{self.name}" is not experts yet')

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self._dense[0], name)
            reason = f'the model reads its attribute "{name}"'
            self._info.obstacle = self._info.obstacle or reason
            self._info.granularities = ()
            return value

    def __iter__(self) -> Iterator[Any]:
        return self.__getattr__('__iter__')()

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__('__getitem__')(index)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        output = self._dense[0](*args, **kwargs)
        shapes = [t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # Of maps, the batch and the channels: the levels of a pyramid are alike.
        sizes = tuple((s == shapes[0], len(s), s[:2] if len(s) == 4 else s) for s in shapes)
        if not self._info.obstacle and sizes not in self._seen and all(map(prod, shapes)):
            self._try((self._structure, sizes), args, kwargs, output)
            self._seen.add(sizes)
        return output

    def _try(self, like: tuple, *call: Any) -> None:
        """Keep the granularities that suit one more call."""
        info, shape = self._info, self._info.inputs or ()
        is_map = len(shape) == 4
        for channels in [info.in_channels] if self._seen else self._channels(shape):
            reasons: dict[str, str | None] = {}
            for kind in info.granularities or GRANULARITIES:
                needless = {
                    'patch': not is_map,
                    'pixel': not is_map or reasons.get('patch') is not None,  # sees too much
                    # The channels are those of one dimension.
                    'token': is_map and shape[1] != shape[-1] and reasons.get('image', '') is None,
                }
                if needless.get(kind):
                    continue
                entry = Entry(
                    self.name,
                    num_experts=2,
                    top_k=1,
                    router={'softmax': 'straight_through'},
                    granularity=kind,
                    grid_size=2 if kind == 'patch' else 1,
                    in_channels=channels,
                )
                reasons[kind] = self._trial.refusal(entry, like, *call)
            info.granularities = tuple(kind for kind in reasons if reasons[kind] is None)
            if info.granularities:
                info.in_channels = channels
                return
        info.obstacle = next(iter(reasons.values()))

    def _channels(self, shape: tuple[int, ...]) -> list[int | None]:
        """What to give for ``in_channels``; something only if what is found is not in the shape."""
        with suppress(ConfigError):
            found = find_in_channels(self._trial.model.get_submodule(self.name))
            if found in (shape[1], shape[-1]):
                return [None]
        return [None, shape[1] if len(shape) == 4 else shape[-1]]
