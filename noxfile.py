"""The tests under every Python, and the site: ``nox`` (all), ``nox -s core-3.12``, ``nox -s docs``.

``make test`` is faster for one Python, because it keeps its environment. With uv, ``nox -db uv``,
what PyTorch brings along is downloaded and stored once for all of them.
"""

import nox

PYTHONS = ['3.10', '3.11', '3.12', '3.13']
nox.options.reuse_venv = 'yes'

# What `mmdet_moe.moe` promises where there is no toolbox.
CORE = """
import sys, torch
from mmdet_moe.moe import ImportanceLoss, add_experts, find_moe_layers

model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
print(add_experts(model, {'2': dict(num_experts=3, top_k=2)}))
output = model(torch.randn(4, 3, 16, 16)).mean()
(layer,) = find_moe_layers(model).values()
(output + ImportanceLoss(weight=0.5)(layer.routing)).backward()
assert layer.routing.load().sum() == 8
assert not {'mmdet', 'mmpretrain', 'mmcv', 'cv2'} & set(sys.modules)
"""


@nox.session(python=PYTHONS)
def core(session: nox.Session) -> None:
    """The installation without extras: PyTorch and MMEngine alone."""
    session.install('.')
    session.chdir(session.create_tmp())
    session.run('python', '-c', CORE)
    session.run('mmdet-moe', '--help')


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite with the pinned toolboxes."""
    session.install('-r', 'requirements/dev.txt')
    session.install('--no-build-isolation', '--no-deps', '-e', '.')
    session.run('pytest', '-n', '2', '--dist', 'worksteal', *session.posargs)


@nox.session(python='3.11')
def docs(session: nox.Session) -> None:
    """The documentation site, in a fresh environment; every warning is an error."""
    session.install('-r', 'requirements/runtime.txt', '-r', 'requirements/docs.txt')
    session.install('--no-build-isolation', '--no-deps', '-e', '.')
    session.run('sphinx-build', '-q', '-E', '-W', 'docs', session.create_tmp())
