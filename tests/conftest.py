"""What all tests share."""

import gc
import math
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import Executor, Future
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from local_server import Server
from mmengine.utils import ManagerMixin
from torch import nn

import mmdet_moe  # noqa: F401  # stands in for mmcv's ops before a test imports mmdet
from mmdet_moe.datasets import download
from mmdet_moe.datasets.digit_scenes import generate

# The tensors are small: threads cost more than they gain.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='every case of a sweep, not a sample')


def pytest_configure(config):
    config.addinivalue_line(
        'markers',
        'sweep(keep, each=()): many cases of the same thing, of which a share ``keep``, the same '
        'one every time, is run without --all; so for each value of the fixtures named ``each``',
    )


@pytest.hookimpl(trylast=True)  # what -k and -m leave
def pytest_collection_modifyitems(config, items):
    sweeps, seen = defaultdict(list), defaultdict(Counter)
    for item in items:
        marker = item.get_closest_marker('sweep')
        if marker and not config.getoption('--all'):
            each = tuple(item.callspec.params[name] for name in marker.kwargs.get('each', ()))
            sweeps[item.parent, item.originalname, each].append(item)
    dropped = []
    for (file, *_), cases in sweeps.items():
        share = cases[0].get_closest_marker('sweep').kwargs['keep']
        dropped += left_out(cases, share, seen[file])
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        unwanted = set(dropped)
        items[:] = [item for item in items if item not in unwanted]


def left_out(cases, share, seen):
    """The cases that are not in the sample, which holds at least one.

    The sample takes in turn the case whose values were ``seen`` least in the file's samples, so
    that every value has its turn; where several are, a hash of their names decides.
    """
    rest = sorted(cases, key=lambda case: zlib.crc32(case.nodeid.encode()))
    for _ in range(math.ceil(share * len(cases))):
        best = min(rest, key=lambda case: sum(seen[v] for v in case.callspec.indices.items()))
        seen.update(best.callspec.indices.items())
        rest.remove(best)
    return rest


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope='session', autouse=True)
def quick_runners(request):
    """What takes a Runner seconds and concerns few tests is left out.

    It is which compilers there are, the layout of the config, which MMEngine writes five times, and
    its sleep of two seconds where the data end before the training. Without --all it is also the
    pictures of ExpertUtilizationHook, which has a test of its own, and the wait for the disk after
    each file, without which only a crash of the machine does harm.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.runner.runner.collect_env', dict)
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))
        patch.setattr('mmengine.runner.loops.time', SimpleNamespace(sleep=lambda seconds: None))
        if not request.config.getoption('--all'):
            blank = np.zeros((4, 4, 3), np.uint8)
            patch.setattr('mmdet_moe.drawing.draw_utilization', lambda *_, **__: blank)
            patch.setattr('os.fsync', lambda file: None)
        yield


@pytest.fixture(scope='module', autouse=True)
def short_garbage_collections():
    """The imported toolboxes are not looked through again in every collection.

    MMEngine asks for one per data set, which took a quarter of a second each.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def mmengine_globals(monkeypatch):
    """Every test has MMEngine's global instances, such as the default scope, to itself."""
    _forget_instances(monkeypatch)


def _forget_instances(monkeypatch):
    for manager in _subclasses(ManagerMixin):
        monkeypatch.setattr(manager, '_instance_dict', type(manager._instance_dict)())


def _subclasses(cls):
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@pytest.fixture
def in_process(request, monkeypatch):
    """Without --all, experiments call their tools here, one after the other.

    In processes of their own, each would import the toolboxes for ten seconds.
    """
    from mmdet_moe.analysis.command import run_analysis
    from mmdet_moe.cli import run_test, run_train

    tools = {'train.py': run_train, 'test.py': run_test, 'analyze_experts.py': run_analysis}

    def run_tool(tool, arguments, threads, output):
        with redirect_stdout(output or sys.stdout), pytest.MonkeyPatch.context() as patch:
            _forget_instances(patch)
            tools[tool](arguments)

    if not request.config.getoption('--all'):
        monkeypatch.setattr('research.runs._run_tool', run_tool)
        monkeypatch.setattr('research.experiments.experiment.ThreadPoolExecutor', _AtOnce)


class _AtOnce(Executor):
    """Runs everything in this thread: MMEngine's global instances are those of one training."""

    def __init__(self, jobs):
        pass

    def submit(self, run, *arguments):
        future = Future()
        try:
            future.set_result(run(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def quick_analysis(request, monkeypatch):
    """Without --all, analyses draw no figures and try few permutations."""
    if not request.config.getoption('--all'):
        monkeypatch.setattr('mmdet_moe.analysis.command.write_figures', lambda *_: None)
        summarise = 'mmdet_moe.analysis.statistics.summary.summarise'
        monkeypatch.setattr(f'{summarise}.__defaults__', (19,))


@pytest.fixture(scope='session')
def digit_scenes_folder(tmp_path_factory):
    """16 training and 8 validation scenes of 128 px."""
    folder = tmp_path_factory.mktemp('digit-scenes') / 'data'
    generate(folder, num_train=16, num_val=8, size=128, seed=0)
    return folder


@pytest.fixture
def server(monkeypatch):
    """An HTTP server on this machine; after an interruption a download goes on at once."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(download, '_RETRY_PAUSES', (0.0, 0.0, 0.0))
    server = Server()
    yield server
    server.close()


@pytest.fixture
def set_threads():
    """Change the number of PyTorch's threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def randomise():
    """Fill all parameters and normalisation statistics of a module with random values.

    The constant values of a fresh batch norm (and the zeros of a ResNet's last one) would hide
    what it does.
    """

    def fill(module, std=None):
        for layer in module.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                scale = std or (fan_in**-0.5 if parameter.dim() > 1 else 0.5)
                shift = 1.0 if isinstance(layer, nn.BatchNorm2d) and name == 'weight' else 0.0
                nn.init.normal_(parameter, shift, scale)
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, 0.0, 0.5)
                nn.init.uniform_(layer.running_var, 0.5, 2.0)
        return module

    return fill
