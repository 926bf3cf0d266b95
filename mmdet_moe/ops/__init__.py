"""Moving rows between the order of the items and the order of the experts.

Letters: T routed items, E experts, K (``k``) experts per item, M = T·K rows.
"""

from mmdet_moe.ops.reference import combine, dispatch, sort_routes

__all__ = ['combine', 'dispatch', 'sort_routes']
