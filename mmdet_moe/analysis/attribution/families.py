"""The families of heads whose detections tell where they come from."""

from torch import nn

from mmdet_moe.analysis.attribution.places import Origins

#: Detectors whose heads tell, in words.
KNOWN_HEADS = (
    'RetinaNet, FCOS, ATSS, GFL, TOOD, YOLOX, RTMDet, SSD, Faster, Mask and Cascade R-CNN, DETR, '
    'Deformable DETR and DINO'
)


def origins_of(model: nn.Module) -> Origins:
    """How the detections of a model tell their origin; plain :class:`Origins` if they do not."""
    if not hasattr(model, 'roi_head') and not hasattr(model, 'bbox_head'):
        return Origins()
    # MMPretrain works without MMDetection.
    from mmdet_moe.analysis.attribution.dense import PriorOrigins, YOLOXOrigins
    from mmdet_moe.analysis.attribution.query import QueryOrigins
    from mmdet_moe.analysis.attribution.roi import RoIOrigins

    for family in (RoIOrigins, QueryOrigins, YOLOXOrigins, PriorOrigins):
        if family.fits(model):
            return family(model)
    return Origins()
