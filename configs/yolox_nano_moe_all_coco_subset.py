# A trained YOLOX-nano becomes sparse by path: backbone, neck and head. One of 4 experts counts in
# full, so that the model starts with the dense one's outputs and costs what it does. Routers start
# as clusters: with the usual start most of these layers send nearly all images to one expert.
_base_ = [
    './yolox_nano_dense_coco_subset.py',
    './_base_/balancing/clustered.py',
]
one = dict(num_experts=4, top_k=1)
backbone_experts = [dict(at='backbone.stage4', **one)]
neck_experts = [dict(at=f'neck.{path}_blocks.*', **one) for path in ('top_down', 'bottom_up')]
head_experts = [dict(at=f'bbox_head.multi_level_{of}_convs.*', **one) for of in ('cls', 'reg')]
model = dict(
    type='mmdet_moe.WithExperts',
    of='YOLOX',
    experts=[*backbone_experts, *neck_experts, *head_experts],
    router=_base_.router,
)
