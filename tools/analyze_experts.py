"""Show what the experts of a trained model learned; ``--help`` lists the arguments."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.command import run_analysis

if __name__ == '__main__':
    run_analysis()
