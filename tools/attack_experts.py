"""Attack a classifier: its accuracy, its routing, each expert; ``--help`` lists the arguments."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.measuring import run_tool
from mmdet_moe.analysis.robustness import attack_checkpoint, parse

if __name__ == '__main__':
    run_tool(attack_checkpoint, parse())
