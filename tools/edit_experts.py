"""Change what single experts contribute, in a checkpoint; ``--help`` lists the arguments."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.editing import edit_checkpoint, parse
from mmdet_moe.analysis.measuring import run_tool

if __name__ == '__main__':
    run_tool(edit_checkpoint, parse())
