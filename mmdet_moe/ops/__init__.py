"""Moving rows between the order of the items and the order of the experts.

Letters: T routed items, E experts, K (``k``) experts per item, M = T·K routes, R ≤ M of them that
are kept.

``python -m mmdet_moe.ops`` tells which kernels serve them.
"""

from mmdet_moe.ops.functional import combine, dispatch, sort_routes

__all__ = ['combine', 'dispatch', 'sort_routes']
