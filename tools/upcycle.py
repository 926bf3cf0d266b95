"""Make experts of the layers of a trained dense model; ``--help`` lists the arguments."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.measuring import run_tool
from mmdet_moe.analysis.surgery.upcycle import parse, upcycle_checkpoint

if __name__ == '__main__':
    run_tool(upcycle_checkpoint, parse())
