"""What the classes with experts at their usual places take."""

import pytest
from mmengine.registry import MODELS

from mmdet_moe.errors import ConfigError

CHANNELS = dict(in_channels=8, num_classes=2)
PRESETS = [
    dict(type='MoEFPN', in_channels=[8, 8], out_channels=8, num_outs=2),
    dict(type='MoEResNet', depth=18),
    dict(type='MoERetinaHead', **CHANNELS),
    dict(type='MoEShared2FCBBoxHead', **CHANNELS),
]


@pytest.mark.parametrize('preset', PRESETS, ids=lambda preset: preset['type'])
@pytest.mark.parametrize(('written', 'meant'), [('topk', 'top_k'), ('num_expert', 'num_experts')])
def test_misspelt_option_of_experts(preset, written, meant):
    made = {**preset, 'type': f'mmdet_moe.{preset["type"]}', written: 2}
    with pytest.raises(ConfigError, match=rf"^{written}=2 is no option; did you mean '{meant}'"):
        MODELS.build(made)


def test_misspelt_option_of_a_mumoe():
    made = dict(type='mmdet_moe.MuMoEClsHead', in_channels=8, num_classes=2, rnk=4)
    with pytest.raises(ConfigError, match=r"^rnk=4 is no option; did you mean 'rank'"):
        MODELS.build(made)


def test_misspelt_field_of_the_dense_module_is_left_to_it():
    with pytest.raises(TypeError, match='stacked_conv'):
        MODELS.build(dict(type='mmdet_moe.MoERetinaHead', **CHANNELS, stacked_conv=2))
