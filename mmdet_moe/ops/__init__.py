"""Moving rows between the order of the items and the order of the experts; entmax15.

The letters in the names of tensors are explained in ``moe/routing.py``.

``python -m mmdet_moe.ops`` tells which kernels serve them.
"""

from mmdet_moe.ops.functional import combine, dispatch, entmax15, sort_routes

__all__ = ['combine', 'dispatch', 'entmax15', 'sort_routes']
