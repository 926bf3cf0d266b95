"""Comparing the settings of a run with those that are asked for."""

import pytest
from mmengine.config import Config

from mmdet_moe.errors import ConfigError
from research.experiments import settings
from research.experiments.settings import check_settings, difference

FOUND = {
    'work_dir': 'a', 'resume': True, 'load_from': 'x', 'launcher': 'none', 'cache': '/here',
    'data_root': '/there/joint',
    'model': {'depth': 18, 'stages': (1, 2)}, 'hooks': [{'type': 'A'}, {'type': 'B', 'k': 1}],
}  # fmt: skip


def test_places_do_not_matter():
    wanted = {**FOUND, 'work_dir': 'b', 'resume': False, 'load_from': None}
    wanted |= {'cache': '/elsewhere', 'data_root': '/moved/joint'}
    del wanted['launcher']
    assert difference(Config(FOUND), Config(wanted)) is None


def test_the_toolbox_of_a_part():
    """A model that comes from a toolbox's own config; from another one it is another model."""
    model = {'type': 'ResNet', 'depth': 18}
    found = Config({'default_scope': 'mmdet', 'model': model})
    same, other = (
        Config({'default_scope': 'mmdet', 'model': {**model, '_scope_': scope}})
        for scope in ('mmdet', 'mmpretrain')
    )
    assert difference(found, same) is difference(same, found) is None
    assert difference(found, other) == "model._scope_: nothing there, 'mmpretrain' now"


def test_mixed_precision_of_another_device():
    """A config asks for it; on a CPU it is another class, without a scale."""
    scaled = {'type': 'AmpOptimWrapper', 'loss_scale': 'dynamic'}
    wrappers = [{'type': 'AmpOptimWrapper'}, scaled, {'type': 'CpuAmpOptimWrapper'}]
    found, *others = (Config({**FOUND, 'optim_wrapper': wrapper}) for wrapper in wrappers)
    assert [difference(other, found) for other in others] == [None, None]
    plain = Config({**FOUND, 'optim_wrapper': {'type': 'OptimWrapper'}})
    assert difference(plain, found).startswith("optim_wrapper.type: 'OptimWrapper' there")


def test_a_list_is_a_tuple():
    """A config file that was written and read again may have the one for the other."""
    wanted = {**FOUND, 'model': {'depth': 18, 'stages': [1, 2]}}
    assert difference(Config(FOUND), Config(wanted)) is None


@pytest.mark.parametrize(('change', 'text'), [
    ({'model': {'depth': 34, 'stages': (1, 2)}}, 'model.depth: 18 there, 34 now'),
    ({'model': {'depth': 18, 'stages': (1, 3)}}, 'model.stages[1]: 2 there, 3 now'),
    ({'model': {'depth': 18, 'stages': (1,)}}, 'model.stages: [1, 2] there, [1] now'),
    ({'hooks': [{'type': 'A'}, {'type': 'B', 'k': 2}]}, 'hooks[1].k: 1 there, 2 now'),
    ({'hooks': [{'type': 'A'}, {'type': 'B'}]}, 'hooks[1].k: 1 there, nothing now'),
    ({'seed': 0}, 'seed: nothing there, 0 now'),
])  # fmt: skip
def test_first_difference(change, text):
    assert difference(Config(FOUND), Config({**FOUND, **change})) == text


CONFIG = """
default_scope = 'mmpretrain'
data_root = 'data/'
train_dataloader = dict(dataset=dict(data_root=data_root, ann_file=data_root + 'a.json'))
optim_wrapper = dict(optimizer=dict(lr={lr}))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A config, and the folder of a run of it on a GPU, with its data in another place."""
    config, folder = tmp_path / 'config.py', tmp_path / 'run'
    config.write_text(CONFIG.format(lr=0.1))
    folder.mkdir()
    stored = settings.load_config(str(config), {'data_root': '/elsewhere'})
    monkeypatch.setattr('mmdet_moe.cli.get_device', lambda: 'cuda')
    settings.set_loader_defaults(stored)
    monkeypatch.setattr('mmdet_moe.cli.get_device', lambda: 'cpu')
    assert stored.train_dataloader.pin_memory
    assert stored.train_dataloader.dataset.ann_file == '/elsewhere/a.json'
    stored.dump(folder / 'config.py')
    return config, folder


def test_another_machine_does_not_matter(run):
    config, folder = run
    check_settings(folder, config, ['data_root=/here'])
    check_settings(folder, config, [])
    with pytest.raises(ConfigError, match=r'run holds a run .*optimizer\.lr: 0\.1 there, 0\.2 now'):
        check_settings(folder, config, ['optim_wrapper.optimizer.lr=0.2'])


def test_half_a_config(run):
    """As left behind by a process that was killed while it wrote it."""
    config, folder = run
    stored = folder / 'config.py'
    stored.write_text(stored.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"cannot read the config file '.*config\.py'"):
        check_settings(folder, config, [])
