# Feature MoE that starts from a trained dense RetinaNet: stage 4 becomes 4 experts, the earlier
# stages are frozen (arXiv 2204.10598). The checkpoint: as in retinanet_moe_soft_finetune_coco.py.
_base_ = './retinanet_moe_backbone_coco.py'
model = dict(backbone=dict(frozen_stages=3, init_cfg=None))
param_scheduler = []
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='Adam', lr=1e-5),
    clip_grad=dict(max_norm=0.1),
)
load_from = '{{$DENSE_CHECKPOINT:work_dirs/retinanet_dense_coco/epoch_12.pth}}'
