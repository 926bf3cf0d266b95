"""Draw how the experts were used over one or several trainings; ``--help`` lists the arguments."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.balancing import parse, plot_balancing
from mmdet_moe.analysis.measuring import run_tool

if __name__ == '__main__':
    run_tool(plot_balancing, parse())
