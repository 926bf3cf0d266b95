"""One forward pass of a shipped config without data, and what is said where there is none."""

from pathlib import Path

import mmdet
import pytest
from running import load_tool
from torch import nn

from mmdet_moe.cli import load_config
from mmdet_moe.engine.dry_run import build_model, dry_run
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.flops import counting

CONFIGS = Path(mmdet.__path__[0]) / '.mim' / 'configs'
SMALL = {
    'backbone.depth': 18,
    'backbone.base_channels': 8,
    'backbone.init_cfg': None,
    'neck.in_channels': [8, 16, 32, 64],
}


def flops_of(config):
    cfg = load_config(
        str(CONFIGS / config), {f'model.{name}': value for name, value in SMALL.items()}
    )
    if 'num_proposals' in cfg.model.get('rpn_head', ()):
        cfg.model.rpn_head.num_proposals = 5
        head = cfg.model.roi_head
        head.num_stages = 2
        for name in ('stage_loss_weights', 'bbox_head', 'mask_head'):
            head[name] = head.get(name) and head[name][:2]
    model = build_model(cfg)
    run = dry_run(model, 'mmdet', (64, 64))
    with counting(model) as counter:
        run()
    return counter.by_module(model)


def test_sparse_rcnn():
    """Its head wants the objects before it computes anything."""
    flops = flops_of('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py')
    for stage in ('roi_head.bbox_head.0', 'roi_head.bbox_head.1'):
        assert flops[f'{stage}.fc_cls'] == 2 * (2 * 5) * 256 * 80
        dynamic = f'{stage}.instance_interactive_conv.dynamic_layer'
        assert flops[dynamic] == 2 * (2 * 5) * 256 * (2 * 256 * 64)


@pytest.mark.parametrize(
    ('config', 'part'),
    [
        ('queryinst/queryinst_r50_fpn_1x_coco.py', 'roi_head.mask_head.1'),
        ('yolact/yolact_r50_1xb8-55e_coco.py', 'mask_head.protonet'),
        ('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', 'mask_head.mask_feature_head'),
        ('boxinst/boxinst_r50_fpn_ms-90k_coco.py', 'mask_head.mask_feature_head'),
    ],
)
def test_mask_heads_run(config, part):
    flops = flops_of(config)
    assert 0 < flops[part] < flops['']


class Picky(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, inputs, data_samples, mode):
        if inputs.shape[2:] != (self.side, self.side):
            raise KeyError('masks')
        return self.conv(inputs)


@pytest.mark.parametrize(
    ('side', 'message'),
    [
        (
            384,
            r'images of 64×96 pixels \(KeyError: masks\); on others it does: give --shape 384 384',
        ),
        (0, r'images of 64×96 pixels, nor of any other size that was tried \(KeyError: masks\)$'),
    ],
)
def test_another_size_is_told_if_it_helps(side, message):
    run = dry_run(Picky(side), 'mmpretrain', (64, 96), suggest=True)
    with pytest.raises(ConfigError, match=f'^the model does not run on {message}'):
        run()


@pytest.mark.parametrize('tool', ['list_layers', 'get_flops'])
def test_tools_tell_another_size(tool, capsys):
    """DINO wants 900 pixels, which no map of a small image has."""
    options = {**SMALL, 'neck.in_channels': '[16,32,64]'}
    options |= {'encoder.num_layers': 1, 'decoder.num_layers': 1}
    arguments = [f'model.{name}={value}' for name, value in options.items()]
    config = str(CONFIGS / 'dino' / 'dino-4scale_r50_8xb2-12e_coco.py')
    with pytest.raises(SystemExit, match='2'):
        load_tool(tool).main([config, '--shape', '64', '64', '--cfg-options', *arguments])
    message = capsys.readouterr().err
    assert 'does not run on images of 64×64 pixels' in message
    assert message.strip().endswith('give --shape 224 224')
