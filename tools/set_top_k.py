"""Let a trained model choose another number of experts; ``--help`` lists the arguments."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.measuring import run_tool
from mmdet_moe.analysis.surgery.top_k import change_top_k, parse

if __name__ == '__main__':
    run_tool(change_top_k, parse())
