"""One suite for every implementation of the ops, on every device."""

import os
import types

import pytest
import torch

from mmdet_moe.ops import native, reference

# In the processes of test_emulation.py alone.
if library := os.environ.get('EMULATED_CUDA_KERNELS'):
    torch.ops.load_library(library)
    native._loaded['cpu'] = native.Kernels('cpu', True, 'the CUDA kernels, emulated')

NAMES = (
    'sort_routes',
    'dispatch',
    'dispatch_backward',
    'combine',
    'combine_backward',
    'entmax15',
    'entmax15_backward',
)


@pytest.fixture(params=['cpu', 'cuda'])
def device(request):
    """The device that the tensors of a test lie on."""
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('there is no GPU')
    return torch.device(request.param)


@pytest.fixture(params=['reference', 'native'])
def ops(request, device):
    """The ops of one implementation, without the checks of the public functions."""
    if request.param == 'reference':
        return types.SimpleNamespace(**{name: getattr(reference, name) for name in NAMES})
    if not native.is_native(device):
        pytest.skip(f'there are no compiled kernels for {device}')
    return torch.ops.mmdet_moe
