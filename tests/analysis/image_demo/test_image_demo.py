"""Pictures of single images: what the labels say, where the routing lies, what can go wrong."""

import copy
import runpy
import sys
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import QuadMesh
from matplotlib.text import Text
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from running import TOOLS
from tiny_models import (
    ASSIGNER,
    FOUR,
    HEADS,
    MOE_BACKBONE,
    MOE_NECK,
    TEST_CFG,
    build_faster,
)

from mmdet_moe.analysis.image_demo import command, drawing
from mmdet_moe.analysis.image_demo.command import (
    ImageDemo,
    distinct_names,
    find_images,
    mixture,
    run_image_demo,
)
from mmdet_moe.analysis.image_demo.drawing import (
    DPI,
    Mark,
    RoutedMap,
    draw_marks,
    draw_routing,
    opacity,
    page_style,
    place_labels,
)
from mmdet_moe.analysis.image_demo.pipeline import ImagePipeline
from mmdet_moe.drawing import expert_colour, expert_colours, text_on, to_rgb
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import Routing, find_moe_layers

TOOL = TOOLS / 'image_demo.py'
NAMES = ('cat', 'dog', 'a very long name of a class that nobody reads')
RESIZE = dict(type='Resize', scale=(128, 96), keep_ratio=True)
WIDTH, HEIGHT = 100, 52  # of the image; 128 × 67 for the network, padded to 128 × 96


def detector(head='moe retina', backbone=None, neck=None, pipeline=(RESIZE,)):
    """The config of a tiny detector."""
    return dict(
        default_scope='mmdet',
        test_dataloader=dict(
            dataset=dict(
                type='CocoDataset',
                metainfo=dict(classes=NAMES),
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    *pipeline,
                    dict(type='LoadAnnotations', with_bbox=True),
                    dict(
                        type='PackDetInputs',
                        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
                    ),
                ],
            )
        ),
        model=dict(
            type='SingleStageDetector',
            data_preprocessor=dict(
                type='DetDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3, pad_size_divisor=32
            ),
            backbone=dict(
                type='mmdet.ResNet', depth=18, base_channels=2, stem_channels=4,
                out_indices=(1, 2, 3),
            ) | (backbone or {}),
            neck=dict(
                type='mmdet.FPN', in_channels=[4, 8, 16], out_channels=6, num_outs=3
            ) | (neck or {}),
            bbox_head=copy.deepcopy(HEADS[head]),
            train_cfg=dict(
                assigner=ASSIGNER, sampler=dict(type='mmdet.PseudoSampler'), allowed_border=-1,
                pos_weight=-1, debug=False,
            ),
            test_cfg=copy.deepcopy(TEST_CFG),
        ),
    )  # fmt: skip


def classifier(granularity='image', grid_size=1, pipeline=()):
    """The config of a tiny classifier."""
    return dict(
        default_scope='mmpretrain',
        test_dataloader=dict(
            dataset=dict(
                type='CustomDataset',
                pipeline=[dict(type='LoadImageFromFile'), *pipeline, dict(type='PackInputs')],
            )
        ),
        model=dict(
            type='ImageClassifier',
            data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3, to_rgb=True),
            backbone=dict(
                type='mmdet_moe.MoEResNet', depth=18, stem_channels=8, base_channels=8,
                out_indices=(3,), moe_stages=4, num_experts=3, top_k=2, granularity=granularity,
                grid_size=grid_size,
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=64),
        ),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch):
    """The test process keeps its memory as it is."""
    monkeypatch.setattr('mmdet_moe.analysis.models.keep_large_blocks', lambda: True)


@pytest.fixture
def image_file(tmp_path):
    """Noise of 100 × 52 px."""
    path = tmp_path / 'photo.one.png'
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def save(tmp_path, randomise):
    """Write a config and random weights; returns both paths and the model."""

    def save(config, name='model', **meta):
        path = tmp_path / f'{name}.py'
        Config(copy.deepcopy(config)).dump(path)
        init_default_scope(config['default_scope'])
        model = MODELS.build(Config.fromfile(path).model)
        randomise(model)
        checkpoint = tmp_path / f'{name}.pth'
        torch.save({'state_dict': model.state_dict(), 'meta': meta}, checkpoint)
        return path, checkpoint, model.eval()

    return save


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, by name of the function."""
    calls = {'draw_marks': [], 'draw_routing': []}

    def watch(name):
        function = getattr(command, name)

        def call(*args):
            figure = function(*args)
            calls[name].append((args, figure))
            return figure

        monkeypatch.setattr(command, name, call)

    for name in calls:
        watch(name)
    return calls


def run(*arguments):
    run_image_demo([str(argument) for argument in arguments])


# Detections --------------------------------------------------------------------------------------


def candidates_of_levels(model, data):
    """For each level the boxes that the head finds there alone, without suppression."""
    cfg = copy.deepcopy(model.bbox_head.test_cfg)
    cfg.update(nms_pre=-1, max_per_img=100_000, nms=dict(type='nms', iou_threshold=1.0))
    features = model.extract_feat(data['inputs'])
    outputs = model.bbox_head(features)
    metas = [sample.metainfo for sample in data['data_samples']]
    found = []
    for level in range(len(features)):
        scores = [
            score if i == level else torch.full_like(score, -1e4)
            for i, score in enumerate(outputs[0])
        ]
        (result,) = model.bbox_head.predict_by_feat(
            scores, outputs[1], batch_img_metas=metas, cfg=cfg, rescale=True
        )
        found.append(result)
    return features, found


@torch.no_grad()
def test_labels_say_what_the_router_decides(save, image_file, tmp_path, drawn, capsys):
    """Levels by brute force, weights from the features by hand."""
    config, checkpoint, model = save(detector(), dataset_meta={'classes': NAMES})
    run(image_file, config, '--score-thr', 0.5, checkpoint, '--out', tmp_path / 'out')
    model.cfg = Config.fromfile(config)
    expected = inference_detector(model, str(image_file)).pred_instances
    expected = expected[expected.scores >= 0.5]
    assert len(expected) > 5

    item = ImagePipeline(model.cfg)(image_file).data
    data = model.data_preprocessor(
        {'inputs': [item['inputs']], 'data_samples': [item['data_samples']]}, False
    )
    features, by_level = candidates_of_levels(model, data)
    layers = find_moe_layers(model)
    assert [args[2].splitlines()[1].split(':')[0] for args, _ in drawn['draw_marks']] == [*layers]
    experts = set()
    for (args, _), layer in zip(drawn['draw_marks'], layers.values(), strict=True):
        weights = []
        for level in features:
            logits = layer.router.fc.weight @ level[0].mean((1, 2)) + layer.router.fc.bias
            best = logits.sort(descending=True)
            chosen = best.values[:2].exp() / best.values[:2].exp().sum()
            weights.append(dict(zip(best.indices[:2].tolist(), chosen.tolist(), strict=True)))
        marks = args[1]
        assert len(marks) == len(expected)
        for mark, instance in zip(marks, expected, strict=True):
            (level,) = (
                number
                for number, found in enumerate(by_level)
                if (
                    ((found.bboxes - instance.bboxes).abs().amax(1) < 1e-3)
                    & ((found.scores - instance.scores).abs() < 1e-5)
                    & (found.labels == instance.labels)
                ).any()
            )
            main = max(weights[level], key=weights[level].get)
            name = NAMES[int(instance.labels)]
            name = name if len(name) < 32 else f'{name[:31]}…'
            assert mark.text == (
                f'{name} {float(instance.scores):.2f} | e{main} {weights[level][main]:.2f}'
            )
            assert mark.expert == main
            np.testing.assert_allclose(mark.box, instance.bboxes[0], atol=1e-3)
            experts.add(main)
    assert len(experts) > 1
    lines = capsys.readouterr().out.splitlines()
    paths = [tmp_path / 'out' / f'photo.one_{name}.png' for name in layers]
    assert lines[-2:] == [str(path) for path in paths]
    for path, (_, figure) in zip(paths, drawn['draw_marks'], strict=True):
        width, height = figure.get_size_inches() * DPI
        assert Image.open(path).size == (int(width), int(height))


def test_one_layer_of_several_images(save, image_file, tmp_path, drawn):
    config, checkpoint, _ = save(detector(backbone=MOE_BACKBONE))
    folder = tmp_path / 'images'
    folder.mkdir()
    Image.open(image_file).convert('L').save(folder / 'grey.JPG')
    (folder / 'notes.txt').write_text('no image')
    layer = 'backbone.layer4'
    run(
        folder,
        image_file,
        image_file,
        config,
        checkpoint,
        '--layer',
        layer,
        '--out',
        tmp_path / 'o',
    )
    names = sorted(path.name for path in (tmp_path / 'o').iterdir())
    assert names == [f'grey_{layer}.png', f'photo.one_2_{layer}.png', f'photo.one_{layer}.png']
    assert [args[0].shape for args, _ in drawn['draw_marks']] == [(HEIGHT, WIDTH, 3)] * 3
    # Colours as in the file.
    np.testing.assert_array_equal(drawn['draw_marks'][1][0][0], np.array(Image.open(image_file)))


def test_coefficients_of_pixels(save, image_file, tmp_path, drawn):
    config = detector('retina')
    path = 'neck.lateral_convs.0.conv'
    experts = [dict(at=path, type='mmdet_moe.CPMuMoE', num_experts=6, rank=4)]
    config['model'].update(type='mmdet_moe.WithExperts', of='SingleStageDetector', experts=experts)
    config, checkpoint, model = save(config)
    run(image_file, config, checkpoint, '--overlay', '--score-thr', '0', '--out', tmp_path / 'o')
    names = sorted(file.name for file in (tmp_path / 'o').iterdir())
    assert names == [f'photo.one_{path}.png', f'photo.one_{path}_routing.png']
    (arguments, _), *_ = drawn['draw_marks']
    assert 'one decision per pixel, coefficients of 6 experts' in arguments[2]
    assert not model.get_submodule(path)._observers


def test_head_without_origins_is_not_guessed(save, image_file, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr('mmdet_moe.analysis.attribution.tracer.origins_of', lambda _: _no_origins())
    config, checkpoint, _ = save(detector())
    run(image_file, config, checkpoint, '--score-thr', 0, '--out', tmp_path)
    for args, figure in drawn['draw_marks']:
        assert len(args[1]) > 5
        assert all(mark.text.endswith('| e?') and mark.expert == -1 for mark in args[1])
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert f'expert unknown: {len(args[1])} detections' in texts


def _no_origins():
    from mmdet_moe.analysis.attribution import Origins

    return Origins()


def test_head_of_rois(image_file, tmp_path, capsys, randomise, drawn):
    model = randomise(build_faster(FOUR)).eval()
    demo = ImageDemo(model, Config(detector()), {}, None, 0.0)
    with demo.tracer, page_style():
        for _ in range(2):
            names = [name for name, _ in demo.draw(image_file, overlay=True)]
    assert names == ['roi_head.bbox_head.shared_fcs']
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith('note: no overlay of roi_head.bbox_head.shared_fcs')
    args, _ = drawn['draw_marks'][0]
    assert len(args[1]) > 5
    assert all(0 <= mark.expert < 4 for mark in args[1])
    assert 'one decision per RoI, 2 of 4 experts' in args[2]


def test_tool(save, image_file, tmp_path, monkeypatch, capsys):
    config, checkpoint, _ = save(detector())
    arguments = [image_file, config, checkpoint, '--out', tmp_path / 'out', '--overlay']
    monkeypatch.setattr(sys, 'argv', ['image_demo.py', *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name='__main__')
    out = capsys.readouterr().out
    for name in ('cls_moe', 'cls_moe_routing', 'reg_moe', 'reg_moe_routing'):
        assert f'photo.one_bbox_head.{name}.png' in out


# Classifier --------------------------------------------------------------------------------------


@torch.no_grad()
def test_where_experts_look(save, image_file, tmp_path, monkeypatch, capsys):
    """A picture for each layer with maps; tokens and a missing captum are named."""
    pytest.importorskip('captum')
    config, checkpoint, _ = save(classifier())
    run(image_file, config, checkpoint, '--out', tmp_path / 'o', '--cam')
    names = {path.name for path in (tmp_path / 'o').iterdir()}
    assert names == {f'photo.one_backbone.layer4{end}.png' for end in ('', '_cam')}
    monkeypatch.setattr('mmdet_moe.analysis.saliency.find_spec', lambda name: None)
    with pytest.raises(SystemExit):
        run(image_file, config, checkpoint, '--out', tmp_path / 'o', '--cam')
    assert "--cam needs captum, which is missing: pip install 'mmdet_moe[cam]'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize('granularity', [('image', 1), ('patch', 2)], ids=lambda g: g[0])
@torch.no_grad()
def test_classifier(granularity, save, image_file, tmp_path, drawn):
    config, checkpoint, model = save(classifier(*granularity))
    run(image_file, config, checkpoint, '--out', tmp_path / 'out', '--overlay')
    inputs = torch.from_numpy(np.array(Image.open(image_file))).permute(2, 0, 1)[None]
    inputs = (inputs - 120.0) / 60.0
    scores = model.head(model.extract_feat(inputs)[0][None]).softmax(1)[0]

    before_stage = []
    layer = model.backbone.layer4
    layer.register_forward_pre_hook(lambda _, args: before_stage.append(args[0]))
    model.extract_feat(inputs)
    (maps,) = before_stage
    fc = layer.router.fc
    if granularity[0] == 'image':
        pooled = [maps[0].mean((1, 2))]
        grid = (1, 1)
    else:
        # 52 × 100 px are 4 × 7 before the stage and 2 × 4 after it, so a patch has 2 × 4 or 2 × 3.
        assert maps.shape[2:] == (4, 7)
        pooled = [maps[0, :, y, x].mean((1, 2)) for y in _halves(2) for x in _halves(4)]
        grid = (2, 2)
    weights = torch.zeros(len(pooled), 3)
    for row, vector in zip(weights, pooled, strict=True):
        best = (fc.weight @ vector + fc.bias).topk(2)
        row[best.indices] = best.values.softmax(0)
    mean = weights.mean(0)
    (((image, marks, _, *_), _),) = drawn['draw_marks']
    (mark,) = marks
    assert mark.box == (0, 0, *image.shape[1::-1])
    main = int(mean.argmax())
    assert mark.expert == main
    label = int(scores.argmax())
    assert mark.text == f'{label} {float(scores[label]):.2f} | e{main} {mean[main]:.2f}'
    (((_, maps, title, _), _),) = drawn['draw_routing']
    (routed,) = maps
    np.testing.assert_allclose(routed.weights.reshape(-1, 3), weights, atol=1e-5)
    assert routed.weights.shape[:2] == grid
    if granularity[0] == 'image':
        first, second = mean.topk(2).indices.tolist()
        assert title.endswith(f'here e{first} {mean[first]:.2f}, e{second} {mean[second]:.2f}')
    else:
        # Stride 32: of 4 columns of 25 px two make a patch.
        np.testing.assert_allclose(routed.x, [0, 50, 100])
        np.testing.assert_allclose(routed.y, [0, 26, 52])


def _halves(middle):
    return slice(0, middle), slice(middle, None)


def test_classifier_of_arrays(save, tmp_path, drawn):
    """A data set without image files has no reader in its pipeline."""
    config = classifier()
    del config['test_dataloader']['dataset']['pipeline'][0]
    path, checkpoint, _ = save(config)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'x.png')
    loaded = ImagePipeline(Config.fromfile(path))(tmp_path / 'x.png')
    np.testing.assert_array_equal(loaded.pixels, pixels)
    np.testing.assert_array_equal(loaded.data['inputs'].permute(1, 2, 0), pixels)
    grey = ImagePipeline(Config.fromfile(path), channels=1)(tmp_path / 'x.png')
    assert grey.data['inputs'].shape == (1, 40, 40)
    assert grey.pixels.shape == (40, 40, 3)
    run(tmp_path / 'x.png', path, checkpoint, '--out', tmp_path / 'out')
    assert len(drawn['draw_marks']) == 1


# Placement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('axis', [0, 1], ids='xy')
@pytest.mark.parametrize(
    'pipeline',
    [
        [],
        [dict(type='mmdet.Resize', scale=(128, 96), keep_ratio=True)],
        [dict(type='mmdet.Resize', scale=(60, 200), keep_ratio=False)],
        [dict(type='mmdet.Resize', scale=(128, 96), keep_ratio=True),
         dict(type='mmdet.Pad', size_divisor=32)],
        [dict(type='ResizeEdge', scale=96, edge='short'), dict(type='CenterCrop', crop_size=80)],
        [dict(type='CenterCrop', crop_size=(40, 31)), dict(type='Resize', scale=(120, 62))],
        [dict(type='CenterCrop', crop_size=64, auto_pad=True)],
    ],
    ids=lambda steps: '-'.join(step['type'] for step in steps) or 'none',
)  # fmt: skip
def test_placement_against_an_image_of_coordinates(pipeline, axis, tmp_path):
    """Every pixel holds its x or y, which the pipeline carries along."""
    init_default_scope('mmpretrain')
    config = Config(classifier(pipeline=pipeline))
    height, width = 52, 90
    ramp = np.arange((width, height)[axis], dtype=np.uint8)
    pixels = np.broadcast_to(ramp[None] if axis == 0 else ramp[:, None], (height, width))
    Image.fromarray(np.repeat(2 * pixels[..., None] + 60, 3, axis=2)).save(tmp_path / 'x.png')
    loaded = ImagePipeline(config)(tmp_path / 'x.png')
    placement = loaded.placement
    values = (loaded.data['inputs'][0].double().numpy() - 60) / 2
    assert loaded.obstacle is None
    content = placement.size
    assert content[0] <= values.shape[1]
    assert content[1] <= values.shape[0]
    values = values[: content[1], : content[0]]
    line = values[len(values) // 2] if axis == 0 else values[:, values.shape[1] // 2]
    # The middle of a pixel, whose number it holds; at the borders resizing has nothing to mix.
    expected = placement.on_image(np.arange(len(line)) + 0.5, axis) - 0.5
    # Whole numbers, which resizing may round down.
    difference = (line - expected)[2:-2]
    assert np.abs(difference).max() <= 0.5
    assert abs(difference.mean()) <= 0.25
    seen = placement.seen(axis)
    assert seen[0] >= 0
    assert seen[1] <= (width, height)[axis]


def test_unknown_transform(save, image_file, tmp_path, capsys):
    steps = [dict(type='EfficientNetCenterCrop', crop_size=40)]
    config, checkpoint, _ = save(classifier(pipeline=steps))
    run(image_file, config, checkpoint, '--out', tmp_path / 'out')
    with pytest.raises(SystemExit):
        run(image_file, config, checkpoint, '--out', tmp_path / 'out', '--overlay')
    assert 'EfficientNetCenterCrop' in capsys.readouterr().err


@pytest.fixture
def rig(monkeypatch):
    """Let the routers of all models decide by the place: expert (row · columns + column) mod E."""

    def forward(self, maps, patches):
        ids, per_level = [], []
        for items in patches:
            ids.append(torch.arange(len(items)) % self.num_experts)
            per_level.append(len(items))
        ids = torch.cat(ids)
        ids = torch.stack([ids, (ids + 1) % self.num_experts], 1)
        weights = torch.tensor([0.75, 0.25]).expand(len(ids), 2)
        logits = torch.zeros(len(ids), self.num_experts).scatter(1, ids, weights)
        return Routing(ids, weights, logits, tuple(per_level), 1, torch.ones(len(ids)))

    monkeypatch.setattr('mmdet_moe.moe.routers.GAPRouter.forward', forward)


@pytest.fixture
def uniform_file(tmp_path):
    """A white image of 100 × 52 px."""
    path = tmp_path / 'white.png'
    Image.fromarray(np.full((HEIGHT, WIDTH, 3), 255, np.uint8)).save(path)
    return path


def check_colour(picture, axes, x, y, expert, weight):
    """A pixel of the picture at a place of the (white) image."""
    column, row = axes.transData.transform((x, y))
    found = picture[picture.shape[0] - 1 - int(row), int(column)] / 255
    grey = (70 + 0.65 * 255) / 255
    share = opacity(weight)
    colour = np.array(matplotlib.colors.to_rgb(expert_colour(expert)))
    np.testing.assert_allclose(found, share * colour + (1 - share) * grey, atol=0.01)


def test_cells_lie_where_they_belong(save, uniform_file, tmp_path, drawn, rig):
    """The 67 rows of the image are padded to 96, of which the last of 4 patches sees nothing."""
    neck = {**MOE_NECK, 'grid_size': 4, 'moe_levels': (0,), 'num_experts': 5}
    config, checkpoint, _ = save(detector('retina', neck=neck))
    run(uniform_file, config, checkpoint, '--overlay', '--out', tmp_path / 'out')
    (((_, (routed,), *_), figure),) = drawn['draw_routing']
    # 16 × 12 px of the finest level: 32 × 24 px of the network; 128 / 100 and 67 / 52 px per px.
    x = np.array([0, 32, 64, 96, 128]) / 1.28
    y = np.array([0, 24, 48, 72, 96]) * 52 / 67
    np.testing.assert_allclose(routed.x, x, atol=1e-4)
    np.testing.assert_allclose(routed.y, y, atol=1e-4)
    (mesh,) = figure.findobj(QuadMesh)
    assert mesh.get_coordinates().shape == (4, 5, 2)  # three rows of cells
    assert mesh.get_coordinates()[-1, 0, 1] == HEIGHT
    (axes,) = figure.axes
    with page_style():
        picture = to_rgb(figure, DPI)
    saved = np.array(Image.open(tmp_path / 'out' / 'white_neck.fpn_convs.0_routing.png'))
    np.testing.assert_array_equal(saved[..., :3], picture)
    for row in range(3):
        bottom = min(y[row + 1], HEIGHT)
        for column in range(4):
            expert = (4 * row + column) % 5
            left, right = x[column] + 0.6, x[column + 1] - 0.6
            for place in ((left, y[row] + 0.6), (right, y[row] + 0.6), (left, bottom - 0.6),
                          (right, bottom - 0.6)):  # fmt: skip
                check_colour(picture, axes, *place, expert, 0.75)
    # Every cell has its number, and the legend counts those that are seen.
    texts = [text.get_text() for text in figure.findobj(Text)]
    for expert, count in zip(range(5), (3, 3, 2, 2, 2), strict=True):
        assert texts.count(f'e{expert} 0.75') == count
        assert f'expert {expert}: {count} cells' in texts
    # A white margin around the image.
    box = axes.get_window_extent()
    row = picture.shape[0] - 1 - int((box.y0 + box.y1) / 2)
    assert (picture[row, int(box.x0) - 2] == 255).all()
    assert (picture[row, int(box.x1) + 2] == 255).all()


def test_cells_of_a_crop(save, uniform_file, tmp_path, drawn, rig):
    """What the network does not see stays grey."""
    steps = [dict(type='CenterCrop', crop_size=(64, 32))]
    config, checkpoint, _ = save(classifier('patch', 2, steps))
    run(uniform_file, config, checkpoint, '--overlay', '--out', tmp_path / 'out')
    (((_, _, _, seen), figure),) = drawn['draw_routing']
    assert seen == (18, 10, 82, 42)
    with page_style():
        picture = to_rgb(figure, DPI)
    (axes,) = figure.axes
    # 64 × 32 px are 2 × 1 pixels after the stage.
    for place, expert in (((20, 12), 0), ((48, 40), 0), ((52, 12), 1), ((80, 40), 1)):
        check_colour(picture, axes, *place, expert, 0.75)
    for place in ((10, 25), (90, 25), (50, 5), (50, 48)):
        column, row = axes.transData.transform(place)
        pixel = picture[picture.shape[0] - 1 - int(row), int(column)]
        np.testing.assert_allclose(pixel, 70 + 0.65 * 255, atol=2)


def test_one_panel_per_map(save, image_file, tmp_path, drawn):
    config, checkpoint, _ = save(detector())
    run(image_file, config, checkpoint, '--overlay', '--out', tmp_path, '--layer',
        'bbox_head.cls_moe')  # fmt: skip
    (((_, maps, *_), figure),) = drawn['draw_routing']
    assert len(maps) == len(figure.axes) == 3
    titles = [axes.get_title(loc='left') for axes in figure.axes]
    for i, routed in enumerate(maps):
        assert titles[i] == f'level {i}: {mixture(routed.weights[0, 0])}'
    boxes = [axes.get_window_extent().extents for axes in figure.axes]
    for i, first in enumerate(boxes):
        for second in boxes[:i]:
            assert not overlap(first, second)


def test_numbers_in_areas_of_small_cells():
    """Too small for a number each, but alike: one number per area, inside it."""
    weights = np.zeros((80, 80, 3))
    weights[:, :30, 0] = weights[:, 30:, 2] = 1
    weights[40, 60] = [0, 1, 0]  # alone
    borders = np.linspace(0, 80, 81)
    with page_style():
        figure = draw_routing(
            np.zeros((80, 80, 3), np.uint8), [RoutedMap('', borders, borders, weights)], 'x',
            (0, 0, 80, 80),
        )  # fmt: skip
        (axes,) = figure.axes
        places = {text.get_text(): text.get_position() for text in axes.texts}
        assert set(places) == {'0', '2'}
        to_rgb(figure, DPI)
        for text in axes.texts:
            box = text.get_window_extent().transformed(axes.transData.inverted())
            low, high = (0, 30) if text.get_text() == '0' else (30, 80)
            assert low <= box.x0 < box.x1 <= high


# Labels ------------------------------------------------------------------------------------------


def overlap(first, second):
    return (
        min(first[2], second[2]) - max(first[0], second[0]) > 0.5
        and min(first[3], second[3]) - max(first[1], second[1]) > 0.5
    )


@pytest.mark.parametrize('size', [(128, 128), (128, 96), (800, 1333), (60, 400), (3000, 2000)],
                         ids=str)  # fmt: skip
def test_labels_can_be_read(size):
    """At the borders, too: whole, in one size of letters, and not on top of each other."""
    height, width = size
    long = 'traffic light with a long na… 0.95 | e63 0.51'
    corners = [(0, 0), (0.9, 0), (0, 0.9), (0.9, 0.9), (0.4, 0.4), (0.41, 0.41), (0, 0.5)]
    marks = [
        Mark((x * width, y * height, (x + 0.1) * width, (y + 0.1) * height), long, 9 * i)
        for i, (x, y) in enumerate(corners)
    ]
    with page_style():
        figure = draw_marks(np.zeros((height, width, 3), np.uint8), marks, 'title', 64, 'things')
        to_rgb(figure, DPI)
        (axes,) = figure.axes
        boxes = [text.get_window_extent().extents for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [long] * len(marks)
    page = figure.bbox.extents
    for i, box in enumerate(boxes):
        assert page[0] <= box[0] < box[2] <= page[2]
        assert page[1] <= box[1] < box[3] <= page[3]
        assert box[3] - box[1] >= 10
        assert not any(overlap(box, other) for other in boxes[:i])
    image = axes.get_window_extent()
    assert 959 <= max(image.width, image.height) <= 1601
    for text in (*figure.texts, *figure.legends[0].get_texts()):
        box = text.get_window_extent().extents
        assert page[0] <= box[0] < box[2] <= page[2]
        assert page[1] <= box[1] < box[3] <= page[3]
    assert image.width / image.height == pytest.approx(width / height, rel=0.01)


def test_many_labels_on_one_spot_do_not_hide_each_other():
    boxes = np.array([[480, 300, 520, 330]] * 20, float) + np.arange(20)[:, None] % 4
    sizes = [(90, 18)] * 20
    placed = place_labels(boxes, sizes, (0, 0, 1000, 600))
    rectangles = [(x, y, x + 90, y + 18) for x, y in placed]
    for i, rectangle in enumerate(rectangles):
        assert not any(overlap(rectangle, other) for other in rectangles[:i])
        assert rectangle[0] >= 0
        assert rectangle[1] >= 0
        assert rectangle[2] <= 1000
        assert rectangle[3] <= 600


def test_legend_of_many_experts():
    marks = [Mark((10, 10, 20, 20), 'x', e) for e in (3, 3, 70, 200)]
    with page_style():
        figure = draw_marks(np.zeros((64, 64, 3), np.uint8), marks, 'title', 256, 'detections')
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ['expert 3: 2 detections', 'expert 70: 1 detection', 'expert 200: 1 detection']


def luminance(colour):
    """WCAG 2.1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def test_colours():
    colours = expert_colours()
    assert colours[:2] == ['#e69f00', '#56b4e9']
    assert len(set(colours)) == len(colours) == 64
    assert expert_colour(64) == colours[0]
    # A third of the way from orange to black: 0.6 · (230, 159, 0).
    assert colours[8] == '#8a5f00'
    for colour in colours:
        light = luminance(colour) + 0.05
        contrast = light / 0.05 if text_on(colour) == 'black' else 1.05 / light
        assert contrast >= 4.5


# Names and mistakes ------------------------------------------------------------------------------


def test_names_are_distinct():
    paths = [Path(p) for p in ('a/1.png', 'b/1.png', 'b/1.jpg', 'c/1_2.png', 'c/x.y.png')]
    assert distinct_names(paths) == ['1', '1_3', '1_4', '1_2', 'x.y']


def test_images_of_folders(tmp_path):
    for name in ('b.png', 'a.JPG', 'c.txt'):
        (tmp_path / name).touch()
    assert [p.name for p in find_images([tmp_path, tmp_path / 'c.txt'])] == [
        'a.JPG', 'b.png', 'c.txt',
    ]  # fmt: skip


def test_mixture():
    assert mixture(np.array([0.19, 0, 0.81])) == 'e2 0.81, e0 0.19'
    assert mixture(np.full(6, 1 / 6)) == 'e0 0.17, e1 0.17, e2 0.17, e3 0.17, …'


def mistake(capsys, *arguments):
    """The one sentence that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    (line,) = lines
    return line.removeprefix('error: ')


def test_mistakes_are_one_sentence(save, image_file, tmp_path, capsys):
    config, checkpoint, _ = save(detector())
    good = (image_file, config, checkpoint)
    out = ('--out', tmp_path / 'out')
    assert mistake(capsys, tmp_path / 'no.png', config, checkpoint).startswith('there is no image')
    (tmp_path / 'empty').mkdir()
    assert 'holds no image' in mistake(capsys, tmp_path / 'empty', config, checkpoint)
    damaged = tmp_path / 'damaged.png'
    damaged.write_text('no image at all')
    sentence = mistake(capsys, damaged, config, checkpoint, *out)
    assert sentence == f"cannot read the image '{damaged}': the file is damaged or no image"
    damaged.write_bytes(b'')
    assert 'cannot read the image' in mistake(capsys, damaged, config, checkpoint, *out)
    assert 'there is no file' in mistake(capsys, image_file, config, tmp_path / 'no.pth')
    assert 'no config file' in mistake(capsys, image_file, tmp_path / 'no.py', checkpoint)
    sentence = mistake(capsys, *good, '--layer', 'bbox_head.moe')
    assert sentence == (
        "--layer: there is no layer of experts 'bbox_head.moe'; choose bbox_head.cls_moe or "
        'bbox_head.reg_moe'
    )
    assert '--score-thr' in mistake(capsys, *good, '--score-thr', '1.5')
    assert '--out' in mistake(capsys, *good, '--out', image_file)
    assert '--device' in mistake(capsys, *good, '--device', 'cuda:77')


def test_model_and_checkpoint_have_to_fit(save, image_file, capsys):
    config, checkpoint, _ = save(detector())
    dense, dense_checkpoint, _ = save(detector('retina'), 'dense')
    assert 'neither an MoE nor a μMoE layer' in mistake(capsys, image_file, dense, dense_checkpoint)
    assert 'dense model' in mistake(capsys, image_file, config, dense_checkpoint)
    larger = detector()
    larger['model']['bbox_head']['num_experts'] = 5
    larger, *_ = save(larger, 'larger')
    sentence = mistake(capsys, image_file, larger, checkpoint)
    assert 'give the config that it was trained with' in sentence
    without = detector()
    del without['test_dataloader']
    without, *_ = save(without, 'without')
    assert 'test_dataloader' in mistake(capsys, image_file, without, checkpoint)


def test_fixed_choice_of_names():
    assert drawing.UNKNOWN == -1
    with pytest.raises(ConfigError, match='choose a, b or c'):
        command._chosen(['a', 'b', 'c'], ['d'])
    assert command._chosen(['head.x', 'backbone.y'], None) == ['head.x']
    assert command._chosen(['neck.x', 'backbone.y'], None) == ['neck.x', 'backbone.y']
