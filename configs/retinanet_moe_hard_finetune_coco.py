# As retinanet_moe_soft_finetune_coco.py, with the hard constraint
# (the fine-tuning recipe of arXiv 2204.10598). Train retinanet_dense_coco.py first, or say where a
# dense checkpoint is: `export DENSE_CHECKPOINT=FILE`.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/finetune_1x.py',
    './_base_/default_runtime.py',
    './_base_/balancing/hard_relative.py',
]
model = dict(
    backbone=dict(frozen_stages=4, init_cfg=None),
    neck=dict(_delete_=True, type='mmdet_moe.Frozen', module={{_base_.model.neck}}),
    bbox_head=dict(
        type='mmdet_moe.MoERetinaHead', num_experts=4, top_k=2, router={{_base_.router}}
    ),
)
load_from = '{{$DENSE_CHECKPOINT:work_dirs/retinanet_dense_coco/epoch_12.pth}}'
