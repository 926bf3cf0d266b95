"""The toolboxes' shipped models made tiny, with the layers that become experts, and their batches.

A case starts from a config as the toolbox's wheel carries it; ``options`` (what a user would give
as ``--cfg-options``) shrink it until a forward of two images of 64 pixels takes milliseconds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData
from mmpretrain.structures import DataSample

from mmdet_moe.registry import DATASETS

NUM_CLASSES = 3
SIZE = 64
FOUR = {'num_experts': 4, 'top_k': 2}
TOKENS = {**FOUR, 'granularity': 'token'}


@dataclass(frozen=True)
class Case:
    """One model: the shipped ``config``, the ``options`` that shrink it, and what becomes experts.

    ``calls`` are the calls of each entry's layers in one forward, for every layer that the entry's
    ``at`` matches: 5 for a head that five pyramid levels share.
    """

    config: str
    options: dict = field(repr=False)
    experts: tuple[dict, ...]
    calls: tuple[int, ...]

    @property
    def toolbox(self) -> str:
        return self.config.partition('::')[0]

    @property
    def with_masks(self) -> bool:
        return 'mask-rcnn' in self.config


def _dotted(prefix: str, **options: object) -> dict:
    return {f'{prefix}.{name.replace("__", ".")}': value for name, value in options.items()}


def _model(**options: object) -> dict:
    return _dotted('model', **options)


RESNET = _model(
    backbone__depth=18,
    backbone__base_channels=8,
    backbone__stem_channels=8,
    backbone__init_cfg=None,
)
RESNET_FPN = {**RESNET, **_model(neck__in_channels=[8, 16, 32, 64], neck__out_channels=16)}
DENSE_HEAD = {
    **RESNET_FPN,
    **_model(
        bbox_head__num_classes=NUM_CLASSES,
        bbox_head__in_channels=16,
        bbox_head__feat_channels=16,
        bbox_head__stacked_convs=2,
    ),
}
CSP = _model(  # of YOLOX and RTMDet
    backbone__widen_factor=0.125,
    neck__in_channels=[32, 64, 128],
    neck__out_channels=32,
    bbox_head__num_classes=NUM_CLASSES,
    bbox_head__in_channels=32,
    bbox_head__feat_channels=32,
)
GROUP_NORM = {'type': 'GN', 'num_groups': 4}
RPN = {
    **RESNET_FPN,
    **_model(
        rpn_head__in_channels=16,
        rpn_head__feat_channels=16,
        roi_head__bbox_roi_extractor__out_channels=16,
        train_cfg__rpn_proposal__max_per_img=20,
        test_cfg__rpn__max_per_img=10,
    ),
}
BOX_HEAD = {'in_channels': 16, 'fc_out_channels': 32, 'num_classes': NUM_CLASSES}
FASTER_RCNN = {**RPN, **_dotted('model.roi_head.bbox_head', **BOX_HEAD)}
MASK_RCNN = {
    **FASTER_RCNN,
    **_model(
        roi_head__mask_roi_extractor__out_channels=16,
        roi_head__mask_head__in_channels=16,
        roi_head__mask_head__conv_out_channels=16,
        roi_head__mask_head__num_classes=NUM_CLASSES,
    ),
}
CASCADE_RCNN = {
    **RPN,
    **{
        name: value
        for stage in range(3)
        for name, value in _dotted(f'model.roi_head.bbox_head.{stage}', **BOX_HEAD).items()
    },
}


def _detr(neck_in: list[int], *attention_and_ffn: str, **options: object) -> dict:
    """16 channels and one layer for the encoder and the decoder of the DETR family."""
    embed_dims = {f'{part}__embed_dims': 16 for part in attention_and_ffn}
    return {
        **RESNET,
        **_model(
            neck__in_channels=neck_in,
            neck__out_channels=16,
            encoder__num_layers=1,
            decoder__num_layers=1,
            encoder__layer_cfg__ffn_cfg__feedforward_channels=32,
            decoder__layer_cfg__ffn_cfg__feedforward_channels=32,
            positional_encoding__num_feats=8,
            bbox_head__num_classes=NUM_CLASSES,
            bbox_head__embed_dims=16,
            num_queries=8,
            test_cfg__max_per_img=5,
            **embed_dims,
            **options,
        ),
    }


ENCODER_DECODER = (
    'encoder__layer_cfg__self_attn_cfg',
    'encoder__layer_cfg__ffn_cfg',
    'decoder__layer_cfg__self_attn_cfg',
    'decoder__layer_cfg__cross_attn_cfg',
    'decoder__layer_cfg__ffn_cfg',
)
DETR_EXPERTS = (
    {'at': 'encoder.layers.*.ffn.layers', **TOKENS},
    {'at': 'decoder.layers.*.ffn.layers', **TOKENS},
)


def _head_experts(*paths: str, backbone: str = 'backbone.layer4') -> tuple[dict, ...]:
    return tuple({'at': path, **FOUR} for path in (*paths, backbone))


def _dense(config: str, *paths: str) -> Case:
    """A head with group normalisation that five levels share."""
    return Case(
        f'mmdet::{config}_1x_coco.py',
        {**DENSE_HEAD, **_model(bbox_head__norm_cfg=GROUP_NORM)},
        _head_experts(*(f'bbox_head.{path}' for path in paths)),
        (5, 5, 1),
    )


DETECTORS = {
    'retinanet': Case(
        'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
        DENSE_HEAD,
        (
            {'at': 'bbox_head.{cls_convs,retina_cls}', **FOUR},
            {'at': 'bbox_head.{reg_convs,retina_reg}', **FOUR},
            {'at': 'neck.fpn_convs.*', **FOUR, 'granularity': 'patch', 'grid_size': 2},
            {'at': 'backbone.layer4', **FOUR},
        ),
        (5, 5, 1, 1),
    ),
    # The centerness reads what cls_convs give, so that their last layer is no part of the expert.
    'fcos': _dense('fcos/fcos_r50-caffe_fpn_gn-head', 'cls_convs', '{reg_convs,conv_reg}'),
    # Here it reads what reg_convs give.
    'atss': _dense('atss/atss_r50_fpn', '{cls_convs,atss_cls}', 'reg_convs'),
    'gfl': _dense('gfl/gfl_r50_fpn', '{cls_convs,gfl_cls}', '{reg_convs,gfl_reg}'),
    # The output of every one of the inter_convs is used: each is a layer of its own.
    'tood': _dense('tood/tood_r50_fpn', 'inter_convs.*', 'cls_prob_module'),
    # A head per level.
    'yolox': Case(
        'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
        {
            'custom_hooks.0.num_last_epochs': -1,  # its last epochs want its own data set
            **_model(data_preprocessor__batch_augments=None),
            **CSP,
        },
        _head_experts(
            'bbox_head.multi_level_cls_convs.*',
            'bbox_head.multi_level_reg_convs.*',
            backbone='backbone.stage4.1',
        ),
        (1, 1, 1),
    ),
    # Its levels share their convolutions (share_conv), so that only what they do not share is
    # turned into experts.
    'rtmdet': Case(
        'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
        {**CSP, **_model(backbone__init_cfg=None)},
        _head_experts('bbox_head.rtm_cls.*', 'neck.out_convs.*', backbone='backbone.stage4.1'),
        (1, 1, 1),
    ),
    # VGG has no option for its width; fewer levels, because 64 pixels have no more. Random weights
    # want inputs of unit size: features in the hundreds would leave the router no choice.
    'ssd': Case(
        'mmdet::ssd/ssd300_coco.py',
        _model(
            data_preprocessor__std=[58.4, 57.1, 57.4],
            backbone__init_cfg=None,
            neck__out_channels=(512, 1024, 32, 16),
            neck__level_strides=(2, 2),
            neck__level_paddings=(1, 1),
            bbox_head__in_channels=(512, 1024, 32, 16),
            bbox_head__num_classes=NUM_CLASSES,
            bbox_head__anchor_generator__strides=[8, 16, 32, 64],
            bbox_head__anchor_generator__ratios=[[2], [2, 3], [2, 3], [2]],
        ),
        (
            {'at': 'bbox_head.cls_convs.*', **FOUR},
            {'at': 'bbox_head.reg_convs.*', **FOUR},
            {'at': 'neck.extra_layers.*', **FOUR},
        ),
        (1, 1, 1),
    ),
    'faster_rcnn': Case(
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        FASTER_RCNN,
        ({'at': 'roi_head.bbox_head.shared_fcs.*', **TOKENS}, {'at': 'backbone.layer4', **FOUR}),
        (1, 1),
    ),
    'mask_rcnn': Case(
        'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        MASK_RCNN,
        (
            {'at': 'roi_head.bbox_head.shared_fcs.*', **TOKENS},
            {'at': 'roi_head.mask_head.convs', **FOUR},
            {'at': 'neck.fpn_convs.*', **FOUR},
        ),
        (1, 1, 1),
    ),
    'cascade_rcnn': Case(
        'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
        CASCADE_RCNN,
        ({'at': 'roi_head.bbox_head.*.shared_fcs.1', **TOKENS}, {'at': 'backbone.layer3', **FOUR}),
        (1, 1),
    ),
    'detr': Case(
        'mmdet::detr/detr_r50_8xb2-150e_coco.py',
        _detr([64], *ENCODER_DECODER),
        DETR_EXPERTS,
        (1, 1),
    ),
    'deformable_detr': Case(
        'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        _detr([16, 32, 64], *ENCODER_DECODER, neck__norm_cfg=GROUP_NORM),
        DETR_EXPERTS,
        (1, 1),
    ),
    'dino': Case(
        'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
        _detr(
            [16, 32, 64],
            *ENCODER_DECODER,
            neck__norm_cfg=GROUP_NORM,
            dn_cfg__group_cfg__num_dn_queries=4,
        ),
        DETR_EXPERTS,
        (1, 1),
    ),
}


def _classifier(arch: dict | None, in_channels: int, **options: object) -> dict:
    options |= {'head__num_classes': NUM_CLASSES, 'head__in_channels': in_channels}
    if arch is not None:
        options |= {'backbone__arch': {**arch, '_delete_': True}}
    return {**_model(**options), 'data_preprocessor.num_classes': NUM_CLASSES}


STAGES = {'depths': [1, 1, 1, 1]}
FFN = {'num_heads': 2, 'feedforward_channels': 32}
CLASSIFIERS = {
    'resnet': Case(
        'mmpretrain::resnet/resnet18_8xb32_in1k.py',
        _classifier(
            None,
            64,
            backbone__depth=18,
            backbone__base_channels=8,
            backbone__stem_channels=8,
            head__topk=(1,),
        ),
        (
            {'at': 'backbone.layer4', **FOUR},
            {'at': 'backbone.layer3', 'every': 'Conv2d', **FOUR},
        ),
        (1, 1),
    ),
    'resnext': Case(
        'mmpretrain::resnext/resnext50-32x4d_8xb32_in1k.py',
        _classifier(
            None,
            256,
            backbone__base_channels=8,
            backbone__stem_channels=8,
            backbone__groups=4,
            head__topk=(1,),
        ),
        ({'at': 'backbone.layer4', **FOUR}, {'at': 'backbone.layer3.*.conv2', **FOUR}),
        (1, 1),
    ),
    'convnext': Case(
        'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py',
        _classifier({**STAGES, 'channels': [8, 16, 32, 64]}, 64),
        ({'at': 'backbone.stages.3', **FOUR}, {'at': 'backbone.stages.2.*', **FOUR}),
        (1, 1),
    ),
    'mobilenet_v2': Case(
        'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
        _classifier(None, 1280, backbone__widen_factor=0.25, head__topk=(1,)),
        ({'at': 'backbone.layer7', **FOUR}, {'at': 'backbone.layer5.*', **FOUR}),
        (1, 1),
    ),
    'swin': Case(
        'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
        _classifier(
            {**STAGES, 'embed_dims': 8, 'num_heads': [1, 2, 2, 2]},
            64,
            backbone__img_size=SIZE,
            backbone__pad_small_map=True,
        ),
        ({'at': 'backbone.stages.*.blocks.*.ffn.layers', **TOKENS},),
        (1,),
    ),
    'vit': Case(
        'mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py',
        _classifier({**FFN, 'embed_dims': 16, 'num_layers': 2}, 16, backbone__img_size=SIZE),
        ({'at': 'backbone.layers.*.ffn.layers', **TOKENS},),
        (1,),
    ),
    # The items of token_mix are the channels, its channels the 16 patches of an image.
    'mlp_mixer': Case(
        'mmpretrain::mlp_mixer/mlp-mixer-base-p16_64xb64_in1k.py',
        _classifier(
            {'embed_dims': 24, 'num_layers': 2, 'tokens_mlp_dims': 8, 'channels_mlp_dims': 32},
            24,
            backbone__img_size=SIZE,
            head__topk=(1,),
        ),
        (
            {'at': 'backbone.layers.*.token_mix.layers', **TOKENS},
            {'at': 'backbone.layers.*.channel_mix.layers', **TOKENS},
        ),
        (1, 1),
    ),
}
CASES = {**DETECTORS, **CLASSIFIERS}


def tiny_config(case: Case) -> Config:
    """The shipped config with the case's options; the model is still the dense one."""
    return shrink(get_config(case.config), case)


def shrink(config: Config, case: Case) -> Config:
    """Set the case's options; what is a preprocessor of the whole config becomes the model's."""
    config.merge_from_dict(copy.deepcopy(case.options))
    if case.toolbox == 'mmpretrain':
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    return config


def with_experts(dense: ConfigDict, case: Case, **options: object) -> ConfigDict:
    """The config of the model with the case's experts; ``options`` win over those of an entry."""
    return ConfigDict(
        {
            **dense,
            'type': 'mmdet_moe.WithExperts',
            'of': dense.type,
            'router': {'type': 'mmdet_moe.GAPRouter'},
            'experts': [{**entry, **options} for entry in case.experts],
        }
    )


def build(model: ConfigDict, case: Case, seed: int | None = None) -> torch.nn.Module:
    """The model with its initial weights, ready for a batch outside a Runner, too.

    With a ``seed``, those that ``init_weights`` draws are the same for equal modules.
    """
    with DefaultScope.overwrite_default_scope(case.toolbox):
        built = MODELS.build(copy.deepcopy(model))
        if seed is not None:
            set_random_seed(seed)
        built.init_weights()
    MessageHub.get_current_instance().update_info('epoch', 0)  # TOOD's loss depends on it
    return built


def _detection_sample(rng: np.random.RandomState, with_masks: bool) -> DetDataSample:
    # A small object and a large one, so that more than one level has positives.
    corners = rng.randint(8, size=(2, 2))
    boxes_at = np.concatenate([corners, corners + np.array([[12], [50]])], axis=1)
    boxes = torch.tensor(boxes_at, dtype=torch.float32)
    instances = InstanceData(bboxes=boxes, labels=torch.tensor(rng.randint(NUM_CLASSES, size=2)))
    if with_masks:
        masks = np.zeros((2, SIZE, SIZE), dtype=np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes_at, strict=True):
            mask[top:bottom, left:right] = 1
        instances.masks = BitmapMasks(masks, SIZE, SIZE)
    shape = (SIZE, SIZE)
    sample = DetDataSample(
        metainfo={'img_shape': shape, 'ori_shape': shape, 'scale_factor': (1.0, 1.0), 'img_id': 0}
    )
    sample.gt_instances = instances
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    return sample


@DATASETS.register_module()
class ZooImages(torch.utils.data.Dataset):
    """Two random images of 64 pixels with two boxes each (detectors) or a label (classifiers)."""

    metainfo = {'classes': ('circle', 'square', 'star')}

    def __init__(self, toolbox: str, with_masks: bool = False) -> None:
        rng = np.random.RandomState(0)
        self.items = [
            {
                'inputs': torch.tensor(rng.randint(256, size=(3, SIZE, SIZE)), dtype=torch.uint8),
                'data_samples': (
                    _detection_sample(rng, with_masks)
                    if toolbox == 'mmdet'
                    else DataSample().set_gt_label(label)
                ),
            }
            for label in range(2)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return copy.deepcopy(self.items[index])


def batch(case: Case) -> dict:
    """The data set's two images as a dataloader collates them."""
    items = ZooImages(case.toolbox, case.with_masks).items
    return {key: [copy.deepcopy(item[key]) for item in items] for key in items[0]}
