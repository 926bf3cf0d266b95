_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
experts = [dict(at='neck.out_convs.*', granularity='patch', grid_size=4)]
model = dict(type='mmdet_moe.WithExperts', of='RTMDet', experts=experts)
balancing = dict(type='mmdet_moe.BalancingLossHook', loss=dict(type='mmdet_moe.ImportanceLoss'))
custom_hooks = [*_base_.custom_hooks, balancing, dict(type='mmdet_moe.ExpertUtilizationHook')]
