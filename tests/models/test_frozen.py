"""A frozen neck: same outputs, no gradients, no moving statistics."""

import pytest
import torch
from mmdet.registry import MODELS

NECK = {
    'type': 'mmdet.FPN',
    'in_channels': [4, 6],
    'out_channels': 5,
    'num_outs': 3,
    'norm_cfg': {'type': 'BN'},
}


@pytest.fixture
def frozen():
    return MODELS.build({'type': 'mmdet_moe.Frozen', 'module': NECK})


def inputs():
    return [
        torch.randn(2, 4, 8, 6, requires_grad=True),
        torch.randn(2, 6, 4, 3, requires_grad=True),
    ]


def test_outputs_and_names_of_the_module(frozen, randomise):
    dense = randomise(MODELS.build(NECK)).eval()
    frozen.load_state_dict(dense.state_dict())  # strict: the names are those of the module
    x = inputs()
    for a, b in zip(frozen(x), dense(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_nothing_changes_in_training(frozen):
    model = torch.nn.ModuleDict({'neck': frozen}).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = inputs()
    sum(y.sum() for y in model['neck'](x)).backward()
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m.training for m in frozen.modules())
    assert all(level.grad.any() for level in x)  # what lies before it can still train
