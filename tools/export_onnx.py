"""Write a trained model to an ONNX file, and check it; ``--help`` lists the arguments."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.deployment import run_export

if __name__ == '__main__':
    run_export()
