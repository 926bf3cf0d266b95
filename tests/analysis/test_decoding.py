"""Boxes in exported files: the heads' own decoding in a form that exports, against the toolbox."""

from functools import partial

import pytest
import torch
from mmengine.config import ConfigDict
from tiny_models import HEADS, STRIDES, build_faster, build_single, place
from torch import nn
from torch.nn import functional as F

from mmdet_moe.analysis import deployment
from mmdet_moe.analysis.decoding import OUTPUTS, Detector, difference
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import find_moe_layers

TOLERANCE = {'rtol': 1e-4, 'atol': 1e-4}
#: Where files have experts: few, so that writing one takes seconds.
EXPERTS = {'retina': ('backbone.conv', 3), 'yolox': ('bbox_head.multi_level_cls_convs.1', 6)}
DENSE = [name for name in HEADS if name != 'yolov3']


class Pyramid(nn.Module):
    """As many maps, and channels of them, as the heads want, without the cost of a backbone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)

    def forward(self, images):
        return tuple(F.avg_pool2d(self.conv(images / 100), stride) for stride in STRIDES)


def detector(head, **test_cfg):
    """Without biases: a black image has scores of 0.5, a coloured one has others."""
    model = build_single(head, train_cfg=False, **{'score_thr': 0.55, **test_cfg})
    model.backbone, model.neck = Pyramid(), None
    if head in EXPERTS:
        path, channels = EXPERTS[head]
        place(model, path, in_channels=channels)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 1.4 * parameter[0].numel() ** -0.5)
        elif name.endswith('bias'):
            nn.init.zeros_(parameter)
    for layer in find_moe_layers(model).values():
        nn.init.normal_(layer.router.fc.weight, 0, 30)
    return Detector(model).eval()


def images(count=6, *sizes):
    """Of all colours, which send them to different experts."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        size = (1, 3, *(sizes[i % len(sizes)] if sizes else (64, 96)))
        colour = torch.rand(1, 3, 1, 1, generator=generator)
        yield 255 * (0.6 * colour + 0.4 * torch.rand(size, generator=generator))


@torch.no_grad()
def assert_same(network, count=6):
    number = 0
    for image in images(count):
        expected = network.expected(image)
        for y, found in zip(expected, network(image), strict=True):
            torch.testing.assert_close(found, y, **TOLERANCE)
        number += len(expected[0])
    return number


@pytest.mark.parametrize('head', DENSE)
def test_detections_are_the_toolboxes(head):
    assert assert_same(detector(head)) > 20


@pytest.mark.parametrize(
    'test_cfg',
    [
        {'min_bbox_size': 25},
        {'max_per_img': 3},
        {'nms_pre': 5},
        {'score_thr': 0.0},
        {'nms': {'type': 'nms', 'iou_threshold': 0.2, 'class_agnostic': True}},
    ],
    ids=lambda test_cfg: next(iter(test_cfg)),
)
def test_of_the_test_cfg_all_counts(test_cfg):
    assert assert_same(detector('moe retina', **test_cfg), 3) > 0


@pytest.mark.parametrize('head', EXPERTS)
@torch.no_grad()
def test_a_file_detects_what_the_toolbox_does(head, tmp_path):
    """RetinaNet's of any size; images with different experts, and one in which nothing is found."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    network, sizes = detector(head), [(64, 96)]
    free = {}
    if head == 'retina':
        free, sizes = {2: 'height', 3: 'width'}, [(64, 96), (96, 64), (128, 128)]
    chosen = {}

    def note(name, routing, _):
        groups = routing.expert_ids.sort(1).values.tolist()
        chosen.setdefault(name, set()).update(map(tuple, groups))

    path = tmp_path / 'model.onnx'
    part = deployment.Part(network, path, 'images', OUTPUTS, free, lambda image: image)
    deployment._write(part, torch.zeros(1, 3, *sizes[0]), {})
    session = onnxruntime.InferenceSession(path)
    for name, layer in find_moe_layers(network.model).items():
        layer.observe(partial(note, name))
    for image in [*images(6, *sizes), torch.zeros(1, 3, *sizes[0])]:
        expected = network.expected(image)
        found = [torch.from_numpy(y) for y in session.run(None, {'images': image.numpy()})]
        for y, z in zip(expected, found, strict=True):
            torch.testing.assert_close(z, y, **TOLERANCE)
        assert (len(found[0]) == 0) == (not image.any())
    assert chosen
    assert all(len(groups) > 1 for groups in chosen.values())


class Classifier(nn.Module):
    """No detector."""


def with_votes():
    """As PAA's head: what NMS leaves is changed."""
    model = build_single('retina', train_cfg=False)
    own = {'_bbox_post_process': lambda self, results, **rest: results}
    model.bbox_head.__class__ = type('Voting', (type(model.bbox_head),), own)
    return model


def with_softer_nms():
    return build_single('retina', train_cfg=False, nms={'type': 'soft_nms', 'iou_threshold': 0.5})


@pytest.mark.parametrize(
    ('build', 'reason'),
    [
        (Classifier, r'--boxes is for detectors, and Classifier is none'),
        (
            build_faster,
            r'for detectors of one stage .* which FasterRCNN does not; export it without',
        ),
        (with_votes, 'which SingleStageDetector, with its Voting, does not'),
        (with_softer_nms, r"plain NMS, not model.test_cfg.nms={'type': 'soft_nms'.*; set it to"),
    ],
)
def test_what_decodes_otherwise_is_refused(build, reason):
    with pytest.raises(ConfigError, match=reason):
        deployment._network(build(), boxes=True)


def test_difference():
    """A swapped order is none, a lost detection is; the last one of a full list may be another."""
    head = nn.Module()
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 70], [5, 5, 20, 20]])
    scores, labels = torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0, 1, 1])
    expected = (boxes, scores, labels)

    def by(order, limit=100, moved=0.0):
        head.test_cfg = ConfigDict(score_thr=0.05, max_per_img=limit)
        found = [values[order] for values in expected]
        found[0] = found[0] + moved
        return difference(head, expected, found, 1e-4)

    assert by([2, 0, 1]) == 0
    assert by([0, 1]) > 1
    assert by([2]) == float('inf')
    assert by([]) == float('inf')
    assert by([0, 1], limit=3) == 0
    assert by([0, 1, 2], moved=1.0) == pytest.approx(1)
    assert by([0, 1, 2], moved=float('nan')) == float('inf')
    expected = (boxes, scores, torch.tensor([0, 1, 0]))
    assert difference(head, expected, [boxes, scores, labels], 1e-4) > 0.5
