"""Edits of experts that exist in factorised form alone."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.editing.edit import Edit
from mmdet_moe.moe.mumoe import MuMoE
from mmdet_moe.moe.mumoe.factors import put


class FactorisedExpert:
    """One expert of a μMoE layer: its part ``W[n]`` of the tensor behind the layer's output.

    An edit adds to ``W[n]`` exactly what is missing, as few terms ``input ∘ output`` as do, each of
    which raises the rank by one: one for a single output (``(scale - 1) W[n]_o ∘ e_o``), one for
    what is added to all outputs. All outputs of an expert are scaled without any where there is one
    level, for then its own slice of a factor belongs to no other; and elsewhere by as many as
    ``W[n]`` has ranks.

    Args:
        layer: The layer.
        expert: Index among all its experts.
    """

    def __init__(self, layer: MuMoE, expert: int) -> None:
        self.layer, self.expert = layer, expert
        #: How many outputs it has.
        self.num_outputs = layer.out_features

    def apply(self, edit: Edit, undo: ExitStack) -> None:
        """Change the factors.

        Args:
            edit: What to change.
            undo: Told how to change them back.

        Raises:
            ConfigError: If something is to be added and the experts have no bias.
        """
        factors, (place, *inner) = self.layer.experts, self.layer.experts.place(self.expert)
        if edit.factor is None and not factors.bias:
            raise ConfigError(
                f'expert {self.expert} of layer "{self.layer.name}" cannot be edited: '
                f'add={edit.add} needs a bias, which is an input that is always 1; build the layer '
                'with bias=True, or use scale'
            )
        for parameter in factors.factors:
            undo.callback(_put_back, parameter, parameter.data, parameter.grad)
        own = factors.expert_weight(self.expert)
        outputs = torch.eye(self.num_outputs, dtype=own.dtype, device=own.device)
        if edit.factor is None:
            is_bias = torch.zeros_like(own[:, 0])
            is_bias[-1] = 1
            to = outputs.sum(0) if edit.output is None else outputs[edit.output]
            factors.add_term(self.expert, edit.term * is_bias, to)
        elif edit.output is not None:
            missing = (edit.factor - 1) * own[:, edit.output]
            factors.add_term(self.expert, missing, outputs[edit.output])
        elif not inner:
            experts = factors.factors[0]
            experts.data = experts.data.clone()
            experts.select(-2, place).mul_(edit.factor)
        else:
            for missing, to in _terms((edit.factor - 1) * own):
                factors.add_term(self.expert, missing, to)


def _terms(matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The fewest pairs of vectors whose products sum to a matrix, to the precision of its dtype."""
    u, sizes, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = sizes > torch.finfo(matrix.dtype).eps * sizes.max()
    # Each vector takes its share of the size, so that neither is lost in half precision.
    shares = sizes[kept].sqrt()
    return list(zip((u[:, kept] * shares).T, v[kept] * shares[:, None], strict=True))


def _put_back(parameter: nn.Parameter, data: Tensor, grad: Tensor | None) -> None:
    put(parameter, data.to(parameter.device), grad)
