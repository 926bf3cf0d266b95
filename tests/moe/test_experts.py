"""Loading dense checkpoints into experts ("upcycling")."""

import copy

import pytest
import torch
from mmengine.runner import load_state_dict
from torch import nn

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.experts import ModuleExperts, upcycle


def stage(width=6):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Conv2d(width, 4, 1)
    )


def dense_model(randomise):
    return randomise(nn.ModuleDict({'stem': nn.Conv2d(3, 3, 1), 'stage': stage()})).eval()


def moe_model(num_experts=3, width=6, **kwargs):
    layer = MoELayer(stage(width), num_experts, min(2, num_experts), in_channels=3, **kwargs)
    return nn.ModuleDict({'stem': nn.Conv2d(3, 3, 1), 'stage': layer}).eval()


def run(model, x):
    return model['stage'](model['stem'](x))


@pytest.mark.parametrize('num_experts', [1, 3])
@pytest.mark.parametrize('load', [load_state_dict, lambda m, s, **kw: m.load_state_dict(s, **kw)])
def test_experts_are_exact_copies_without_noise(num_experts, load, randomise):
    dense, model = dense_model(randomise), moe_model(num_experts)
    checkpoint = dense.state_dict()
    before = copy.deepcopy(checkpoint)
    load(model, checkpoint, strict=False)
    for expert in model['stage'].experts:
        assert expert.state_dict().keys() == dense['stage'].state_dict().keys()
        for name, value in dense['stage'].state_dict().items():
            assert torch.equal(expert.state_dict()[name], value)
    pointers = {expert[0].weight.data_ptr() for expert in model['stage'].experts}
    assert len(pointers) == num_experts
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(run(model, x), run(dense, x), rtol=1e-5, atol=1e-5)
    assert checkpoint.keys() == before.keys()  # the caller's dict is untouched
    assert all(torch.equal(checkpoint[k], before[k]) for k in before)


def test_only_the_router_is_missing(randomise):
    result = moe_model().load_state_dict(dense_model(randomise).state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert sorted(result.missing_keys) == [
        'stage.router.fc.bias',
        'stage.router.fc.weight',
        'stage.router.noise_fc.weight',
    ]


def test_noise_is_relative_to_each_weight():
    dense = nn.ModuleDict({'stem': nn.Conv2d(3, 3, 1), 'stage': stage(400)})
    for parameter in dense['stage'].parameters():
        nn.init.normal_(parameter, 3.0, 2.0)
    nn.init.normal_(dense['stage'][0].weight, -1.0, 0.02)
    model = moe_model(width=400, upcycle_noise=0.1)
    model.load_state_dict(dense.state_dict(), strict=False)
    differences = []
    for expert in model['stage'].experts:
        for name, value in dense['stage'].state_dict().items():
            difference = expert.state_dict()[name] - value
            if value.dim() < 2:  # biases, normalisation, counters
                assert not difference.any()
                continue
            # At least 1600 numbers: the standard error of their std is at most 1.8 % of it.
            assert difference.std() / value.std() == pytest.approx(0.1, rel=0.09)
            assert abs(difference.mean()) < 5 * 0.1 * value.std() / value.numel() ** 0.5
        differences.append(expert[0].weight - dense['stage'][0].weight)
    for a, b in ((0, 1), (0, 2), (1, 2)):  # every expert its own noise
        pair = torch.stack([differences[a].flatten(), differences[b].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < 0.05  # 10,800 numbers: 5 standard errors


def test_noise_on_a_weight_with_one_number():
    layer = MoELayer(nn.Conv2d(1, 1, 1), 2, 2, in_channels=1, upcycle_noise=0.1)
    layer.load_state_dict({'weight': torch.full((1, 1, 1, 1), 2.0)}, strict=False)
    for expert in layer.experts:
        assert expert.weight.item() == 2  # without spread there is nothing to be relative to


def test_moe_checkpoints_are_untouched(randomise):
    source, target = randomise(moe_model(upcycle_noise=0.5)), moe_model(upcycle_noise=0.5)
    target.load_state_dict(source.state_dict())  # strict
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


@pytest.mark.parametrize(('saved', 'wanted'), [(2, 3), (4, 3), (12, 3)])
def test_another_number_of_experts(saved, wanted):
    checkpoint = moe_model(saved).state_dict()
    message = f'has {saved} experts in "stage" but the model has {wanted}; set num_experts={saved}'
    with pytest.raises(ConfigError, match=message):
        load_state_dict(moe_model(wanted), checkpoint)


def test_narrow_experts(randomise):
    message = r'"stage\.2\.weight" of shape \(4, 6, 1, 1\) does not fit .* \(4, 5, 1, 1\)'
    with pytest.raises(ConfigError, match=message):
        load_state_dict(moe_model(width=5), dense_model(randomise).state_dict())


def test_nothing_of_the_dense_module(randomise):
    model = randomise(moe_model())
    before = copy.deepcopy(model.state_dict())
    stem = {'stem.weight': torch.ones(3, 3, 1, 1), 'stem.bias': torch.zeros(3)}
    model.load_state_dict(stem, strict=False)
    for name, value in model['stage'].state_dict().items():
        assert torch.equal(value, before['stage.' + name])


def test_a_deep_copy_loads_into_itself(randomise):
    model = moe_model()
    clone, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    clone['stage'].upcycle_noise = 0.1
    dense = dense_model(randomise)
    clone.load_state_dict(dense.state_dict(), strict=False)
    weight = dense['stage'][0].weight
    assert not torch.equal(clone['stage'].experts[1][0].weight, weight)  # its own noise
    assert torch.equal(clone['stage'].experts[1][0].bias, dense['stage'][0].bias)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_other_classes_are_left_to_the_loader(randomise):
    """A prediction layer of another shape is handed on; what fits is loaded."""
    dense = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 80, 1)))
    experts = ModuleExperts(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 7, 1)) for _ in range(2))
    state = dense.state_dict(prefix='head.')
    upcycle(state, 'head.', 'head.', experts, noise=0)
    for e in range(2):
        assert torch.equal(state[f'head.experts.{e}.0.weight'], dense[0].weight)
        assert state[f'head.experts.{e}.1.weight'].shape == (80, 4, 1, 1)
    assert not any(key.startswith('head.0.') for key in state)


def test_noise_is_the_same_on_every_rank(randomise):
    """Whatever the random state of the process; but another one for each expert."""
    dense = randomise(nn.Sequential(nn.Conv2d(3, 4, 3)))
    experts = ModuleExperts(nn.Sequential(nn.Conv2d(3, 4, 3)) for _ in range(2))
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(dense.state_dict(prefix='head.'))
        upcycle(states[-1], 'head.', 'head.', experts, noise=0.1)
    first, second = (s['head.experts.0.0.weight'] for s in states)
    assert torch.equal(first, second)
    assert not torch.equal(first, states[0]['head.experts.1.0.weight'])
    assert not torch.equal(first, dense[0].weight)
