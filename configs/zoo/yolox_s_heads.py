# A config with hooks of its own cannot share a list of bases with ours: its hooks are extended.
_base_ = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
experts = [dict(at=f'bbox_head.multi_level_{task}_convs.*') for task in ('cls', 'reg')]
model = dict(type='mmdet_moe.WithExperts', of='YOLOX', experts=experts)
balancing = dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.ImportanceLoss'))
custom_hooks = [*_base_.custom_hooks, balancing, dict(type='mmdet_moe.ExpertUtilizationHook')]
