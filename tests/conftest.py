"""What all tests share."""

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


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def mmengine_globals(monkeypatch):
    """Every test has MMEngine's global instances, such as the default scope, to itself."""
    # Which compilers there are takes seconds to find out, and concerns no test.
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    for manager in _subclasses(ManagerMixin):
        monkeypatch.setattr(manager, '_instance_dict', type(manager._instance_dict)())


def _subclasses(cls):
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


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
