"""Draw which expert finds what in images; ``--help`` lists the arguments."""

import importlib.util
import sys
from pathlib import Path

# From a checkout the tool works without an installed package, too.
if importlib.util.find_spec('mmdet_moe') is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.image_demo.command import run_image_demo

if __name__ == '__main__':
    run_image_demo()
