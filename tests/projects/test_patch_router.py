"""The paper's router against its formula, with its values as gates and with their softmax."""

import pytest
import torch

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.patches import PatchGrid
from projects.cluster_theory import PatchRouter

C, E = 4, 5


@pytest.mark.parametrize('top_k', [1, 3])
def test_logits_as_gates(top_k):
    """The factors are the noisy logits; the weights are Switch's."""
    router = PatchRouter(C, E, top_k, bias=True, init_std=0.1).double()
    torch.nn.init.constant_(router.fc.bias, -2.0)
    x = torch.randn(50, C, 3, 3, dtype=torch.float64)
    torch.manual_seed(7)
    routing = router(x)
    torch.manual_seed(7)
    noisy = router.fc(x.sum((2, 3))) + torch.rand(50, E, dtype=torch.float64)
    values, ids = noisy.topk(top_k)
    assert torch.equal(routing.expert_ids, ids)
    torch.testing.assert_close(routing.gates, values)
    assert (routing.gates < 0).any()
    torch.testing.assert_close(routing.weights, noisy.softmax(-1).gather(1, ids))
    torch.testing.assert_close(routing.level(0)[1], values)
    assert routing.load().sum() == 50 * top_k
    routing.gates.sum().backward()
    assert router.fc.weight.grad.abs().max() > 1e-3


def test_gates_of_logits_far_apart():
    """Their softmax is 1 and, rounded, 0; yet the second one is a choice, with its own gate."""
    router = PatchRouter(C, E, 2, bias=True, init_std=0.1, noise=False)
    torch.nn.init.zeros_(router.fc.weight)
    with torch.no_grad():
        router.fc.bias.copy_(torch.tensor([0.0, 200.0, -300.0, 50.0, 0.0]))
    routing = router(torch.randn(4, C, 3, 3))
    assert routing.expert_ids.tolist() == [[1, 3]] * 4
    assert routing.gates.tolist() == [[200.0, 50.0]] * 4
    assert routing.load().tolist() == [0, 4, 0, 4, 0]
    assert routing.weights[:, 1].max() < 1e-30


def test_no_gate_for_a_masked_expert():
    config = {'type': 'mmdet_moe.RelativeImportanceConstraint'}
    router = PatchRouter(C, E, 3, init_std=0.1, noise=False, constraint=config).double()
    router.constraint.relative_importance.copy_(torch.tensor([-3.0, 1, 1, 1, 0]))
    routing = router(torch.randn(20, C, 3, 3, dtype=torch.float64))
    assert ((routing.weights == 0) == (routing.gates == 0)).all()
    assert ((routing.gates != 0).sum(1) == 2).all()


def test_softmax_as_gate():
    router = PatchRouter(C, E, 1, gate='softmax').double().eval()
    torch.nn.init.normal_(router.fc.weight)
    x = torch.randn(6, C, 1, 4, dtype=torch.float64)
    routing = router(x)
    assert routing.gates is None
    weights, ids = (x[:, :, 0].transpose(1, 2) @ router.fc.weight.T).sum(1).softmax(-1).max(-1)
    assert torch.equal(routing.expert_ids[:, 0], ids)
    torch.testing.assert_close(routing.factors[:, 0], weights)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'gate': 'raw'}, r"gate='raw' is unknown; use 'logit' or 'softmax'"),
        (
            {'noise': False},
            r"init_std=0 and noise=False multiplies all experts with 0.*set noise='uniform'",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PatchRouter(C, E, 2, **options)


def test_whole_images_only():
    with pytest.raises(ConfigError, match="use granularity='image'"):
        PatchRouter(C, E, 2)(torch.randn(2, C, 4, 4), [PatchGrid((4, 4), grid=2)])
