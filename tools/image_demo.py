"""Draw which expert finds what in images; ``--help`` lists the arguments."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.image_demo.command import run_image_demo

if __name__ == '__main__':
    run_image_demo()
