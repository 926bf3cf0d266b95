"""tools/list_layers.py on the toolboxes' own configs, made small."""

from pathlib import Path

import mmdet
import mmpretrain
import pytest
from running import load_tool

MMDET, MMPRETRAIN = (Path(m.__path__[0]) / '.mim' / 'configs' for m in (mmdet, mmpretrain))
DEMO = Path(__file__).parents[2] / 'configs' / 'demo'
SMALL = ['model.backbone.depth=18', 'model.backbone.base_channels=8']


@pytest.fixture(scope='module')
def main():
    return load_tool('list_layers').main


def rows(capsys):
    """The last cells of every row, by its label."""
    lines = capsys.readouterr().out.strip().split('\n')
    start = next(i for i, line in enumerate(lines) if line.startswith('path'))
    cells = [[cell.strip() for cell in line.split('  ') if cell.strip()] for line in lines[start:]]
    return {row[0]: row[1:] for row in cells}


def test_retinanet(main, capsys):
    options = [*SMALL, 'model.neck.in_channels=[8,16,32,64]', 'model.neck.out_channels=8']
    options += ['model.bbox_head.in_channels=8', 'model.bbox_head.feat_channels=8']
    config = str(MMDET / 'retinanet' / 'retinanet_r50_fpn_1x_coco.py')
    main([config, '--shape', '64', '96', '--cfg-options', *options])
    table = rows(capsys)
    assert table['backbone.layer4'][-1] == 'image, patch'
    assert table['backbone.layer4'][1:3] == ['2×32×4×6', '2×64×2×3']
    assert table['neck.fpn_convs.* (5)'][0] == 'ConvModule'
    assert table['neck'][-1] == 'not: its input is no tensor (tuple)'
    assert table['bbox_head.retina_cls'][3] == '5'  # once per level
    assert table['backbone.layer1'][-1] == 'not: is frozen'


def test_detr(main, capsys):
    options = [*SMALL, 'model.neck.in_channels=[64]', 'model.encoder.num_layers=2']
    options += ['model.decoder.num_layers=2', 'model.num_queries=5']
    main([str(MMDET / 'detr' / 'detr_r50_8xb2-150e_coco.py'), '--shape', '64', '64', '--at',
          'encoder.layers.*', '--cfg-options', *options])  # fmt: skip
    table = rows(capsys)
    assert table['encoder.layers.*.ffn (2)'][-1] == 'image, token'
    assert table['encoder.layers.* (2)'][-1] == 'image'
    assert not any(label.startswith(('backbone', 'decoder')) for label in table)


def test_resnet(main, capsys):
    options = ['model.backbone.base_channels=8', 'model.backbone.stem_channels=8']
    config = str(MMPRETRAIN / 'resnet' / 'resnet18_8xb16_cifar10.py')
    main([config, '--depth', '2', '--cfg-options', *options, 'model.head.in_channels=64'])
    table = rows(capsys)
    assert table['(all)'][1] == '2×3×32×32'  # as it is trained
    assert table['backbone.layer2.* (2)'][-1] == 'image, patch'
    assert table['head.fc'][-1] == 'image, token'
    assert not any('.conv2' in label for label in table)


def test_swin(main, capsys):
    main([str(MMPRETRAIN / 'swin_transformer' / 'swin-tiny_16xb64_in1k.py'), '--shape', '64', '64',
          '--at', 'backbone.stages.*.blocks.*.ffn', '--depth', '0', '--cfg-options',
          'model.backbone.img_size=64', 'model.backbone.pad_small_map=True'])  # fmt: skip
    table = rows(capsys)
    assert table['backbone.stages.*.blocks.*.ffn (12)'][-1] == 'image, token'


def test_what_only_the_loss_reads(main, capsys):
    """Of the mask head, which a pass without a loss does no more than call."""
    config = str(MMDET / 'mask_rcnn' / 'mask-rcnn_r50_fpn_1x_coco.py')
    options = [*SMALL, 'model.neck.in_channels=[8,16,32,64]', 'model.test_cfg.rpn.max_per_img=9',
               'model.roi_head.bbox_head.fc_out_channels=8']  # fmt: skip
    main([config, '--shape', '64', '64', '--at', 'roi_head.mask_head', '--depth', '0',
          '--cfg-options', *options])  # fmt: skip
    table = rows(capsys)
    assert table['roi_head.mask_head'][-1] == 'not: the model reads its attribute "loss_and_target"'


@pytest.mark.parametrize('tool', ['list_layers', 'get_flops'])
def test_a_misspelt_field_of_a_router(capsys, tool):
    """The class is that of the router, which a head builds with itself."""
    with pytest.raises(SystemExit, match='2'):
        load_tool(tool).main(
            [
                str(DEMO / 'retinanet_moe_soft_digits.py'),
                '--cfg-options', 'model.bbox_head.router.noisee=True',
            ]
        )  # fmt: skip
    message = capsys.readouterr().err
    assert "wrong fields for type 'mmdet_moe.GAPRouter': " in message
    assert message.strip().endswith("did you mean 'noise'?")


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--at', 'backbone.layer9'], 'at='),
        (['--shape', '-64', '32'], '--shape -64 32: height and width must be at least 1'),
        (['--cfg-options', 'model.type=NoSuchClassifier'], 'cannot be built'),
    ],
)
def test_mistakes(main, capsys, arguments, message):
    config = str(MMPRETRAIN / 'resnet' / 'resnet18_8xb16_cifar10.py')
    with pytest.raises(SystemExit, match='2'):
        main([config, *arguments])
    assert message in capsys.readouterr().err
