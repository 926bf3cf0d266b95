"""Exports of an analysis for other tools: FiftyOne, and TensorBoard's projector."""

from mmdet_moe.analysis.exports.fiftyone import write_fiftyone
from mmdet_moe.analysis.exports.projector import check_projector, write_projector

__all__ = ['check_projector', 'write_fiftyone', 'write_projector']
