"""Which pyramid levels the objects of a data set live on."""

import math

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_moe.moe.metrics import mutual_information


def positives_per_level(cfg: Config) -> Tensor:
    """Count the anchors that are assigned to objects of the validation set, by pyramid level.

    Args:
        cfg: Config of a detector with an anchor head (RetinaNet).

    Returns:
        (L,) float tensor of counts.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmdet')):
        model = MODELS.build(cfg.model)
        samples = DATASETS.build(cfg.val_dataloader.dataset)
    divisor = model.data_preprocessor.pad_size_divisor
    priors, assigner = model.bbox_head.prior_generator, model.bbox_head.assigner
    counts = torch.zeros(priors.num_levels)
    for sample in samples:
        objects = sample['data_samples'].gt_instances
        # Validation pipelines load the boxes after the resizing, in pixels of the original image.
        scale = objects.bboxes.tensor.new_tensor(sample['data_samples'].scale_factor * 2)
        padded = [math.ceil(side / divisor) * divisor for side in sample['inputs'].shape[-2:]]
        sizes = [tuple(math.ceil(p / s) for p in padded) for (s, _) in priors.strides]
        anchors = priors.grid_priors(sizes, device='cpu')
        assigned = assigner.assign(
            InstanceData(priors=torch.cat(anchors)),
            InstanceData(bboxes=objects.bboxes.tensor * scale, labels=objects.labels),
        )
        per_level = (assigned.gt_inds > 0).split([len(level) for level in anchors])
        counts += torch.stack([level.sum() for level in per_level])
    return counts


def information_on_level(level_shares: list[list[float]], items_per_level: Tensor) -> float:
    """Mutual information between level and expert when levels count as ``items_per_level``.

    Args:
        level_shares: From :class:`~mmdet_moe.moe.UtilizationReport`, (L, E).
        items_per_level: What each level counts, (L,), such as :func:`positives_per_level`.

    Returns:
        Nats.
    """
    return float(mutual_information(torch.tensor(level_shares) * items_per_level[:, None]))
