"""The μMoE layer that takes the place of a linear layer, a 1×1 convolution or an MLP."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.mumoe import CPMuMoE, MuMoE, MuMoEConv1x1, MuMoEMLP, TRMuMoE
from mmdet_moe.moe.surgery.experts import check_no_hooks, plain_conv

#: By type: factorisation, and what takes the place of a linear layer.
KINDS = {'CPMuMoE': ('cp', CPMuMoE), 'TRMuMoE': ('tr', TRMuMoE)}
MUMOE_OPTIONS = ('num_experts', 'rank', 'norm', 'activation', 'budget')


@dataclass(frozen=True)
class FactorisedEntry:
    """What becomes a μMoE (arXiv 2402.12550).

    Attributes:
        at: As of :class:`~mmdet_moe.moe.surgery.Entry`.
        every: As well.
        kind: ``'CPMuMoE'`` or ``'TRMuMoE'``.
        options: ``num_experts``, ``rank`` (default ``'match'``), ``norm``, ``activation`` and
            ``budget``, as of :class:`~mmdet_moe.moe.mumoe.CPMuMoE`; sizes and bias are those of
            what stands there.
    """

    at: str
    every: str | None
    kind: str
    options: dict[str, Any]

    @classmethod
    def of(cls, given: Mapping) -> 'FactorisedEntry':
        """From the dict of a config, which has a ``type``.

        Raises:
            ConfigError: For unknown types and options.
        """
        options = dict(given)
        at, every, kind = options.pop('at'), options.pop('every', None), options.pop('type')
        name = str(getattr(kind, '__name__', kind)).removeprefix('mmdet_moe.')
        if name not in KINDS:
            raise ConfigError(
                f'experts: at={at!r} has type={kind!r}; use one of {tuple(KINDS)}, or no type for '
                'sparse experts'
            )
        if unknown := sorted(set(options) - set(MUMOE_OPTIONS)):
            raise ConfigError(
                f'experts: at={at!r} has options {", ".join(unknown)} that {name} does not know; '
                f'there are {", ".join(MUMOE_OPTIONS)}'
            )
        if 'num_experts' not in options:
            raise ConfigError(f'experts: at={at!r} needs num_experts')
        return cls(at, every, name, {'rank': 'match', **options})

    def make(self, module: nn.Module) -> MuMoE:
        """The layer that takes a module's place.

        Raises:
            ConfigError: If the module is none that a μMoE can stand for, or hooks would be lost.
        """
        factorisation, linear = KINDS[self.kind]
        conv, _ = plain_conv(module)
        if isinstance(module, nn.Linear):
            check_no_hooks(module)
            sizes = (module.in_features, module.out_features)
            return linear(*sizes, bias=module.bias is not None, **self.options)
        if conv is not None:
            # 'same' and 'valid' pad nothing here.
            padded = not isinstance(conv.padding, str) and any(conv.padding)
            wide = conv.kernel_size != (1, 1) or padded or conv.groups > 1
            if wide or len(set(conv.stride)) > 1:
                raise ConfigError(
                    f'a convolution of kernel {conv.kernel_size}, stride {conv.stride}, padding '
                    f'{conv.padding} and {conv.groups} groups cannot become a μMoE; choose a 1×1 '
                    'convolution without padding'
                )
            check_no_hooks(*module.modules())
            return MuMoEConv1x1(
                conv.in_channels, conv.out_channels, factorisation=factorisation,
                stride=conv.stride[0], bias=conv.bias is not None, **self.options,
            )  # fmt: skip
        first, act, hidden_drop, second, drop = _parts_of_mlp(module)
        kept = {act, hidden_drop, drop}  # whose hooks are run as before
        check_no_hooks(*(part for part in module.modules() if part not in kept))
        layer = MuMoEMLP(
            first.in_features, first.out_features, second.out_features,
            factorisation=factorisation, bias=first.bias is not None, act=copy.deepcopy(act),
            **self.options,
        )  # fmt: skip
        layer.hidden_drop, layer.drop = hidden_drop, drop
        return layer


def _parts_of_mlp(
    module: nn.Module,
) -> tuple[nn.Linear, nn.Module, nn.Module, nn.Linear, nn.Module]:
    """Linear layer, activation, dropout, linear layer, dropout of what computes just these.

    Raises:
        ConfigError: If it computes anything else.
    """
    kind = type(module).__name__
    leaves = [m for m in module.modules() if not any(True for _ in m.children())]
    leaves = [m for m in leaves if not isinstance(m, nn.Identity)]
    linears = [m for m in leaves if isinstance(m, nn.Linear)]
    inner = [name for name, m in module.named_children() if any(True for _ in m.parameters())]
    wrong = ConfigError(
        f'{kind} is no linear layer, no 1×1 convolution and no MLP of two linear layers with one '
        'activation between, so it cannot become a μMoE; choose a path inside of it'
        + (f', such as {inner[0]}' if inner else '')
    )
    if len(linears) != 2 or linears[0] is not leaves[0]:
        raise wrong
    first, second = linears
    between, behind = leaves[1 : leaves.index(second)], leaves[leaves.index(second) + 1 :]
    acts = [m for m in between if not isinstance(m, nn.Dropout)]
    drops = [m for m in between if isinstance(m, nn.Dropout)]
    is_mlp = (
        len(acts) == 1
        and len(drops) <= 1
        and len(behind) <= 1
        and all(isinstance(m, nn.Dropout) for m in behind)
        and (first.bias is None) == (second.bias is None)
        and first.out_features == second.in_features
    )
    if not is_mlp or not _computes(module, first, *acts, second):
        raise wrong
    drop = [*drops, nn.Identity()][0], [*behind, nn.Identity()][0]
    return first, acts[0], drop[0], second, drop[1]


@torch.no_grad()
def _computes(module: nn.Module, first: nn.Linear, *others: nn.Module) -> bool:
    """Whether a module does just these steps, seen on random tokens."""
    twin = copy.deepcopy(nn.ModuleList([module, first, *others])).eval()
    x = torch.randn(2, 3, first.in_features).to(first.weight)
    expected = x
    try:
        for step in twin[1:]:
            expected = step(expected)
        found = twin[0](x)
    except Exception:  # of any kind: the module is the user's
        return False
    close = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return close and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
