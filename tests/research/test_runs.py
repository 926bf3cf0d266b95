"""Reading the figures of a run from what it left on the disk."""

import json

import pytest

from mmdet_moe.errors import ConfigError
from research.runs import collect, latest_checkpoint

CONFIG = """
default_scope = 'mmengine'
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
model = dict(type='mmdet_moe.MoELayer', num_experts=4, top_k=1, in_channels=2,
             expert=dict(type='torch.nn.Conv2d', in_channels=2, out_channels=2, kernel_size=1))
"""


def write_run(folder, *starts):
    """A work directory whose run was started once for each list of log lines."""
    folder.mkdir()
    (folder / 'config.py').write_text(CONFIG)
    for i, lines in enumerate(starts):
        logs = folder / f'2026010{i}_000000' / 'vis_data'
        logs.mkdir(parents=True)
        (logs / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)) + '\n')
    return folder


def training(step, time):
    return {'loss': 1.0, 'time': time, 'data_time': 0.0, 'step': step}


def validation(step, **metrics):
    return {**metrics, 'time': 9.0, 'data_time': 0.1, 'step': step}


def test_resumed_run(tmp_path):
    metrics = {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_s': 0.25}
    starts = (
        [training(1, 3.0), training(2, 1.0), validation(2, **{'coco/bbox_mAP': 0.1})],
        [training(3, 2.0), {'val/moe/x/load_0': 0.5, 'step': 4}, validation(4, **metrics)],
    )
    run = write_run(tmp_path / 'run', *starts)
    result = collect(run)
    assert result.metrics['AP'] == 0.5
    assert result.metrics['AP small'] == 0.25
    assert result.seconds_per_iteration == 2.0
    assert result.length == 4
    # The router's 2 · 4 weights, 4 biases and 2 · 4 weights of the noise; 6 for each expert.
    assert (result.active_parameters, result.total_parameters) == (20 + 6, 20 + 4 * 6)
    assert result.layers == {}


def test_nothing_detected_is_no_precision(tmp_path):
    run = write_run(tmp_path / 'run', [training(4, 1.0), validation(4)])
    assert set(collect(run).metrics.values()) == {0.0}


def test_unfinished(tmp_path):
    assert collect(tmp_path / 'nothing') is None
    assert collect(write_run(tmp_path / 'begun', [training(2, 1.0)])) is None
    assert collect(write_run(tmp_path / 'half', [training(2, 1.0), validation(2)])) is None


def test_two_configs(tmp_path):
    run = write_run(tmp_path / 'run', [])
    (run / 'other.py').write_text(CONFIG)
    with pytest.raises(ConfigError, match='holds the runs of several configs'):
        collect(run)


def test_latest_checkpoint_of_a_moved_run(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/iter_4.pth')
    assert latest_checkpoint(tmp_path) == tmp_path / 'iter_4.pth'
