"""The trained model that ships with the package, and the first look at it."""

import json

import pytest
import torch
from miniature import expect_cifar, write_cifar100
from mmengine.config import Config
from mmengine.registry import MODELS as REGISTERED
from mmengine.registry import DefaultScope

from mmdet_moe.analysis.look import MODELS, pack, run_look, unpack


def test_weights_in_8_bits(tmp_path):
    """Each is off by half a step at most, and what is no weight is exact."""
    state = {
        'conv.weight': torch.randn(3, 2, 3, 3),
        'zero.weight': torch.zeros(2, 2),
        'norm.weight': torch.randn(5),
        'norm.num_batches_tracked': torch.tensor(7),
    }
    meta = {'dataset_meta': {'classes': ('a', 'b')}, 'seed': 1}
    torch.save({'meta': meta, 'state_dict': state, 'optimizer': {}}, tmp_path / 'a.pth')
    pack(tmp_path / 'a.pth', tmp_path / 'b.pth')
    content = unpack(tmp_path / 'b.pth')
    assert content['meta'] == {'dataset_meta': {'classes': ('a', 'b')}}
    assert list(content['state_dict']) == list(state)
    for name, tensor in state.items():
        found = content['state_dict'][name]
        assert found.dtype == tensor.dtype
        largest = tensor.abs().flatten(1).amax(1) if tensor.dim() > 1 else torch.zeros(1)
        step = (largest / 127).reshape(-1, *[1] * (tensor.dim() - 1))
        assert ((found - tensor).abs() <= step * 0.501).all()


@pytest.mark.parametrize('name', MODELS)
def test_weights_of_the_shipped_models(name):
    shipped = MODELS[name]
    assert shipped.asset.stat().st_size < 5_000_000
    cfg = Config.fromfile(shipped.config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = REGISTERED.build(cfg.model)
    content = unpack(shipped.asset)
    model.load_state_dict(content['state_dict'])
    assert len(content['meta']['dataset_meta']['classes']) == {'digits': 10, 'cifar100': 100}[name]


@pytest.mark.usefixtures('quick_analysis')
def test_the_shipped_detector(tmp_path, capsys):
    (tmp_path / 'look').mkdir()
    (tmp_path / 'look' / MODELS['digits'].asset.name).write_bytes(b'of an interrupted run')
    run_look(['--out', str(tmp_path / 'look'), '--images', '4'])
    (results,) = tmp_path.glob('look/experts_4')
    experts = json.loads((results / 'experts.json').read_text())
    assert experts['metrics']['AP'] > 0.4  # it is trained; 0.62 on 200 images
    assert str(results / 'report.html') in capsys.readouterr().out
    assert (results / 'report.html').stat().st_size > 1_000_000


@pytest.mark.usefixtures('quick_analysis')
def test_the_shipped_classifier(tmp_path, capsys, monkeypatch):
    """On images that are given: noise here, so that it recognises next to none."""
    folder = write_cifar100(tmp_path / 'data', num_train=20, num_test=40)
    expect_cifar(monkeypatch, folder)
    run_look(
        [
            'cifar100',
            '--data',
            str(folder.parent),
            '--out',
            str(tmp_path / 'look'),
            '--images',
            '30',
        ]
    )
    (results,) = tmp_path.glob('look/experts_cifar100_30')
    experts = json.loads((results / 'experts.json').read_text())
    assert experts['run']['num_images'] == 30
    assert list(experts['layers']) == ['backbone.layer4']
    assert str(results / 'report.html') in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_look(['cifar100', '--data', str(tmp_path / 'no'), '--out', str(tmp_path / 'new')])
    assert "there is no folder '" in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--images=0'], '--images=0 must be at'),
        (['digits', '--data=.'], '--data: the images of digits are generated; leave it out'),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_look(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
