"""``analyze_experts.py`` on every detector of the zoo, and on classifiers."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.runner import set_random_seed
from torch import nn
from zoo_cases import (
    CLASSIFIERS,
    DETECTORS,
    FOUR,
    NUM_CLASSES,
    SIZE,
    TOKENS,
    batch,
    build,
    tiny_config,
    with_experts,
)

from mmdet_moe import moe
from mmdet_moe.analysis import command
from mmdet_moe.analysis.records.contents import concatenated
from mmdet_moe.analysis.statistics import summary
from mmdet_moe.errors import ConfigError

IMAGES, EXPERTS = 3, 3
#: Pyramid levels that hang on a layer; on all others all of them do.
LEVELS = {
    'neck.fpn_convs.0': [0],
    'neck.out_convs.0': [0],
    'neck.extra_layers.0': [2, 3],
    'bbox_head.cls_convs.0': [0],
    'bbox_head.rtm_cls.0': [0],
    'bbox_head.multi_level_cls_convs.0': [0],
}
#: Without proposals a query comes from no token.
UNKNOWN = {(name, 'encoder.layers.0.ffn.layers') for name in ('detr', 'deformable_detr')}


def images_of(count):
    """BGR, of few large patches under noise: cells are not alike."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(256, size=(count, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    return (blocks + rng.normal(0, 20, blocks.shape)).clip(0, 255).astype(np.uint8)


def equal_experts(config, case):
    """The model with random weights, in which the experts of a layer are copies.

    Scores are far from each other, so that no rounding decides which of two is higher.
    """
    set_random_seed(0)
    dense = build(config.model, case)
    for name, parameter in dense.named_parameters():
        if 'multi_level_conv_reg' in name or 'rtm_reg' in name:  # boxes of 8 to 200 pixels
            nn.init.constant_(parameter, parameter.dim() == 1)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, 0, (2 / parameter[0].numel()) ** 0.5)
        elif 'cls' in name or 'obj' in name:
            nn.init.zeros_(parameter)  # detections are rare by their bias
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    dense.train()(**dense.data_preprocessor(batch(case), training=True), mode='loss')
    config.model = with_experts(config.model, case, num_experts=EXPERTS)
    model = build(config.model, case).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer in moe.find_moe_layers(model).values():
        nn.init.normal_(layer.router.fc.weight)
    return model


def write_data(folder, model):
    """Images and objects as COCO's: some of what the model finds, so that AP is not 0."""
    images = images_of(IMAGES)
    (folder / 'images').mkdir()
    meta = {'img_shape': (SIZE, SIZE), 'ori_shape': (SIZE, SIZE), 'scale_factor': (1.0, 1.0)}
    annotations = []
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / 'images' / f'{number}.png'), image)
        inputs = torch.from_numpy(image).permute(2, 0, 1)
        (sample,) = model.test_step(
            {'inputs': [inputs], 'data_samples': [DetDataSample(metainfo=meta)]}
        )
        found = sample.pred_instances
        sides = found.bboxes[:, 2:] - found.bboxes[:, :2]
        large = (sides.amin(1) > 4).nonzero().flatten()[:3]
        for (left, top, *_), (width, height), label in zip(
            found.bboxes[large].tolist(), sides[large].tolist(), found.labels[large], strict=True
        ):
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': number,
                    'category_id': int(label) + 1,
                    'bbox': [left, top, width, height],
                    'area': width * height,
                    'iscrowd': 0,
                }
            )
    content = {
        'images': [
            {'id': i, 'file_name': f'{i}.png', 'height': SIZE, 'width': SIZE}
            for i in range(len(images))
        ],
        'categories': [{'id': c + 1, 'name': f'class {c}'} for c in range(NUM_CLASSES)],
        'annotations': annotations,
    }
    (folder / 'objects.json').write_text(json.dumps(content))


def analyse(config, model, folder, monkeypatch):
    """What the tool leaves: experts.json, and the study."""
    config.val_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    config.test_dataloader = config.val_dataloader
    config.visualizer = None
    config.dump(folder / 'config.py')
    torch.save({'state_dict': model.state_dict()}, folder / 'model.pth')
    studies = []
    prepare = command.prepare
    monkeypatch.setattr(command, 'prepare', lambda *a: studies.append(prepare(*a)) or studies[-1])
    # What takes the most time knows nothing of models: figures, and how sure a statistic is.
    monkeypatch.setattr(command, 'write_figures', lambda *_: None)
    monkeypatch.setattr(summary.summarise, '__defaults__', (1,))
    out = folder / 'out'
    arguments = [str(folder / 'config.py'), str(folder / 'model.pth'), '--out', str(out)]
    experts = command.analyse(command.parse([*arguments, '--score-thr', '0', '--device', 'cpu']))
    assert json.loads((out / 'experts.json').read_text()) == experts
    assert (out / 'report.html').stat().st_size > 100_000
    return experts, studies[0]


@pytest.mark.sweep(keep=1 / 6)
@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name, tmp_path, monkeypatch):
    case = DETECTORS[name]
    # One layer of the first kind, and one of the last: a head and a backbone, mostly.
    entries = [{**e, 'at': e['at'].replace('*', '0')} for e in (case.experts[0], case.experts[-1])]
    case = dataclasses.replace(case, experts=tuple(entries))
    config = tiny_config(case)
    limits = config.model.test_cfg.get('rcnn', config.model.test_cfg)
    limits.update(score_thr=0.0, max_per_img=min(limits.get('max_per_img') or 20, 20))
    model = equal_experts(config, case)
    write_data(tmp_path, model)
    config.val_dataloader = {
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'dataset': {
            'type': 'CocoDataset',
            'data_root': str(tmp_path),
            'ann_file': 'objects.json',
            'data_prefix': {'img': 'images/'},
            'metainfo': {'classes': [f'class {c}' for c in range(NUM_CLASSES)]},
            'test_mode': True,
            'pipeline': [
                {'type': 'LoadImageFromFile'},
                {'type': 'Resize', 'scale': (SIZE, SIZE), 'keep_ratio': True},
                {
                    'type': 'PackDetInputs',
                    'meta_keys': ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
                },
            ],
        },
    }

    config.val_evaluator = {'type': 'CocoMetric', 'ann_file': str(tmp_path / 'objects.json')}

    experts, study = analyse(config, model, tmp_path, monkeypatch)

    assert experts['metrics']['AP'] > 0
    check_interventions(experts, study)
    records = concatenated(list(study.records))
    level = records.detections.level
    for layer, kept in zip(study.layers, records.layers, strict=True):
        known = np.full(len(level), (name, layer) not in UNKNOWN)
        if layer in LEVELS:
            known = np.isin(level, LEVELS[layer])
        np.testing.assert_array_equal(kept.detections.unit >= 0, known, layer)
        np.testing.assert_array_equal(np.isnan(kept.detections.weights).any(1), ~known, layer)


def check_interventions(experts, study):
    """Experts that are copies can be exchanged: whoever takes their place, all is as it was."""
    made = experts['interventions']
    assert len(made) == len(study.layers) * (3 * EXPERTS + 2) + 2 * (len(study.layers) > 1)
    for intervention in made:
        if intervention['kind'] != 'zeroed':  # in whose place nobody comes
            assert intervention['metrics'] == experts['metrics'], intervention


def classify(name, entries, folder, monkeypatch):
    case = dataclasses.replace(CLASSIFIERS[name], experts=entries)
    config = tiny_config(case)
    for number, image in enumerate(images_of(IMAGES)):
        path = folder / 'images' / f'class {number % NUM_CLASSES}' / f'{number}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
    config.val_dataloader = {
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'dataset': {
            'type': 'CustomDataset',
            'data_root': str(folder),
            'data_prefix': 'images',
            'pipeline': [{'type': 'LoadImageFromFile'}, {'type': 'PackInputs'}],
        },
    }
    config.val_evaluator = {'type': 'Accuracy', 'topk': (1,)}
    return analyse(config, equal_experts(config, case), folder, monkeypatch)


def test_a_convolutional_classifier(tmp_path, monkeypatch):
    entries = ({'at': 'backbone.layer4', **FOUR}, {'at': 'backbone.layer3.0.conv1', **FOUR})
    experts, study = classify('resnet', entries, tmp_path, monkeypatch)
    check_interventions(experts, study)
    for kept in concatenated(list(study.records)).layers:
        assert kept.links.owner.tolist() == kept.decisions.image.tolist() == list(range(IMAGES))


FFN = 'backbone.stages.0.blocks.0.ffn.layers'
IN_WINDOWS = 'backbone.stages.0.blocks.0.attn.w_msa.proj'


def test_a_layer_on_windows_of_images_is_left_out(tmp_path, monkeypatch, capsys):
    entries = tuple({'at': path, **TOKENS} for path in (IN_WINDOWS, FFN))
    experts, study = classify('swin', entries, tmp_path, monkeypatch)
    assert list(experts['layers']) == list(study.layers) == [FFN]
    check_interventions(experts, study)
    assert capsys.readouterr().out.count(f'note: layer "{IN_WINDOWS}" decides on') == 1
    (kept,) = concatenated(list(study.records)).layers
    assert np.bincount(kept.decisions.image).tolist() == [(SIZE // 4) ** 2] * IMAGES


def test_if_no_layer_is_left_the_reason_is_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=f'"{IN_WINDOWS}" decides on .* cannot be analysed'):
        classify('swin', ({'at': IN_WINDOWS, **TOKENS},), tmp_path, monkeypatch)
