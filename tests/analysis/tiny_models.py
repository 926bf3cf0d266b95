"""Tiny detectors and batches for the tests of the analysis."""

import copy

import mmdet
import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmdet_moe.moe import MoELayer

CLASSES = 3
STRIDES = (8, 16, 32)
FOUR = {'num_experts': 4, 'top_k': 2}
TEST_CFG = ConfigDict(
    nms_pre=60,
    min_bbox_size=0,
    score_thr=0.0,
    nms={'type': 'nms', 'iou_threshold': 0.5},
    max_per_img=20,
)
ASSIGNER = {
    'type': 'mmdet.MaxIoUAssigner',
    'pos_iou_thr': 0.5,
    'neg_iou_thr': 0.4,
    'min_pos_iou': 0,
    'ignore_iof_thr': -1,
}
TOPK = {'type': 'mmdet.ATSSAssigner', 'topk': 9}
SIMOTA = {'type': 'mmdet.SimOTAAssigner'}
ASSIGNERS = {
    'atss': TOPK,
    'gfl': TOPK,
    'tood': {'type': 'mmdet.TaskAlignedAssigner', 'topk': 13},
    'yolox': SIMOTA,
    'rtmdet': SIMOTA,
    'rtmdet, objectness': SIMOTA,
    'yolov3': {'type': 'mmdet.GridAssigner', 'pos_iou_thr': 0.5, 'neg_iou_thr': 0.5},
}
ANCHORS = {
    'type': 'mmdet.AnchorGenerator',
    'octave_base_scale': 4,
    'scales_per_octave': 2,
    'ratios': [0.5, 1.0],
    'strides': list(STRIDES),
}
BN = {'type': 'BN'}
ONE_ANCHOR = {**ANCHORS, 'scales_per_octave': 1, 'ratios': [1.0]}
POINTS = {'type': 'mmdet.MlvlPointGenerator', 'strides': list(STRIDES), 'offset': 0}
BOX_CODER = {'type': 'mmdet.DeltaXYWHBBoxCoder'}
POINT_CODER = {'type': 'mmdet.DistancePointBBoxCoder'}
NARROW = {'feat_channels': 5, 'stacked_convs': 1}


def _head(kind, **options):
    return {'type': f'mmdet.{kind}', 'num_classes': CLASSES, 'in_channels': 6, **options}


RETINA = _head(
    'RetinaHead',
    **NARROW,
    anchor_generator=ANCHORS,
    bbox_coder=BOX_CODER,
    loss_cls={'type': 'mmdet.FocalLoss', 'use_sigmoid': True},
    loss_bbox={'type': 'mmdet.L1Loss'},
)
HEADS = {
    'retina': RETINA,
    'moe retina': {**RETINA, **FOUR, 'type': 'mmdet_moe.MoERetinaHead'},
    'fcos': _head(
        'FCOSHead',
        **NARROW,
        strides=list(STRIDES),
        regress_ranges=[(-1, 32), (32, 64), (64, 1e8)],
        norm_cfg=BN,
    ),
    'atss': _head(
        'ATSSHead',
        **NARROW,
        norm_cfg=BN,
        anchor_generator=ONE_ANCHOR,
        bbox_coder=BOX_CODER,
        loss_centerness={'type': 'mmdet.CrossEntropyLoss', 'use_sigmoid': True},
    ),
    'gfl': _head('GFLHead', **NARROW, norm_cfg=BN, anchor_generator=ONE_ANCHOR, reg_max=4),
    'tood': _head(
        'TOODHead',
        feat_channels=8,
        stacked_convs=2,
        norm_cfg=BN,
        anchor_generator=ONE_ANCHOR,
        bbox_coder=BOX_CODER,
    ),
    'yolox': _head('YOLOXHead', feat_channels=6, strides=STRIDES),
    'rtmdet': _head(
        'RTMDetSepBNHead',
        feat_channels=6,
        with_objectness=False,
        exp_on_reg=True,
        anchor_generator=POINTS,
        bbox_coder=POINT_CODER,
        loss_bbox={'type': 'mmdet.GIoULoss'},
        norm_cfg=BN,
    ),
    'rtmdet, objectness': _head(
        'RTMDetHead',
        feat_channels=6,
        anchor_generator=POINTS,
        bbox_coder=POINT_CODER,
        loss_bbox={'type': 'mmdet.GIoULoss'},
        norm_cfg=BN,
    ),
    'ssd': _head(
        'SSDHead',
        in_channels=(6, 6, 6),
        anchor_generator={
            'type': 'mmdet.SSDAnchorGenerator',
            'scale_major': False,
            'input_size': 300,
            'basesize_ratio_range': (0.15, 0.9),
            'strides': list(STRIDES),
            'ratios': [[2], [2, 3], [2]],  # as many as 4, 6 and 4 anchors in a cell
        },
        bbox_coder=BOX_CODER,
    ),
    # Not traced: what it predicts is decoded by code of its own.
    'yolov3': _head(
        'YOLOV3Head',
        in_channels=(6, 6, 6),
        out_channels=(6, 6, 6),
        anchor_generator={
            'type': 'mmdet.YOLOAnchorGenerator',
            'base_sizes': [[(16, 10)], [(30, 61)], [(60, 45)]],
            'strides': list(STRIDES),
        },
        bbox_coder={'type': 'mmdet.YOLOBBoxCoder'},
        featmap_strides=list(STRIDES),
    ),
}
MOE_NECK = {
    'type': 'mmdet_moe.MoEFPN',
    'num_experts': 3,
    'top_k': 2,
    'granularity': 'patch',
    'grid_size': 2,
    'expert_init': 'independent',
}
RESNET_18 = {'type': 'mmdet.ResNet', 'depth': 18, 'base_channels': 2, 'stem_channels': 4}
MOE_BACKBONE = {
    'type': 'mmdet_moe.MoEResNet',
    'num_experts': 3,
    'top_k': 2,
    'moe_stages': [4],
    'granularity': 'patch',
    'grid_size': 3,
}


def build_single(head, backbone=None, neck=None, train_cfg=True, **test_cfg):
    """A one-stage detector with the named head on three levels."""
    init_default_scope('mmdet')
    assigner = ASSIGNERS.get(head, ASSIGNER)
    config = {
        'type': 'mmdet.SingleStageDetector',
        'data_preprocessor': {'type': 'mmdet.DetDataPreprocessor', 'pad_size_divisor': 32},
        'backbone': {
            'out_indices': (1, 2, 3),
            **({} if 'depths' in (backbone or {}) else RESNET_18),
            **(backbone or {}),
        },
        'neck': {
            'type': 'mmdet.FPN',
            'in_channels': [4, 8, 16],
            'out_channels': 6,
            'num_outs': 3,
            **(neck or {}),
        },
        'bbox_head': copy.deepcopy(HEADS[head]),
        'test_cfg': copy.deepcopy(ConfigDict({**TEST_CFG, **test_cfg})),
    }
    if train_cfg:
        config['train_cfg'] = ConfigDict(
            assigner=assigner,
            sampler={'type': 'mmdet.PseudoSampler'},
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
            # TOOD's and SSD's.
            initial_epoch=0,
            initial_assigner=TOPK,
            alpha=1,
            beta=6,
        )
    return MODELS.build(config).eval()


def faster_config(moe=None, neck=None, **head):
    """The model of MMDetection's Faster R-CNN with a tiny ResNet-18 and 8 channels."""
    base = "_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'"
    config = Config.fromstring(base, '.py').model
    config.backbone.update(depth=18, base_channels=2, stem_channels=4, init_cfg=None)
    config.neck.update(in_channels=[2, 4, 8, 16], out_channels=8, **(neck or {}))
    config.rpn_head.update(in_channels=8, feat_channels=8)
    config.roi_head.bbox_roi_extractor.out_channels = 8
    config.roi_head.bbox_head.update(in_channels=8, fc_out_channels=12, num_classes=CLASSES)
    config.roi_head.bbox_head.update(head)
    if moe is not None:
        config.roi_head.bbox_head.update(moe, type='mmdet_moe.MoEShared2FCBBoxHead')
    init_default_scope('mmdet')
    return config


def build_faster(moe=None, neck=None, **head):
    """A Faster R-CNN."""
    config = faster_config(moe, neck, **head)
    config.test_cfg.rpn.update(max_per_img=40)
    config.test_cfg.rcnn.update(score_thr=0.0, max_per_img=30)
    return MODELS.build(config).eval()


def build_shipped(name, config, moe=()):
    """A detector of MMDetection's own configs, made tiny, with experts at dotted paths.

    Args:
        name: The config, as ``detr/detr_r50_8xb2-150e_coco``.
        config: What is changed in its model, merged into it.
        moe: ``{path: options of MoELayer}``; what stands there becomes the expert.
    """
    init_default_scope('mmdet')
    shipped = Config.fromfile(f'{mmdet.__path__[0]}/.mim/configs/{name}.py')
    changed = {'backbone.init_cfg': None, **config}
    shipped.merge_from_dict({f'model.{key}': value for key, value in changed.items()})
    model = MODELS.build(shipped.model)
    for path, options in dict(moe).items():
        place(model, path, **options)
    return model.eval()


def place(model, path, **options):
    """Make three experts, of which two are chosen, of the module at a path."""
    owner, _, last = path.rpartition('.')
    expert = model.get_submodule(path)
    setattr(model.get_submodule(owner), last, MoELayer(expert, 3, 2, **options))


RESNET = {f'backbone.{key}': value for key, value in RESNET_18.items()}
RESNET['backbone.frozen_stages'] = -1
DEFORMABLE = 'deformable_detr/deformable-detr'
DETRS = {
    'detr': 'detr/detr_r50_8xb2-150e_coco',
    'deformable': f'{DEFORMABLE}_r50_16xb2-50e_coco',
    'two stages': f'{DEFORMABLE}-refine-twostage_r50_16xb2-50e_coco',
    'dino': 'dino/dino-4scale_r50_8xb2-12e_coco',
}


#: Deformable DETR with two stages works with 256 channels alone.
CHANNELS = {'detr': 16, 'deformable': 16, 'two stages': 256, 'dino': 16}


def build_detr(kind, paths=()):
    """A transformer with 9 queries, two layers of encoder and of decoder, and experts at paths."""
    channels = CHANNELS[kind]
    config = {
        **RESNET,
        'neck.in_channels': [16] if kind == 'detr' else [4, 8, 16],
        'neck.out_channels': channels,
        'positional_encoding.num_feats': channels // 2,
        'bbox_head.num_classes': CLASSES,
        'bbox_head.embed_dims': channels,
        'num_queries': 9,
        'test_cfg.max_per_img': 6,
        **{f'{coder}.num_layers': 2 for coder in ('encoder', 'decoder')},
    }
    if kind != 'detr':
        config['neck.norm_cfg.num_groups'] = 4
    for coder, attentions in (('encoder', ['self']), ('decoder', ['self', 'cross'])):
        ffn = f'{coder}.layer_cfg.ffn_cfg'
        config |= {f'{ffn}.embed_dims': channels, f'{ffn}.feedforward_channels': 8}
        for attention in attentions:
            attention = f'{coder}.layer_cfg.{attention}_attn_cfg'
            config |= {f'{attention}.embed_dims': channels, f'{attention}.num_heads': 2}
    tokens = {'in_channels': channels, 'granularity': 'token'}
    return build_shipped(DETRS[kind], config, dict.fromkeys(paths, tokens))


def build_rcnn(name, moe=()):
    """A Mask or Cascade R-CNN of MMDetection's own configs."""
    config = {
        **RESNET,
        'neck.in_channels': [2, 4, 8, 16],
        'neck.out_channels': 8,
        'rpn_head.in_channels': 8,
        'rpn_head.feat_channels': 8,
        'roi_head.bbox_roi_extractor.out_channels': 8,
        'test_cfg.rpn.max_per_img': 40,
        'test_cfg.rcnn.score_thr': 0.0,
        'test_cfg.rcnn.max_per_img': 15,
    }
    heads = [f'bbox_head.{i}' for i in range(3)] if 'cascade' in name else ['bbox_head']
    for head in heads:
        head = f'roi_head.{head}'
        config |= {f'{head}.in_channels': 8, f'{head}.fc_out_channels': 12}
        config[f'{head}.num_classes'] = CLASSES
    if 'mask' in name:
        config |= {
            'roi_head.mask_roi_extractor.out_channels': 8,
            'roi_head.mask_head.in_channels': 8,
            'roi_head.mask_head.conv_out_channels': 8,
            'roi_head.mask_head.num_classes': CLASSES,
        }
    return build_shipped(name, config, moe)


#: Boxes in px of the original images, (image: boxes); unlike labels tell objects apart.
BOXES = (
    [[4.0, 6, 30, 40], [20, 2, 150, 60], [100, 30, 118, 50]],
    [],
    [[10.0, 10, 80, 50]],
)
SCALES = ((0.5, 1.0), (1.0, 1.0), (0.8, 1.25))
SIZES = ((64, 80), (40, 96), (60, 64))  # of the network's images, height and width


def make_batch(count=3):
    """Images of several sizes, scaled by other factors in x and y; the second has no objects."""
    rng = np.random.default_rng(1)
    images, samples = [], []
    for index in range(count):
        height, width = SIZES[index]
        scale = SCALES[index]
        sample = DetDataSample(
            metainfo={
                'img_shape': (height, width),
                'ori_shape': (round(height / scale[1]), round(width / scale[0])),
                'scale_factor': scale,
                'img_id': index,
            }
        )
        images.append(torch.from_numpy(rng.integers(0, 255, (3, height, width), dtype=np.uint8)))
        samples.append(sample)
    return {'inputs': images, 'data_samples': samples}


def two_images(boxes=True):
    """Pixels and samples of two 64×96 images with three objects, or without any."""
    all_boxes = [[[4.0, 6, 30, 40], [20, 2, 90, 60]], [[40.0, 10, 80, 50]]]
    all_labels = [[0, 2], [1]]
    size = dict.fromkeys(('img_shape', 'pad_shape', 'batch_input_shape', 'ori_shape'), (64, 96))
    samples = []
    for image_boxes, image_labels in zip(all_boxes, all_labels, strict=True):
        number = len(image_boxes) if boxes else 0
        metainfo = {**size, 'scale_factor': (1, 1), 'img_id': len(samples)}
        sample = DetDataSample(metainfo=metainfo)
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(image_boxes)[:number], labels=torch.tensor(image_labels)[:number]
        )
        samples.append(sample)
    return torch.randn(2, 3, 64, 96), samples


def gt_instances(index):
    """Ground truth in px of the network's input."""
    boxes = torch.tensor(BOXES[index]).reshape(-1, 4)
    boxes = boxes * torch.tensor(SCALES[index] * 2)
    return InstanceData(bboxes=boxes, labels=torch.arange(len(boxes)))


@torch.no_grad()
def predict(model, batch):
    """The model's own predictions."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    return model(**data, mode='predict')
