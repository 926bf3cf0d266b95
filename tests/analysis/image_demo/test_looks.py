"""Pictures of where experts look: what is looked at, and where it lies."""

import numpy as np
import pytest
import torch
from tiny_models import MOE_NECK, SCALES, SIZES, build_faster, build_single, make_batch

from mmdet_moe.analysis.attribution import Tracer
from mmdet_moe.analysis.image_demo import looks as module
from mmdet_moe.analysis.image_demo.drawing import page_style
from mmdet_moe.analysis.image_demo.looks import (
    MAX_LOOKS,
    draw_looks,
    find_looks,
    network_picture,
)
from mmdet_moe.drawing import to_rgb

LAYER = 'bbox_head.cls_moe'


@pytest.fixture
def traced(randomise):
    """A tracer that has predicted the third image, and what it was given and found."""
    model = randomise(build_single('moe retina', neck=MOE_NECK)).eval()
    batch = {key: value[2:] for key, value in make_batch().items()}
    data = model.data_preprocessor(batch, False)
    with Tracer(model) as tracer:
        (result,) = tracer.predict(data, preprocessed=True)
        yield tracer, data, result


def test_main_experts_of_the_best_detections(traced):
    tracer, _, result = traced
    found = find_looks(tracer, LAYER, result, 0.0, str)
    assert len(found) == MAX_LOOKS
    instances = result.pred_instances
    order = instances.scores.argsort(descending=True, stable=True)[:MAX_LOOKS].tolist()
    assert [look.target.result for look in found] == order
    places = tracer.detection_places(0, instances)
    weights = tracer.decisions(LAYER, 1).weights[tracer.items(LAYER, places)][order]
    assert [look.target.expert for look in found] == weights.argmax(1).tolist()
    assert [look.target.map for look in found] == places.level[order].tolist()
    # In px of the network's input, whose x and y have other scales.
    boxes = instances.bboxes[order] * torch.tensor(SCALES[2] * 2)
    np.testing.assert_allclose([look.box for look in found], boxes, rtol=1e-5)
    main, share = found[0].target.expert, float(weights[0].max())
    assert found[0].text.split(' | ') == [
        f'{int(instances.labels[order[0]])} {instances.scores[order[0]]:.2f}',
        f'e{main} {share:.2f}', f'level {int(places.level[order[0]])}',
    ]  # fmt: skip
    high = float(instances.scores[order[1]])
    assert len(find_looks(tracer, LAYER, result, high, str)) == 2


def test_heat_lies_where_the_map_does(traced, monkeypatch):
    """A map with one bright cell: the brightest pixels of the panel are those of the cell."""
    tracer, data, result = traced
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 5
    monkeypatch.setattr(module, 'expert_cam', lambda *args: (heat, 'score'))
    (first, *_) = find_looks(tracer, LAYER, result, 0.0, str)
    with page_style():
        figure = draw_looks(tracer.model, data, tracer, LAYER, [first], 'title')
        (axes,) = figure.axes
        (patch,) = axes.patches
        assert patch.get_bbox().extents == pytest.approx(first.box)
        patch.set_visible(False)
        picture = to_rgb(figure, 100)[::-1].astype(float)  # from the bottom, as Matplotlib counts
    assert axes.get_xlim() == (0, SIZES[2][1])
    height, width = data['inputs'].shape[-2:]
    corners = axes.transData.transform(
        [(2 * width / 4, height / 4), (3 * width / 4, 2 * height / 4)]
    )
    panel = axes.get_window_extent()
    warm = picture[..., 0] - picture[..., 2]  # yellow rather than grey
    warm[int(panel.y1) :], warm[: int(panel.y0)] = 0, 0  # title and legend
    y, x = np.unravel_index(warm.argmax(), warm.shape)
    assert corners[0, 0] < x < corners[1, 0]
    assert corners[1, 1] < y < corners[0, 1]
    text = figure.texts[0].get_text().replace('\n', ' ')
    assert 'HiResCAM of the score of the detection' in text


def test_picture_of_the_network_has_no_padding(traced):
    _, data, _ = traced
    picture = network_picture(data)
    assert picture.shape == (*SIZES[2], 3)
    assert (picture.min(), picture.max()) == (0, 255)


def test_rois_have_no_map(randomise):
    model = randomise(build_faster({'num_experts': 3, 'top_k': 2})).eval()
    data = model.data_preprocessor(make_batch(1), False)
    with Tracer(model) as tracer:
        (result,) = tracer.predict(data, preprocessed=True)
        for name in tracer.layers:
            assert find_looks(tracer, name, result, 0.0, str) == []
