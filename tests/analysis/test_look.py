"""The trained model that ships with the package, and the first look at it."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmdet_moe.analysis.look import ASSET, CONFIG, pack, run_look, unpack
from mmdet_moe.compat.configs import config_path


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


@pytest.mark.usefixtures('quick_analysis')
def test_the_shipped_model(tmp_path, capsys):
    assert ASSET.stat().st_size < 5_000_000
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(config_path(CONFIG)).model)
    model.load_state_dict(unpack()['state_dict'])
    (tmp_path / 'look').mkdir()
    (tmp_path / 'look' / ASSET.name).write_bytes(b'of an interrupted run')
    run_look(['--out', str(tmp_path / 'look'), '--images', '4'])
    (results,) = tmp_path.glob('look/experts_4')
    experts = json.loads((results / 'experts.json').read_text())
    assert experts['metrics']['AP'] > 0.4  # it is trained; 0.62 on 200 images
    assert str(results / 'report.html') in capsys.readouterr().out
    assert (results / 'report.html').stat().st_size > 1_000_000


@pytest.mark.parametrize(('arguments', 'message'), [(['--images=0'], '--images=0 must be at')])
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_look(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
