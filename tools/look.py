"""Look at the experts of the trained detector that ships with the package, in three minutes."""

import sys
from pathlib import Path

# The checkout, for what is not installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from mmdet_moe.analysis.look import run_look

if __name__ == '__main__':
    run_look()
