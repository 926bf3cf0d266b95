"""The factorised tensors of a μMoE against the tensors themselves."""

import mumoe_by_hand as by_hand
import pytest
import torch

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.mumoe import CPFactors, TRFactors

KINDS = {'cp': CPFactors, 'tr': TRFactors}
LEVELS = [(4,), (3, 2), (2, 3, 2)]


def make(kind, levels=(3, 2), bias=True, rank=2, size_in=3, size_out=5):
    factors = KINDS[kind](levels, size_in, size_out, rank, bias).double()
    for factor in factors.factors:
        torch.nn.init.normal_(factor)
    return factors


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('levels', LEVELS, ids=str)
def test_tensor_mixture_and_experts(kind, levels, bias):
    factors = make(kind, levels, bias, rank=2 if kind == 'cp' else [*range(2, 4 + len(levels))])
    tensor = factors.materialise()
    torch.testing.assert_close(tensor, by_hand.whole([*factors.factors]))
    assert tensor.shape == (*levels, 3 + bias, 5)
    x = torch.randn(7, 3).double()
    coefficients = [torch.rand(7, size).double() for size in levels]
    torch.testing.assert_close(
        factors(x, coefficients), by_hand.mixed(tensor, x, coefficients, bias)
    )
    flat = tensor.flatten(0, len(levels) - 1)
    padded = torch.cat([x, torch.ones(7, 1).double()], 1) if bias else x
    for expert, weight in enumerate(flat):
        torch.testing.assert_close(factors.expert_weight(expert), weight)
        torch.testing.assert_close(factors.expert_output(x, expert), padded @ weight)


@pytest.mark.parametrize('levels', LEVELS, ids=str)
def test_an_expert_left_out(kind, levels):
    factors = make(kind, levels)
    x = torch.randn(7, 3).double()
    coefficients = [torch.rand(7, size).double() for size in levels]
    for expert in (0, 3):
        tensor = factors.materialise().detach().clone()
        tensor.flatten(0, len(levels) - 1)[expert] = 0
        expected = by_hand.mixed(tensor, x, coefficients, True)
        torch.testing.assert_close(factors.without(x, coefficients, expert), expected)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('levels', LEVELS, ids=str)
def test_added_term(kind, levels, bias):
    factors = make(kind, levels, bias)
    parameters, shapes = [*factors.factors], [tuple(f.shape) for f in factors.factors]
    expected = factors.materialise().detach().clone()
    for expert in (2, 2, 3):
        input, output = torch.randn(3 + bias).double(), torch.randn(5).double()
        factors.add_term(expert, input, output)
        expected.flatten(0, len(levels) - 1)[expert] += torch.outer(input, output)
    torch.testing.assert_close(factors.materialise(), expected)
    # An optimizer that has them goes on with them.
    assert all(a is b for a, b in zip(factors.factors, parameters, strict=True))
    for factor, shape in zip(factors.factors, shapes, strict=True):
        grown = [size + 3 * (dim in factors.rank_dims) for dim, size in enumerate(shape)]
        assert [*factor.shape] == grown


@pytest.mark.parametrize('expert', [6, -1, 1.0])
def test_no_such_expert(kind, expert):
    with pytest.raises(ConfigError, match='expert='):
        make(kind).expert_weight(expert)


def test_initialisation_of_cp():
    factors = CPFactors((50, 40), 400, 100, 64, bias=True).factors
    first, second, input, output = factors
    assert abs(first.mean().item() - 1) < 0.06
    assert abs(first.std().item() - 1) < 0.06
    assert abs(second.mean().item() - 1) < 1e-3
    assert abs(second.std().item() - 0.01) < 1e-3
    for factor, bound in ((input, 400**-0.5), (output, 64**-0.5)):
        assert 0.98 * bound < factor.abs().max().item() <= bound
        assert abs(factor.std().item() * 12**0.5 / (2 * bound) - 1) < 0.03


def test_initialisation_of_the_ring():
    *experts, input, output = TRFactors((300, 300), 64, 50, (4, 4, 4, 8), bias=True).factors
    for core, spread in zip(experts, (1, 0.01), strict=True):
        diagonals = core.diagonal(dim1=0, dim2=2)
        assert torch.equal(core, torch.diag_embed(diagonals).permute(1, 0, 2))
        assert abs(diagonals.mean().item() - 1) < 0.1 * spread
        assert abs(diagonals.std().item() - spread) < 0.1 * spread
    for core, bound in ((input, 64**-0.5), (output, (8 * 4) ** -0.5)):
        assert 0.98 * bound < core.abs().max().item() <= bound
        assert abs(core.std().item() * 12**0.5 / (2 * bound) - 1) < 0.04


def test_state_dict_of_another_rank(kind):
    source, target = make(kind, rank=4), make(kind, rank=2)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.materialise(), source.materialise())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'levels': (3,)}, r'has 3 factors \(1 levels of experts\), the layer 4 \(2 levels\)'),
        ({'levels': (3, 2, 2)}, r'has 5 factors \(3 .*give the layer num_experts=\[3, 2, 2\]'),
        ({'levels': (3, 3)}, 'only ranks may differ'),
        ({'size_in': 4}, 'only ranks may differ'),
        ({'size_out': 4}, 'only ranks may differ'),
        ({'bias': False}, 'only ranks may differ'),
    ],
)
def test_state_dict_of_another_tensor(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        make(kind).load_state_dict(make(kind, **options).state_dict())


def test_state_dict_of_the_other_factorisation():
    with pytest.raises(ConfigError, match='only ranks may differ'):
        make('cp').load_state_dict(make('tr').state_dict())
