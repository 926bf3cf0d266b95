"""Installation of mmdet_moe.

The requirements here are lower bounds, so that the plugin fits into an environment that a user has
already; ``requirements/runtime.txt`` pins the versions that are tested together.

The native kernels are compiled if the environment that is installed into has PyTorch and a compiler
(and, for CUDA, ``nvcc``). An installation never fails for the lack of them: PyTorch code serves
instead, and ``python -m mmdet_moe.ops`` tells why, and builds later.
"""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    # setuptools has it since 70.1, which pyproject.toml asks for, but --no-build-isolation takes
    # what is there. Without it, a wheel is tagged for one version of Python, nothing worse.
    bdist_wheel = None

ROOT = Path(__file__).parent
version: dict[str, str] = {}
exec((ROOT / 'mmdet_moe' / 'version.py').read_text(), version)

#: What the wheel's tools need of the checkout, besides the configs and ``model-index.yml``; those
#: that train whole experiments stay there.
TOOLS = ('tools/*.py', 'research/__init__.py', 'research/runs.py', 'research/benchmarks/*.py')
LEFT_OUT = ('demo.py', 'gpu.py', 'reproduce.py')

MMCV = ['torchvision>=0.21', 'onedl-mmcv>=2.3.6']
ANALYSIS = ['plotly>=6.0', 'Jinja2>=3.1', 'scipy>=1.9', 'tqdm>=4.0']
MMDET = [*MMCV, *ANALYSIS, 'onedl-mmdetection>=3.5.1']
MMPRETRAIN = [*MMCV, *ANALYSIS, 'onedl-mmpretrain>=1.3.6']


class BuildKernels(build_ext):
    """Compile with ``mmdet_moe/ops/build.py``, which needs no Python headers."""

    def run(self) -> None:
        self._write_pth()
        self._copy_tools()
        spec = importlib.util.spec_from_file_location('ops_build', ROOT / 'mmdet_moe/ops/build.py')
        build = sys.modules['ops_build'] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        try:
            results = build.build(target / 'mmdet_moe' / 'ops' / 'lib')
        except build.BuildError as error:
            print(f'no native kernels: {error}', file=sys.stderr)
            return
        for entry in results:
            print(f'native kernels for {entry.device}: {entry.reason or "built"}', file=sys.stderr)

    def _write_pth(self) -> None:
        """Let the toolboxes' own tools find our configs, see ``mmdet_moe/compat``.

        Here, because it is the command that runs for a wheel and an editable installation alike.
        """
        if self.editable_mode:
            folder = self.get_finalized_command('install').install_lib
        elif self.inplace:
            return
        else:
            folder = self.build_lib
        self.mkpath(folder)
        Path(folder, 'mmdet_moe.pth').write_text(
            'import os; os.environ.get("MMDET_MOE_AUTOLOAD") == "0" or __import__("mmdet_moe")\n'
        )

    def _copy_tools(self) -> None:
        """The commands of ``mmdet_moe/__main__.py``, and what ``mim`` reads, in its layout."""
        if self.inplace or self.editable_mode:
            return
        target = Path(self.build_lib, 'mmdet_moe', '.mim')
        shutil.rmtree(target, ignore_errors=True)
        for pattern in (*TOOLS, 'configs/**/*.py', 'configs/**/*.yml', 'model-index.yml'):
            for path in ROOT.glob(pattern):
                if path.name not in LEFT_OUT:
                    copy = target / path.relative_to(ROOT)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


commands = {'build_ext': BuildKernels}

if bdist_wheel is not None:

    class AnyPython(bdist_wheel):
        """The binaries belong to a platform, but to no version of Python.

        On Linux they need the C library that the newest of their symbols came with; PyTorch, which
        they are linked with too, is a requirement.
        """

        def get_tag(self) -> tuple[str, str, str]:
            build_lib = self.get_finalized_command('build').build_lib
            kernels = list(Path(build_lib, 'mmdet_moe', 'ops', 'lib').glob('*.so'))
            if not kernels:
                return 'py3', 'none', 'any'
            content = b''.join(path.read_bytes() for path in kernels)
            versions = [int(minor) for minor in re.findall(rb'GLIBC_2\.(\d+)', content)]
            platform = super().get_tag()[2]
            if versions:
                platform = re.sub('^linux', f'manylinux_2_{max(17, *versions)}', platform)
            return 'py3', 'none', platform

    commands['bdist_wheel'] = AnyPython


setup(
    name='mmdet_moe',
    version=version['__version__'],
    description='Mixture-of-experts layers for CNNs, as a plugin of MMDetection and MMPretrain',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmdet_moe', 'mmdet_moe.*']),
    package_data={
        'mmdet_moe': ['assets/*', 'configs/**/*.py', 'py.typed'],
        'mmdet_moe.ops': ['csrc/*.h', 'csrc/*/*'],
        'mmdet_moe.analysis.report.explorer': ['*.css', '*.j2', '*.js'],
    },
    entry_points={'console_scripts': ['mmdet-moe = mmdet_moe.__main__:main']},
    ext_modules=[Extension('mmdet_moe.ops.lib', [])],
    cmdclass=commands,
    python_requires='>=3.10',
    install_requires=['torch>=2.6', 'onedl-mmengine>=0.10.12'],  # of mmdet_moe.moe and .ops
    extras_require={
        'mmdet': MMDET,
        'mmpretrain': MMPRETRAIN,
        'all': MMDET + MMPRETRAIN,
        'cam': ['captum>=0.9'],  # class activation maps of single experts
        'attacks': ['adversarial-robustness-toolbox>=1.20'],  # tools/attack_experts.py
        'onnx': ['onnx>=1.18', 'onnxscript>=0.5', 'onnxruntime>=1.20'],  # tools/export_onnx.py
        'docs': ['sphinx>=8.2', 'furo>=2025.7', 'myst-nb>=1.3', 'sphinx-copybutton>=0.5'],
        'demo': [*MMDET, 'scikit-learn>=1.5', 'scikit-image>=0.22'],
    },
)
