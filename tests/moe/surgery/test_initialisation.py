"""``init_weights`` of MMEngine's models with experts, against what it makes of the dense model."""

import copy

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from mmdet_moe.moe import add_experts


class Head(BaseModule):
    """Initialises by class, by name, and in code of its own."""

    def __init__(self, init_cfg=None):
        super().__init__(
            init_cfg
            or [
                {
                    'type': 'Normal',
                    'layer': 'Conv2d',
                    'std': 0.5,
                    'override': {'type': 'Constant', 'name': 'cls', 'val': 7.0, 'bias': -4.0},
                },
            ]
        )
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)])
        self.cls = nn.Conv2d(4, 3, 1)
        self.reg = nn.Conv2d(4, 2, 1)
        self.free = nn.Conv2d(4, 4, 3, padding=1)

    def init_weights(self):
        super().init_weights()
        nn.init.constant_(self.reg.weight, 3.0)

    def forward(self, x):
        y = x
        for conv in self.convs:
            y = conv(y)
        return self.cls(y), self.reg(self.free(x))


class Detector(BaseModule):
    def __init__(self, head):
        super().__init__({'type': 'Constant', 'layer': 'Linear', 'val': 2.0})
        self.head = head
        self.fc = nn.Linear(2, 2)


EXPERTS = {'{convs,cls}': {}, 'reg': {}, 'free': {}}


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('expert_init', ['shared', 'independent'])
def test_as_the_dense_model(nested, expert_init):
    """Also where the changed model is a part of another, which keeps records of its parameters."""
    head = Head()
    add_experts(head, {p: {**o, 'expert_init': expert_init} for p, o in EXPERTS.items()})
    model = Detector(head) if nested else head
    router = head.free.router.fc.weight.clone()
    model.init_weights()
    shared = expert_init == 'shared'
    for expert in head.convs_moe.experts:
        assert (expert.cls.weight == 7).all()
        assert (expert.cls.bias == -4).all()
        assert 0.3 < expert.convs[1].weight.std() < 0.7
    assert (head.reg.experts.weight == 3).all()
    for weights in (
        torch.stack([expert.convs[0].weight for expert in head.convs_moe.experts]),
        head.free.experts.weight,
    ):
        assert 0.4 < weights[3].std() < 0.6
        assert torch.equal(weights[0], weights[3]) == shared
    assert torch.equal(head.free.router.fc.weight, router)
    assert not hasattr(head.free, '_params_init_info')
    before = copy.deepcopy(model.state_dict())
    model.init_weights()  # a second time does nothing
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize('of', ['dense', 'moe'])
@pytest.mark.parametrize('expert_init', ['shared', 'independent'])
def test_pretrained(of, expert_init, tmp_path):
    """A file of the dense model, or of the one with experts, wins over every draw."""
    options = {path: {'expert_init': expert_init, 'num_experts': 3} for path in EXPERTS}
    source = Head()
    if of == 'moe':
        add_experts(source, options)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'head.pth')
    model = Head({'type': 'Pretrained', 'checkpoint': str(tmp_path / 'head.pth')})
    add_experts(model, options)
    init_cfg = copy.deepcopy(model.init_cfg)
    model.init_weights()
    assert model.init_cfg == init_cfg
    for e in range(3):
        if of == 'dense':
            expected, conv = source.convs[0].weight, source.free.weight
        else:
            expected = source.convs_moe.experts[e].convs[0].weight
            conv = source.free.experts.weight[e]
        assert torch.equal(model.convs_moe.experts[e].convs[0].weight, expected)
        assert torch.equal(model.free.experts.weight[e], conv)


def test_narrow_experts_are_drawn_as_the_dense_ones():
    head = Head()
    add_experts(head, {'{convs,cls}': {'width': 0.5}})
    head.init_weights()
    expert = head.convs_moe.experts[2]
    assert expert.convs[1].weight.shape[:2] == (2, 2)
    assert (expert.cls.weight == 7).all()
