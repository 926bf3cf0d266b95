"""A test begins with all weights of the model, or not at all."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmdet_moe.analysis.look import pack, unpack
from mmdet_moe.analysis.models import load_weights
from mmdet_moe.engine.tested_checkpoint import (
    TestedCheckpointHook,
    check_unpacked,
    check_weights,
    lost_experts,
)
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import add_experts


def dense():
    return nn.Sequential(OrderedDict(a=nn.Linear(3, 3), norm=nn.BatchNorm1d(3), b=nn.Linear(3, 2)))


def test_a_dense_checkpoint_in_a_model_with_experts(capsys):
    before, model = dense().eval(), dense().eval()
    add_experts(model, {'a': {'granularity': 'token'}})
    check_weights(model, before.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(model(x), before(x))
    assert 'note: the checkpoint is of a dense model' in capsys.readouterr().out


@pytest.mark.parametrize(
    'other',
    [
        {'type': 'mmdet_moe.ConvGAPRouter', 'conv_channels': 4},
        {'type': 'mmdet_moe.GAPRouter', 'normalise_levels': 1},
    ],
)
def test_routers_of_another_kind_are_not_those_of_a_dense_model(other):
    """They would be tested as they were drawn."""
    trained, model = nn.Sequential(nn.Conv2d(4, 4, 1)), nn.Sequential(nn.Conv2d(4, 4, 1))
    add_experts(trained, {'0': {}}, {'type': 'mmdet_moe.GAPRouter'})
    add_experts(model, {'0': {}}, other)
    with pytest.raises(ConfigError, match=r"^checkpoint: it lacks .*, such as '0\.router\."):
        check_weights(model, trained.state_dict())


@pytest.mark.parametrize('balancing', ['BiasBalancing', 'MeanImportanceConstraint'])
def test_a_constraint_that_the_checkpoint_was_not_trained_with(balancing, capsys):
    """It begins at what changes nothing."""
    trained, model = dense().eval(), dense().eval()
    entry = {'granularity': 'token'}
    add_experts(trained, {'a': entry})
    add_experts(model, {'a': entry}, router={'constraint': {'type': f'mmdet_moe.{balancing}'}})
    check_weights(model, trained.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(model(x), trained(x))
    assert capsys.readouterr().out == ''


def test_what_ships_is_not_loaded_as_it_lies(tmp_path):
    trained = dense()
    torch.save({'state_dict': trained.state_dict(), 'meta': {'dataset_meta': {}}}, tmp_path / 'a')
    pack(tmp_path / 'a', tmp_path / 'b')
    with pytest.raises(ConfigError, match=r'packed in 8 bits.*tools/look\.py'):
        check_unpacked(torch.load(tmp_path / 'b')['state_dict'])
    check_unpacked(unpack(tmp_path / 'b')['state_dict'])


def test_a_training_goes_on_with_the_same_model():
    before, model = dense(), dense()
    add_experts(model, {'a': {'granularity': 'token'}})
    check_weights(model, model.state_dict(), resumed=True)
    with pytest.raises(ConfigError, match=r"^--resume: .* it lacks 'a\.router\..*load_from=FILE$"):
        check_weights(model, before.state_dict(), resumed=True)
    more = {**before.state_dict(), 'a.constraint.bias': torch.zeros(4)}
    with pytest.raises(ConfigError, match=r"the model has no 'a\.constraint\.bias'"):
        check_weights(before, more, resumed=True)


def test_experts_that_the_model_does_not_have():
    at_a, at_b = dense(), dense()
    add_experts(at_a, {'a': {'granularity': 'token'}})
    add_experts(at_b, {'b': {'granularity': 'token'}})
    assert lost_experts(at_b, at_a.state_dict()) == ['a']
    assert lost_experts(at_a, at_a.state_dict()) == lost_experts(at_a, dense().state_dict()) == []


def test_what_is_missing(capsys):
    state = dense().state_dict()
    del state['norm.num_batches_tracked']  # of old checkpoints
    check_weights(dense(), state)
    assert capsys.readouterr().out == ''
    with pytest.raises(ConfigError, match=r'^checkpoint: size mismatch for b\.bias: '):
        check_weights(dense(), state | {'b.bias': torch.zeros(3)})
    del state['b.bias']
    with pytest.raises(ConfigError, match=r"^checkpoint: it lacks 1 of .* 9 .*, such as 'b\.bias'"):
        check_weights(dense(), state)


def test_what_a_layer_of_experts_has_no_place_for():
    """It would compute something else, but for what acts in training alone."""
    shared, bias, masks, plain = dense(), dense(), dense(), dense()
    entry = {'granularity': 'token'}
    add_experts(shared, {'a': {**entry, 'shared': 1}})
    add_experts(bias, {'a': entry}, router={'constraint': {'type': 'mmdet_moe.BiasBalancing'}})
    constraint = {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.1}
    add_experts(masks, {'a': entry}, router={'constraint': constraint})
    add_experts(plain, {'a': entry}, router={'noise': False})
    for trained, key in ((shared, r'a\.shared\.0\.'), (bias, r'a\.router\.constraint\.bias')):
        with pytest.raises(ConfigError, match=f"^checkpoint: it has '{key}"):
            check_weights(plain, trained.state_dict())
    left_out = check_weights(plain, masks.state_dict())
    assert left_out == ['a.router.constraint.relative_importance']
    noisy = dense()
    add_experts(noisy, {'a': entry}, router={'noise': True})
    assert check_weights(plain, noisy.state_dict()) == ['a.router.noise_fc.weight']
    check_weights(dense(), masks.state_dict() | dense().state_dict())


def test_settings_that_no_weight_tells(tmp_path, capsys):
    """The weights of k = 2 fit into a model of k = 1, which computes something else."""
    trained, other, patch = (nn.Sequential(OrderedDict(a=nn.Conv2d(4, 4, 1))) for _ in range(3))
    add_experts(trained, {'a': {'top_k': 2}})
    add_experts(other, {'a': {'top_k': 1}})
    add_experts(patch, {'a': {'top_k': 2, 'granularity': 'patch', 'grid_size': 2}})
    checkpoint = {'state_dict': trained.state_dict(), 'meta': {}}
    TestedCheckpointHook().before_save_checkpoint(SimpleNamespace(model=trained), checkpoint)
    torch.save(checkpoint, tmp_path / 'a.pth')

    def notes():
        lines = capsys.readouterr().out.splitlines()
        return ''.join(line for line in lines if line.startswith('note: '))

    def loaded_by_both(model):
        """What the analysis says, which a test says, too."""
        notes()
        load_weights(model, str(tmp_path / 'a.pth'))
        said = notes()
        loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=None))
        runner = SimpleNamespace(model=model, _test_loop=loop)
        TestedCheckpointHook().after_load_checkpoint(runner, checkpoint)
        assert notes() == said
        return said

    assert loaded_by_both(trained) == ''
    assert 'was trained with top_k=2 in a, which has 1 here: all' in loaded_by_both(other)
    assert "with granularity='image' in a, which has 'patch' here (1 more" in loaded_by_both(patch)
    checkpoint['meta'].clear()  # of another program
    torch.save(checkpoint, tmp_path / 'a.pth')
    assert loaded_by_both(other) == ''
