"""Installation of mmdet_moe.

The requirements here are lower bounds, so that the plugin fits into an environment that a user has
already; ``requirements/runtime.txt`` pins the versions that are tested together.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version: dict[str, str] = {}
exec((ROOT / 'mmdet_moe' / 'version.py').read_text(), version)

setup(
    name='mmdet_moe',
    version=version['__version__'],
    description='Mixture-of-experts layers for CNNs, as a plugin of MMDetection and MMPretrain',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmdet_moe', 'mmdet_moe.*']),
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.6',
        'torchvision>=0.21',
        'onedl-mmengine>=0.10.12',
        'onedl-mmcv>=2.3.6',
        'onedl-mmdetection>=3.5.1',
        'onedl-mmpretrain>=1.3.6',
    ],
    extras_require={'demo': ['scikit-learn>=1.5', 'scikit-image>=0.22']},
)
