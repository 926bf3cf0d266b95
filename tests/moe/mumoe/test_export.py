"""μMoE layers compiled, exported and as ONNX give what they give as they are."""

import mumoe_by_hand as by_hand
import pytest
import torch

from mmdet_moe.moe import CPMuMoE, MuMoEConv1x1, MuMoEMLP, TRMuMoE

LAYERS = {
    'cp': (lambda: CPMuMoE(6, 5, (4, 3), 3), (7, 6)),
    'tr': (lambda: TRMuMoE(6, 5, 4, 3, norm='ln'), (7, 3, 6)),
    'conv': (lambda: MuMoEConv1x1(6, 5, 4, 3, stride=2), (7, 6, 4, 5)),
    'mlp': (lambda: MuMoEMLP(6, 8, 5, (4, 3), 2, factorisation='tr'), (7, 3, 6)),
}
BATCH = {'x': {0: torch.export.Dim('batch', min=2, max=100)}}


@pytest.fixture(params=LAYERS)
def layer_and_inputs(request):
    """One layer, an input, and one of another batch size."""
    make, shape = LAYERS[request.param]
    layer = by_hand.randomise(make()).eval()
    return layer, torch.randn(shape), torch.randn(3, *shape[1:])


@pytest.mark.sweep(keep=1 / 4)
@pytest.mark.parametrize('training', [False, True])
def test_compile(layer_and_inputs, training):
    """In one graph, also with its gradients."""
    layer, *inputs = layer_and_inputs
    layer.train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend='aot_eager')
    for x in inputs:
        results = []
        for module in (layer, compiled):
            layer.zero_grad()
            y = module(x)
            y.square().mean().backward()
            results.append([y, *(p.grad for p in layer.parameters())])
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.sweep(keep=1 / 2)
def test_export(layer_and_inputs):
    layer, *inputs = layer_and_inputs
    program = torch.export.export(layer, (inputs[0],), dynamic_shapes=BATCH).module()
    for x in inputs:
        torch.testing.assert_close(program(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.sweep(keep=1 / 2)
def test_onnx(layer_and_inputs, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    layer, *inputs = layer_and_inputs
    path = tmp_path / 'layer.onnx'
    torch.onnx.export(
        layer, (inputs[0],), path, dynamo=True, dynamic_shapes=BATCH, input_names=['x']
    )
    session = onnxruntime.InferenceSession(str(path))
    for x in inputs:
        (y,) = session.run(None, {'x': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-4, atol=1e-5)
