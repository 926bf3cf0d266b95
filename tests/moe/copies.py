"""Experts that began as copies of dense modules, against a model of these."""

import copy

import torch
from torch.utils._pytree import tree_leaves, tree_map

from mmdet_moe.moe import ModuleExperts, find_moe_layers


def gradients_of(moe, name):
    """The gradients of all copies that a model with experts has of a dense parameter."""
    parameters = dict(moe.named_parameters())
    if name in parameters:
        return [parameters[name].grad]
    found = []
    for path, layer in find_moe_layers(moe).items():
        scope = path if not layer.siblings else path.rpartition('.')[0]
        if scope and not name.startswith(scope + '.'):
            continue
        inner = name.removeprefix(f'{scope}.')
        if isinstance(layer.experts, ModuleExperts):
            held = [dict(expert.named_parameters()).get(inner) for expert in layer.experts]
            found += [parameter.grad for parameter in held if parameter is not None]
        else:
            stacked = dict(layer.experts.named_parameters())
            # What was a ConvModule has its convolution's parameters alone.
            if (held := stacked.get(inner, stacked.get(inner.removeprefix('conv.')))) is not None:
                found.append(held.grad.sum(0))
        found += [dict(m.named_parameters())[inner].grad for m in layer.shared or ()]
    return found


def check_gradients(dense, moe, rtol=1e-7):
    """The gradients of the copies sum to the dense gradient."""
    for name, parameter in dense.named_parameters():
        total = sum(gradients_of(moe, name))
        torch.testing.assert_close(total, parameter.grad, rtol=rtol, atol=1e-9)


def check_same(dense, moe, inputs, rtol=1e-7):
    """Outputs, gradients for the inputs, and the experts' gradients summed.

    The gradients in float64: float32 sums of thousands of terms in another order differ by 1e-4.
    """
    torch.testing.assert_close(moe(inputs), dense(inputs), rtol=1e-5, atol=1e-5)
    cotangents, gradients = [], []
    for model in (dense.double(), moe.double()):
        leaves = tree_map(lambda x: x.detach().double().requires_grad_(), inputs)
        outputs = tree_leaves(model(leaves))
        cotangents = cotangents or [torch.randn_like(y) for y in outputs]
        torch.autograd.backward(outputs, cotangents)
        gradients.append([x.grad for x in tree_leaves(leaves)])
    torch.testing.assert_close(*gradients, rtol=rtol, atol=1e-9)
    check_gradients(dense, moe, rtol)


def check_detections(dense, moe, images, samples):
    """Both detectors find the same, and something in every image."""
    with torch.no_grad():
        expected, found = (
            model.double().eval()(images.double(), copy.deepcopy(samples), mode='predict')
            for model in (dense, moe)
        )
    for a, b in zip(found, expected, strict=True):
        assert len(b.pred_instances) > 0
        for field in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(a.pred_instances[field], b.pred_instances[field])
