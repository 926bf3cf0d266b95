"""The Expert Explorer: one HTML file in which to look at what the experts of a run work on.

A run's *payload* (``explorer.json``) holds its statistics, the columns of its outcomes and a choice
of images. One payload, or two to compare, make a report that opens in any browser, offline.
"""

from mmdet_moe.analysis.report.explorer.payload import build_payload, read_payload, write_payload
from mmdet_moe.analysis.report.explorer.report import write_report

__all__ = ['build_payload', 'read_payload', 'write_payload', 'write_report']
