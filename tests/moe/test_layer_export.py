"""Exports and traces against the sparse layer, on inputs that go to other experts than theirs."""

import mumoe_by_hand as by_hand
import pytest
import torch
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import (
    ConvExperts,
    CPMuMoE,
    GAPRouter,
    LinearExperts,
    MLPExperts,
    MoELayer,
    MuMoEConv1x1,
    MuMoEMLP,
    TRMuMoE,
)

C, E = 4, 4
MAPS, TOKENS = (2, C, 6, 8), (2, 5, C)
ANY = torch.export.Dim.DYNAMIC


def subnet():
    """Changes its input in place, and has running statistics."""
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C))


def conv():
    return nn.Conv2d(C, C, 3, padding=1)


def layer(expert, num_experts=E, top_k=2, router=None, **options):
    """With a router whose decisions differ from input to input."""
    router = {'noise': False, 'init_std': 3.0, **(router or {})}
    return MoELayer(expert, num_experts, top_k, router, in_channels=C, **options)


class Levels(nn.Module):
    """Two levels that the layer is given together."""

    def __init__(self, built):
        super().__init__()
        self.layer = built

    def forward(self, x):
        return torch.cat([y.flatten(1) for y in self.layer([x, -3 * x[:, :, ::2, ::2]])], dim=1)


class More(nn.Module):
    """An expert with further arguments."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x, y, *, scale):
        return scale * self.conv(x) + y


class GivesMore(nn.Module):
    def __init__(self, built):
        super().__init__()
        self.layer = built

    def forward(self, x):
        return self.layer(x, 2 * x, scale=0.5)


BIAS = {'constraint': {'type': 'mmdet_moe.BiasBalancing'}}
CASES = {
    'modules': (lambda: layer(subnet()), MAPS),
    'modules, one chosen': (lambda: layer(subnet(), top_k=1), MAPS),
    'modules, straight through': (
        lambda: layer(subnet(), top_k=1, router={'softmax': 'straight_through'}),
        MAPS,
    ),
    'a single expert': (lambda: layer(subnet(), 1, 1), MAPS),
    'beside them': (lambda: layer(subnet(), shared=[conv(), conv()], shortcut=conv()), MAPS),
    'two levels': (lambda: Levels(layer(subnet())), MAPS),
    'further arguments': (lambda: GivesMore(layer(More())), MAPS),
    'convolutions': (lambda: layer(ConvExperts(C, C, 3, E, padding=1)), MAPS),
    'router with a convolution': (
        lambda: layer(conv(), router={'type': 'mmdet_moe.ConvGAPRouter', **BIAS}),
        MAPS,
    ),
    'clusters': (lambda: layer(conv(), router={'init': 'kmeans'}), MAPS),
    'patches': (lambda: layer(subnet(), granularity='patch', grid_size=2), MAPS),
    'patches, whole maps': (
        lambda: layer(subnet(), granularity='patch', grid_size=2, whole_maps=True),
        MAPS,
    ),
    'pixels, convolutions': (lambda: layer(ConvExperts(C, C, 1, E), granularity='pixel'), MAPS),
    'pixels, linear': (lambda: layer(LinearExperts(C, C, E), granularity='pixel'), MAPS),
    'pixels, whole maps': (lambda: layer(subnet(), granularity='pixel', whole_maps=True), MAPS),
    'pixels of maps of one pixel, whole maps': (
        lambda: layer(ConvExperts(C, C, 1, E), granularity='pixel', whole_maps=True),
        (2, C, 1, 1),
    ),
    'regions': (lambda: layer(MLPExperts(C * 9, 8, 5, E)), (6, C, 3, 3)),
    'tokens': (lambda: layer(MLPExperts(C, 8, C, E), granularity='token'), TOKENS),
    'tokens, modules': (lambda: layer(nn.Linear(C, C), granularity='token'), TOKENS),
    'factors': (lambda: by_hand.randomise(CPMuMoE(C, C, (4, 3), rank=4)), TOKENS),
    'a ring of factors': (lambda: by_hand.randomise(TRMuMoE(C, C, 4, 2, norm='ln')), TOKENS),
    'factors, pixels': (lambda: by_hand.randomise(MuMoEConv1x1(C, C, 4, 4, stride=2)), MAPS),
    'factors, mlp': (
        lambda: by_hand.randomise(MuMoEMLP(C, 8, C, (4, 3), 2, factorisation='tr')),
        TOKENS,
    ),
}


def build(name):
    torch.manual_seed(0)
    built, shape = CASES[name][0]().eval(), CASES[name][1]
    # Of several kinds, so that they go to several experts.
    inputs = [torch.randn(shape) * (i + 1) - 0.4 * i for i in range(4)]
    return built, inputs


def exported(model, x, dims=()):
    free = (dict.fromkeys(dims, ANY),) if dims else None
    return torch.export.export(model, (x,), dynamic_shapes=free, strict=False).module()


@torch.no_grad()
def check(run, built, inputs):
    for x in inputs:
        before = x.clone()
        torch.testing.assert_close(run(x), built(x.clone()), rtol=1e-5, atol=1e-5)
        assert torch.equal(x, before)


@pytest.mark.sweep(keep=1 / 3)
@pytest.mark.parametrize('name', CASES)
@pytest.mark.filterwarnings('ignore')  # a trace warns of every size that it keeps
def test_traced(name):
    """Right for every input of the example's shape; for others right too, or an error."""
    built, inputs = build(name)
    with torch.no_grad():
        run = torch.jit.trace(built, (inputs[0],))
    check(run, built, inputs)
    for other in (torch.cat([inputs[0], inputs[1][:1]]), inputs[1][:1], inputs[0].mT.contiguous()):
        try:
            with torch.no_grad():
                y = run(other)
        except RuntimeError:
            continue
        torch.testing.assert_close(y, built(other), rtol=1e-5, atol=1e-5)


@pytest.mark.sweep(keep=1 / 3)
@pytest.mark.parametrize('name', CASES)
def test_exported(name):
    """With batches and maps of any size; of patches, whose export takes long, with any batch."""
    built, inputs = build(name)
    is_map = CASES[name][1] == MAPS and 'patches' not in name
    run = exported(built, inputs[0], (0, 2, 3) if is_map else (0,))
    more = [torch.cat([inputs[0], inputs[1][:1]]), inputs[1][:1]]
    if is_map:
        more.append(torch.randn(3, C, 7, 10))
    check(run, built, inputs + more)


def test_experts_of_the_example_do_not_matter():
    """The example goes to experts 0 and 1 alone, and later inputs to the others."""
    router = GAPRouter(C, E, 2, noise=False, bias=False)
    router.fc.weight.data = torch.tensor([[2.0], [1.0], [-1.0], [-2.0]]).expand(E, C).clone()
    built = MoELayer(subnet(), E, 2, router).eval()
    run = exported(built, torch.ones(MAPS))
    check(run, built, [torch.ones(MAPS)])
    assert built.routing.expert_ids.unique().tolist() == [0, 1]
    check(run, built, [-torch.ones(MAPS)])
    assert built.routing.expert_ids.unique().tolist() == [2, 3]


def test_what_was_not_chosen_adds_nothing():
    """Even if it is no number."""
    built, (x, *_) = build('modules, one chosen')
    (chosen,) = built.router([x[:1]]).expert_ids.flatten().tolist()
    for e in range(E):
        built.experts[e][1].bias.data.fill_(float('nan') if e != chosen else 0.5)
    check(exported(built, x[:1]), built, [x[:1]])


def test_the_latest_routing_is_none_of_an_export():
    built, (x, *_) = build('modules')
    built(x[:1])
    exported(built, x)
    assert built.routing.num_items == 1


@pytest.mark.parametrize('export', [exported, torch.jit.trace])
def test_training_is_refused(export):
    built, (x, *_) = build('modules')
    model = nn.Sequential(built).train()
    message = r'^MoE layer "MoELayer" is exported or traced in training mode, .*call model\.eval\('
    with pytest.raises(ConfigError, match=message):
        export(model, x)


@pytest.mark.parametrize('dynamo', [True, False])
@pytest.mark.filterwarnings('ignore')  # of the exporters' own
def test_onnx(dynamo, tmp_path):
    """Both exporters; a wrong number of channels is told by the runtime."""
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    file = str(tmp_path / 'layer.onnx')
    for name in ('two levels', 'pixels, linear', 'factors, pixels'):
        built, inputs = build(name)
        torch.onnx.export(built, (inputs[0],), file, dynamo=dynamo, verbose=False)
        session = onnxruntime.InferenceSession(file)
        (given,) = session.get_inputs()

        def run(x, session=session, given=given):
            return torch.tensor(session.run(None, {given.name: x.numpy()})[0])

        check(run, built, inputs)
        with pytest.raises(Exception, match=r'index: 1 Got: 5 Expected: 4'):
            run(torch.randn(inputs[0].shape[0], C + 1, *inputs[0].shape[2:]))
