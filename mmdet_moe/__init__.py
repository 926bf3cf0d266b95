"""Mixture-of-experts layers for CNNs, as a plugin of MMDetection and MMPretrain.

Importing the package registers nothing and imports no toolbox: MMEngine imports
:mod:`mmdet_moe.registry` by itself when it meets ``type='mmdet_moe.X'`` in a config. The one side
effect is a fallback for mmcv's compiled ops (see :mod:`mmdet_moe.compat`), which a compiled mmcv
overrides.
"""

from mmdet_moe import compat
from mmdet_moe.version import __version__

compat.install()

__all__ = ['__version__']
