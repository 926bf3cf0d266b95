"""The whole tool on tiny models, whose files onnxruntime runs; and one that computes otherwise."""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

import mmdet_moe
from mmdet_moe import cli
from mmdet_moe.analysis import deployment
from mmdet_moe.analysis.data import AnalysisData, drawn
from mmdet_moe.analysis.deployment import export_model, parse, run_export
from mmdet_moe.analysis.models import build_model
from mmdet_moe.moe import find_moe_layers

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
ROOT = Path(mmdet_moe.__file__).parents[1]
NETWORK = """
    backbone=dict(base_channels=4, stem_channels=4),
    neck=dict(in_channels=[4, 8, 16, 32], out_channels=8),
"""
HEAD = """
    in_channels=8, feat_channels=8, stacked_convs=1, norm_cfg=dict(type='GN', num_groups=2),
"""
LOADER = """
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
load_from = None
"""
#: Experts in the head; in neck and backbone, the latter for patches, and a μMoE; of regions; of a
#: classifier.
MODELS = {
    'head': f"""
_base_ = '{ROOT}/configs/demo/retinanet_moe_soft_digits.py'
model = dict({NETWORK} bbox_head=dict(num_experts=3, {HEAD}))
{LOADER}""",
    'elsewhere': f"""
_base_ = ['{ROOT}/configs/demo/retinanet_dense_digits.py',
          '{ROOT}/configs/_base_/balancing/soft_importance.py']
model = dict(
    type='mmdet_moe.WithExperts', of='RetinaNet', router={{{{_base_.router}}}},
    experts={{
        'backbone.layer4': dict(num_experts=3, top_k=2, granularity='patch', grid_size=2),
        'neck.fpn_convs.0': dict(num_experts=3, top_k=2),
        'neck.lateral_convs.1': dict(type='mmdet_moe.CPMuMoE', num_experts=4, rank=4),
    }}, {NETWORK} bbox_head=dict({HEAD}),
)
{LOADER}""",
    'regions': f"""
_base_ = [
    '{ROOT}/configs/_base_/demo_runtime.py',
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '{ROOT}/configs/_base_/datasets/digit_scenes.py',
    '{ROOT}/configs/_base_/schedules/demo.py',
]
model = dict(
    backbone=dict(depth=18, base_channels=4, stem_channels=4, frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[4, 8, 16, 32], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(
            type='mmdet_moe.MoEShared2FCBBoxHead', num_experts=4, top_k=2,
            in_channels=8, fc_out_channels=16, num_classes=10,
        ),
    ),
)
{LOADER}""",
    'classifier': """
default_scope = 'mmpretrain'
data_root = 'DATA'
val_dataloader = test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=data_root,
                 pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]),
)
val_evaluator = test_evaluator = dict(type='Accuracy')
val_cfg = test_cfg = dict()
data_preprocessor = dict(mean=[127.5] * 3, std=[64.0] * 3, to_rgb=True)
model = dict(
    type='mmdet_moe.WithExperts', of='ImageClassifier',
    experts=[dict(at='backbone.layer4', num_experts=4, top_k=2)],
    backbone=dict(type='ResNet_CIFAR', depth=18, stem_channels=4, base_channels=4),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=32),
)
""",
}


class Tool:
    """A model whose routers send images to different experts, and its checkpoint."""

    def __init__(self, folder, name, data_root):
        self.folder, self.config = folder, folder / 'tiny.py'
        self.config.write_text(MODELS[name])
        self.checkpoint = folder / 'tiny.pth'
        self.options = ['--cfg-options', f'data_root={data_root}']
        self.cfg = cli.load_config(str(self.config), {'data_root': str(data_root)})
        init_default_scope(self.cfg.default_scope)
        torch.manual_seed(0)
        self.model = build_model(self.cfg)
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
        for layer in find_moe_layers(self.model).values():
            torch.nn.init.normal_(layer.router.fc.weight, 0, 30)
        self.save()

    def save(self):
        torch.save({'state_dict': self.model.state_dict(), 'meta': {}}, self.checkpoint)

    @torch.no_grad()
    def centre(self):
        """Let the routers go by what the images do not have in common."""
        layers, logits = find_moe_layers(self.model.eval()).values(), defaultdict(list)
        for batch in AnalysisData(self.cfg, 'val').batches():
            self.model(**self.model.data_preprocessor(batch, False), mode='tensor')
            for layer in layers:
                logits[layer].append(layer.routing.logits)
        for layer in layers:
            layer.router.fc.bias -= torch.cat(logits[layer]).mean(0)
        self.save()

    def argv(self, *more):
        out = str(self.folder / 'new' / 'model.onnx')
        return [
            str(self.config), str(self.checkpoint), '--out', out, '--overwrite', *more,
            *self.options,
        ]  # fmt: skip


@pytest.fixture(scope='module')
def head(tmp_path_factory, digit_scenes_folder):
    return Tool(tmp_path_factory.mktemp('head'), 'head', digit_scenes_folder)


def test_head(head, capsys):
    """What it says; and the file gives what the model itself makes of the loader's images."""
    tool = head
    assert export_model(parse(tool.argv('--verify', '4', '--time')))
    printed = capsys.readouterr().out
    outputs = [f'{name}_{i}' for name in ('cls_scores', 'bbox_preds') for i in range(5)]
    assert f'model.onnx: images -> {", ".join(outputs)}' in printed
    assert 'onnxruntime equals PyTorch on 4 images: largest difference ' in printed
    assert 'bbox_head.cls_moe 3 of 3' in printed
    assert 'CPU time for an image, one thread, median of 4: PyTorch (chosen experts) ' in printed

    file = str(tool.folder / 'new' / 'model.onnx')
    about = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert json.loads(about['in_the_graph']) == {
        'mean': [123.675, 116.28, 103.53], 'std': [58.395, 57.12, 57.375], 'swap_channels': True
    }  # fmt: skip
    session = onnxruntime.InferenceSession(file)
    batch = next(AnalysisData(tool.cfg, 'val').batches())
    inputs = tool.model.eval().data_preprocessor(batch, False)['inputs'][:1]
    with torch.no_grad():
        expected = [y for maps in tool.model(inputs, mode='tensor') for y in maps]
    found = session.run(None, {'images': batch['inputs'][0][None].float().numpy()})
    for y, z in zip(expected, found, strict=True):
        np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match='index: 1 Got: 4 Expected: 3'):
        session.run(None, {'images': np.zeros((1, 4, *inputs.shape[2:]), np.float32)})


def test_what_differs_is_told(head, monkeypatch, capsys):
    """The file is that of other weights."""
    if not (head.folder / 'new' / 'model.onnx').exists():  # or test_head has written it
        assert export_model(parse(head.argv()))
    content = torch.load(head.checkpoint, weights_only=False)
    content['state_dict']['bbox_head.cls_moe.experts.2.retina_cls.weight'].mul_(1.01)
    changed = head.folder / 'changed.pth'
    torch.save(content, changed)
    monkeypatch.setattr(deployment, '_write', lambda *_: None)
    argv = head.argv('--verify', '4')
    argv[1] = str(changed)
    with pytest.raises(SystemExit) as status:
        run_export(argv)
    assert status.value.code == 1
    assert 'onnxruntime DIFFERS FROM PyTorch on 4 images' in capsys.readouterr().out


@pytest.mark.sweep(keep=0)  # takes long
def test_elsewhere(tmp_path, digit_scenes_folder, capsys):
    """In backbone and neck, for patches, and a μMoE."""
    tool = Tool(tmp_path, 'elsewhere', digit_scenes_folder)
    assert export_model(parse(tool.argv('--verify', '4')))
    printed = capsys.readouterr().out
    assert 'onnxruntime equals PyTorch on 4 images' in printed
    assert re.search(r'backbone\.layer4 [123] of 3, neck\.fpn_convs\.0 [123] of 3$', printed, re.M)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """20 images of as many colours, in two classes."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for i in range(20):
        (folder / 'ab'[i % 2]).mkdir(exist_ok=True)
        colour = rng.integers(0, 256, (1, 1, 3))
        pixels = (colour + rng.integers(-30, 30, (32, 32, 3))).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / 'ab'[i % 2] / f'{i}.png'), pixels)
    return folder


def test_classifier_on_images_that_choose_differently(tmp_path, pictures, capsys):
    """As many as the tool verifies by default, between which all experts are chosen."""
    tool = Tool(tmp_path, 'classifier', pictures)
    tool.centre()
    assert export_model(parse(tool.argv()))
    printed = capsys.readouterr().out
    assert 'model.onnx: images -> scores' in printed
    assert 'onnxruntime equals PyTorch on 20 images' in printed
    assert printed.endswith('backbone.layer4 4 of 4\n')

    session = onnxruntime.InferenceSession(str(tool.folder / 'new' / 'model.onnx'))
    (layer,) = find_moe_layers(tool.model.eval()).values()
    decisions, seen = set(), 0
    for batch in AnalysisData(tool.cfg, 'val').batches():
        for image in batch['inputs']:
            inputs = tool.model.data_preprocessor({'inputs': [image]}, False)['inputs']
            with torch.no_grad():
                expected = tool.model(inputs, mode='tensor')
            (found,) = session.run(None, {'images': image[None].float().numpy()})
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
            decisions.add(frozenset(layer.routing.expert_ids.flatten().tolist()))
            seen += 1
    assert seen == 20
    assert len(decisions) > 2
    assert frozenset.union(*decisions) == {0, 1, 2, 3}


def test_grey_images(tmp_path, pictures, capsys, monkeypatch):
    """One channel, as the loader gives it; without any image, as is normalised."""
    text = MODELS['classifier'].replace('[127.5] * 3, std=[64.0] * 3', '[127.5], std=[64.0]')
    text = text.replace("'LoadImageFromFile'", "'LoadImageFromFile', color_type='grayscale'")
    text = text.replace('to_rgb=True', 'to_rgb=False').replace(
        'depth=18,', 'depth=18, in_channels=1,'
    )
    monkeypatch.setitem(MODELS, 'grey', text)
    tool = Tool(tmp_path, 'grey', pictures)
    for more in (['--verify', '2'], ['--verify', '0', '--size', '32', '32']):
        assert export_model(parse(tool.argv(*more)))
        session = onnxruntime.InferenceSession(str(tool.folder / 'new' / 'model.onnx'))
        assert session.get_inputs()[0].shape == [1, 1, 32, 32]
    assert 'onnxruntime equals PyTorch on 2 images' in capsys.readouterr().out


def test_experts_for_regions(tmp_path, digit_scenes_folder, capsys, monkeypatch):
    """Two files: up to the proposals, and from the features of regions on."""
    tool = Tool(tmp_path, 'regions', digit_scenes_folder)
    tool.centre()
    images, taken = deployment._images, []
    monkeypatch.setattr(
        deployment, '_images', lambda data, chosen: taken.extend(chosen) or images(data, chosen)
    )
    assert export_model(parse(tool.argv('--verify', '2')))
    assert taken == [0, *drawn(8, 2)]
    printed = capsys.readouterr().out
    names = [f'{n}_{i}' for n in ('features', 'rpn_cls_scores', 'rpn_bbox_preds') for i in range(5)]
    assert f'model.onnx: images -> {", ".join(names)}' in printed
    assert 'model_regions.onnx: regions -> cls_score, bbox_pred' in printed
    assert 'onnxruntime equals PyTorch on 2 images' in printed
    assert printed.endswith('roi_head.bbox_head.shared_fcs 4 of 4\n')

    model = tool.model.eval()
    batch = next(AnalysisData(tool.cfg, 'val').batches())
    inputs = model.data_preprocessor(batch, False)['inputs'][:1]
    corners = torch.rand(30, 2, 2).sort(1).values.flatten(1) * inputs.shape[-1]
    with torch.no_grad():
        features = model.extract_feat(inputs)
        boxes = torch.cat([torch.zeros(30, 1), corners], 1)
        regions = model.roi_head.bbox_roi_extractor(features[:4], boxes)
        scores, boxes = model.rpn_head(features)
        expected = [*features, *scores, *boxes], model.roi_head.bbox_head(regions)
    assert (model.roi_head.bbox_head.shared_fcs.routing.load() > 0).all()
    given = {'images': batch['inputs'][0][None].float(), 'regions': regions}
    for (name, x), wanted in zip(given.items(), expected, strict=True):
        file = 'model.onnx' if name == 'images' else 'model_regions.onnx'
        found = onnxruntime.InferenceSession(str(tmp_path / 'new' / file)).run(
            None, {name: x.numpy()}
        )
        for y, z in zip(wanted, found, strict=True):
            np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4)


@pytest.mark.sweep(keep=0)  # takes long
def test_any_size(head, capsys):
    assert export_model(parse(head.argv('--verify', '4', '--dynamic')))
    assert 'onnxruntime equals PyTorch on 4 images' in capsys.readouterr().out


@pytest.mark.sweep(keep=0)  # takes long
def test_boxes(head, capsys):
    """The file says of itself how the boxes were chosen; what it gives is tested with the heads."""
    assert export_model(parse(head.argv('--verify', '2', '--boxes')))
    printed = capsys.readouterr().out
    assert 'model.onnx: images -> boxes, scores, labels' in printed
    assert 'onnxruntime equals PyTorch on 2 images: largest difference' in printed
    about = {p.key: p.value for p in onnx.load(head.folder / 'new' / 'model.onnx').metadata_props}
    assert about['outputs'].startswith('boxes (n, 4) float32: x1 y1 x2 y2 in pixels')
    assert json.loads(about['test_cfg'])['nms'] == {'type': 'nms', 'iou_threshold': 0.5}


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--out', 'model.pth'], r"--out must end in .onnx, got 'model.pth'"),
        (['--out', 'no/where.onnx', '--size', '0', '8'], r'--size=\[0, 8\] must be two numbers'),
        (['--out', 'a.onnx', '--verify', '-1'], '--verify=-1 must be at least 0'),
        (['--out', 'a.onnx', '--verify', '0', '--time'], '--time needs images to compute'),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit) as status:
        run_export(['config.py', 'checkpoint.pth', *argv])
    assert status.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize('shared', [None, torch.nn.Conv2d(4, 4, 2)])
def test_second_stage(shared):
    """What stands between RoIAlign and the box head is part of it."""
    head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    head.forward, plain = lambda x: (torch.nn.Sequential.forward(head, x), None), head.forward
    model = SimpleNamespace(roi_head=SimpleNamespace(bbox_head=head, shared_head=shared))
    regions = torch.randn(5, 4, 7, 7)
    (found,) = deployment.SecondStage(model)(regions)
    assert torch.equal(found, plain(regions if shared is None else shared(regions)))


def test_size_and_files():
    """The size is that of the model's own batches; even one image tests another size."""
    assert deployment._filled_up((50, 64), SimpleNamespace(pad_size_divisor=32)) == [64, 64]
    assert deployment._filled_up((50, 64), torch.nn.Identity()) == [50, 64]
    for free, number in (((0, 2, 3), 2), ((2, 3), 1)):
        free = dict.fromkeys(free, 'any')
        (batch,) = deployment._batches([torch.ones(3, 64, 64)], (64, 128), free)
        assert batch.shape == (number, 3, 32, 64)


def test_without_the_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(SystemExit):
        run_export(['config.py', 'checkpoint.pth', '--out', 'a.onnx'])
    message = "an export needs onnxscript, which is missing: pip install 'mmdet_moe[onnx]'"
    assert message in capsys.readouterr().err
