"""The stand-in for mmcv's compiled ops against independent references."""

import importlib.util
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from running import ROOT

from mmdet_moe import compat

STAND_IN = Path(compat.__file__).with_name('mmcv_ext.py')

needs_stand_in = pytest.mark.skipif(
    Path(importlib.util.find_spec('mmcv._ext').origin) != STAND_IN,
    reason='this mmcv has its own compiled ops',
)


@pytest.fixture(scope='module')
def ext():
    spec = importlib.util.spec_from_file_location('stand_in_under_test', STAND_IN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random_boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 20
    size = torch.rand(count, 2, generator=generator) * 15 + 1
    return torch.cat([corner, corner + size], dim=1)


def iou(a, b, offset):
    """Overlap of two boxes (lists of four numbers) in plain Python."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    overlap = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


def brute_force_nms(boxes, scores, threshold, offset):
    boxes, kept = boxes.tolist(), []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[index], boxes[other], offset) <= threshold for other in kept):
            kept.append(index)
    return kept


def paper_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """The loop of figure 3 in arXiv 1704.04503."""
    boxes, scores = boxes.tolist(), scores.tolist()
    left, kept = list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        kept.append((best, scores[best]))
        left.remove(best)
        for i in list(left):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 2:
                scores[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[i] *= (1 - overlap) if method == 1 else 0
            if scores[i] < min_score:
                left.remove(i)
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.2, 0.5, 0.8])
def test_nms_equals_brute_force(ext, generator, threshold, offset):
    boxes, scores = random_boxes(60, generator), torch.rand(60, generator=generator)
    kept = ext.nms(boxes, scores, iou_threshold=threshold, offset=offset)
    assert kept.tolist() == brute_force_nms(boxes, scores, threshold, offset)


def test_nms_offset_changes_the_answer(ext):
    # 3 x 1 boxes that share a 2 x 1 part: IoU 2/4; as pixel indices they are 4 x 2 with IoU 6/10.
    boxes = torch.tensor([[0.0, 0, 3, 1], [1, 0, 4, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert ext.nms(boxes, scores, iou_threshold=0.55, offset=0).tolist() == [0, 1]
    assert ext.nms(boxes, scores, iou_threshold=0.55, offset=1).tolist() == [0]


def test_nms_takes_empty_and_half_precision_input(ext):
    assert ext.nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
    boxes = torch.tensor([[0.0, 0, 500, 500], [0, 0, 501, 500], [600, 600, 700, 700]])
    kept = ext.nms(boxes.half(), torch.tensor([0.9, 0.8, 0.7]), 0.5)
    assert kept.tolist() == [0, 2]


@pytest.mark.parametrize('method', [0, 1, 2])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms_equals_the_paper(ext, generator, method, offset):
    boxes = random_boxes(40, generator).double()
    scores = torch.rand(40, generator=generator).double()
    dets = torch.empty(40, 5, dtype=torch.float64)
    before = scores.clone()
    inds = ext.softnms(
        boxes,
        scores,
        dets,
        iou_threshold=0.3,
        sigma=0.5,
        min_score=0.05,
        method=method,
        offset=offset,
    )
    expected = paper_soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert inds.tolist() == [index for index, _ in expected]
    assert 0 < len(expected) < 40
    assert dets[: len(inds), 4].tolist() == pytest.approx([score for _, score in expected])
    torch.testing.assert_close(dets[: len(inds), :4], boxes[inds])
    torch.testing.assert_close(scores, before, rtol=0, atol=0)  # the input is not written to


def test_soft_nms_of_nothing(ext):
    inds = ext.softnms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5), 0.3, 0.5, 1e-3, 1)
    assert inds.shape == (0,)
    assert inds.dtype == torch.int64


def test_soft_nms_refuses_an_unknown_method(ext):
    with pytest.raises(ValueError, match='method must be 0, 1 or 2'):
        ext.softnms(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, 5), 0.3, 0.5, 1e-3, 3)


def sigmoid_focal_reference(logits, target, weight, gamma, alpha):
    """The formula of arXiv 1708.02002, term by term, on one-hot targets."""
    one_hot = F.one_hot(target, logits.size(1) + 1)[:, :-1].to(logits)
    prob = torch.sigmoid(logits)
    p_t = prob * one_hot + (1 - prob) * (1 - one_hot)
    alpha_t = alpha * one_hot + (1 - alpha) * (1 - one_hot)
    class_weight = torch.cat([weight, weight.new_ones(1)])[target]
    return -alpha_t * (1 - p_t) ** gamma * torch.log(p_t) * class_weight[:, None]


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.0, 0.5), (1.5, 0.7)])
def test_sigmoid_focal_loss(ext, generator, gamma, alpha, weighted):
    logits = (torch.randn(7, 4, generator=generator) * 3).double().requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 4, 0])  # 4 is the background
    class_weight = torch.tensor([0.5, 1.0, 2.0, 3.0]).double()
    weight = class_weight if weighted else torch.empty(0).double()
    reference = sigmoid_focal_reference(
        logits, target, class_weight if weighted else torch.ones(4).double(), gamma, alpha
    )
    (expected_grad,) = torch.autograd.grad(reference.sum(), logits)
    output, grad = torch.empty(7, 4).double(), torch.empty(7, 4).double()
    ext.sigmoid_focal_loss_forward(
        logits.detach(), target, weight, output, gamma=gamma, alpha=alpha
    )
    ext.sigmoid_focal_loss_backward(logits.detach(), target, weight, grad, gamma=gamma, alpha=alpha)
    torch.testing.assert_close(output, reference.detach())
    torch.testing.assert_close(grad, expected_grad)


def test_sigmoid_focal_loss_is_finite_for_extreme_logits(ext):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
    output, grad = torch.empty(2, 2), torch.empty(2, 2)
    none = torch.empty(0)
    ext.sigmoid_focal_loss_forward(logits, torch.tensor([1, 2]), none, output, 2.0, 0.25)
    ext.sigmoid_focal_loss_backward(logits, torch.tensor([1, 2]), none, grad, 2.0, 0.25)
    # A certain and wrong answer costs its logit.
    expected = torch.tensor([[0.75 * 200, 0.25 * 200], [0.0, 0.75 * 200]])
    torch.testing.assert_close(output, expected)
    assert grad.isfinite().all()


@pytest.mark.parametrize('gamma', [2.0, 0.5, 0.0])
def test_softmax_focal_loss(ext, generator, gamma):
    logits = torch.randn(5, 3, generator=generator).double().requires_grad_()
    target = torch.tensor([0, 2, 1, 1, -1])
    weight = torch.tensor([1.0, 2.0, 0.5]).double()
    log_prob = F.log_softmax(logits, dim=1)[range(4), target[:4]]
    reference = -0.25 * (1 - log_prob.exp()) ** gamma * log_prob * weight[target[:4]]
    (expected_grad,) = torch.autograd.grad(reference.sum(), logits)
    probs = logits.detach().softmax(dim=1)
    output, buff, grad = (torch.full(shape, 9.0).double() for shape in [(5,), (5,), (5, 3)])
    ext.softmax_focal_loss_forward(probs, target, weight, output, gamma=gamma, alpha=0.25)
    ext.softmax_focal_loss_backward(probs, target, weight, buff, grad, gamma=gamma, alpha=0.25)
    torch.testing.assert_close(output[:4], reference.detach())
    assert output[4] == 0
    torch.testing.assert_close(grad, expected_grad)


@needs_stand_in
def test_mmcv_focal_losses_pass_finite_differences(generator):
    from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss

    logits = torch.randn(4, 3, generator=generator).double().requires_grad_()
    target = torch.tensor([0, 2, 1, 2])
    for loss in (sigmoid_focal_loss, softmax_focal_loss):
        for reduction in ('sum', 'mean'):
            # mmcv's wrappers write into their first argument's buffers, so that each call gets one.
            assert torch.autograd.gradcheck(
                lambda x, loss=loss, reduction=reduction: loss(
                    x.clone(), target, 2.0, 0.25, None, reduction
                ),
                logits,
            )


@needs_stand_in
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align_equals_torchvision(generator, aligned, sampling_ratio):
    from mmcv.ops import RoIAlign

    features = torch.rand(2, 3, 16, 16, generator=generator).requires_grad_()
    boxes = random_boxes(6, generator)
    rois = torch.cat([torch.tensor([[0.0], [1], [0], [1], [1], [0]]), boxes], dim=1)
    layer = RoIAlign((3, 2), 0.5, sampling_ratio, 'avg', aligned)
    pooled = layer(features, rois)
    expected = torchvision.ops.roi_align(features, rois, (3, 2), 0.5, sampling_ratio, aligned)
    torch.testing.assert_close(pooled, expected)
    upstream = torch.rand(pooled.shape, generator=generator)
    (grad,) = torch.autograd.grad(pooled, features, upstream)
    (expected_grad,) = torch.autograd.grad(expected, features, upstream)
    torch.testing.assert_close(grad, expected_grad)


@needs_stand_in
def test_roi_align_by_hand():
    from mmcv.ops import roi_align

    # On the plane f(y, x) = 4 y + x bilinear samples are exact, and averages lie at bin centres:
    # the pixel centre of column 0 is at x = 0.5, so that the 2 x 2 box from (1, 1) to (3, 3)
    # halved in each direction has its bin centres at 1.5 and 2.5, i.e. at the pixels 1 and 2.
    features = torch.arange(16.0).reshape(1, 1, 4, 4)
    pooled = roi_align(features, torch.tensor([[0.0, 1, 1, 3, 3]]), 2, 1.0, 2, 'avg', True)
    assert pooled.flatten().tolist() == [5.0, 6.0, 9.0, 10.0]


@needs_stand_in
def test_roi_align_without_rois_and_with_half_precision():
    from mmcv.ops import roi_align

    features = torch.rand(1, 2, 8, 8).half()
    assert roi_align(features, torch.zeros(0, 5).half(), 2).shape == (0, 2, 2, 2)
    pooled = roi_align(features, torch.tensor([[0.0, 0, 0, 4, 4]]).half(), 2)
    assert pooled.dtype == torch.float16


@needs_stand_in
def test_roi_align_refuses_max_pooling():
    from mmcv.ops import roi_align

    with pytest.raises(RuntimeError, match=r"pool_mode='max'.*compile mmcv"):
        roi_align(torch.rand(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 2, 1.0, 0, 'max')


@needs_stand_in
def test_mmcv_wrappers_of_nms(generator):
    from mmcv.ops import batched_nms, nms, soft_nms

    boxes, scores = random_boxes(30, generator), torch.rand(30, generator=generator)
    dets, inds = nms(boxes, scores, 0.5, score_threshold=0.2, max_num=5)
    above = [i for i in brute_force_nms(boxes, scores, 0.5, 0) if scores[i] > 0.2]
    assert inds.tolist() == above[:5]
    torch.testing.assert_close(dets, torch.cat([boxes, scores[:, None]], dim=1)[inds])
    array_dets, array_inds = nms(boxes.numpy(), scores.numpy(), 0.5)
    assert array_inds.tolist() == brute_force_nms(boxes, scores, 0.5, 0)
    assert array_dets.shape == (len(array_inds), 5)

    dets, inds = soft_nms(boxes, scores, 0.3, min_score=0.05, method='gaussian')
    expected = paper_soft_nms(boxes, scores, 0.3, 0.5, 0.05, 2, 0)
    assert inds.tolist() == [index for index, _ in expected]
    assert dets[:, 4].tolist() == pytest.approx([score for _, score in expected], rel=1e-4)

    classes = torch.arange(30) % 3
    _, kept = batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.5))
    per_class = []
    for label in range(3):
        members = (classes == label).nonzero().flatten()
        inner = brute_force_nms(boxes[members], scores[members], 0.5, 0)
        per_class.extend(members[inner].tolist())
    assert sorted(kept.tolist()) == sorted(per_class)


def sampled(image, y, x):
    """Bilinear value of a list of rows at a point, zero outside, in plain Python."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < len(image) and 0 <= column < len(image[0]):
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row][column]
    return total


@needs_stand_in
@pytest.mark.parametrize(
    ('groups', 'deform_groups', 'stride', 'padding', 'dilation'),
    [(1, 1, 1, 0, 1), (2, 2, (2, 1), (1, 2), (2, 1))],
)
def test_deform_conv_samples_where_the_offsets_say(
    generator, groups, deform_groups, stride, padding, dilation
):
    from mmcv.ops import DeformConv2d

    convolution = DeformConv2d(
        4, 2, (3, 2), stride, padding, dilation, groups, deform_groups, bias=False
    )
    x = torch.randn(1, 4, 7, 6, generator=generator)
    (dy, dx), (py, px), (sy, sx) = convolution.dilation, convolution.padding, convolution.stride
    plain = F.conv2d(x, convolution.weight, None, (sy, sx), (py, px), (dy, dx), groups)
    offset = torch.randn(1, deform_groups * 12, *plain.shape[2:], generator=generator) * 2
    weight, points = convolution.weight.tolist(), offset.view(deform_groups, 3, 2, 2, -1)
    expected = torch.zeros_like(plain).flatten(2)
    for out in range(2):
        for channel in range(4 // groups):
            source = out * groups // 2 * (4 // groups) + channel
            for i, j in [(i, j) for i in range(3) for j in range(2)]:
                shift = points[source * deform_groups // 4, i, j].tolist()
                for place in range(expected.shape[2]):
                    row, column = divmod(place, plain.shape[3])
                    y = row * sy - py + i * dy + shift[0][place]
                    value = sampled(
                        x[0, source].tolist(), y, column * sx - px + j * dx + shift[1][place]
                    )
                    expected[0, out, place] += weight[out][channel][i][j] * value

    torch.testing.assert_close(convolution(x, offset).flatten(2), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(convolution(x, offset * 0), plain, atol=1e-5, rtol=1e-5)


@needs_stand_in
def test_deform_conv_passes_finite_differences(generator):
    from mmcv.ops import deform_conv2d, modulated_deform_conv2d

    kinds = {'generator': generator, 'dtype': torch.float64}
    x, weight = torch.randn(2, 2, 5, 5, **kinds), torch.randn(3, 2, 2, 2, **kinds)
    # Away from whole pixels, where bilinear sampling has no derivative.
    offset = torch.rand(2, 8, 4, 4, **kinds) * 0.8 + 0.1
    tensors = [tensor.requires_grad_() for tensor in (x, offset, weight)]
    assert torch.autograd.gradcheck(deform_conv2d, tensors)
    mask, bias = torch.rand(2, 4, 4, 4, **kinds), torch.randn(3, **kinds)
    tensors = [tensor.requires_grad_() for tensor in (x, offset, mask, weight, bias)]
    assert torch.autograd.gradcheck(modulated_deform_conv2d, tensors)
    assert torch.autograd.gradcheck(modulated_deform_conv2d, tensors[:4])


@needs_stand_in
def test_deformable_attention(generator):
    """The function that mmcv takes on a GPU; a query that looks at one pixel's middle gets it."""
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    kinds = {'generator': generator, 'dtype': torch.float64}
    shapes, starts = torch.tensor([[2, 3], [4, 5]]), torch.tensor([0, 6])
    value, weights = torch.randn(2, 26, 2, 3, **kinds), torch.rand(2, 4, 2, 2, 3, **kinds)
    places = torch.rand(2, 4, 2, 2, 3, 2, **kinds)
    attend = MultiScaleDeformableAttnFunction.apply
    tensors = [tensor.requires_grad_() for tensor in (value, places, weights)]
    assert torch.autograd.gradcheck(lambda v, p, w: attend(v, shapes, starts, p, w, 64), tensors)
    with torch.no_grad():
        middle = torch.tensor([1.5 / 5, 2.5 / 4], dtype=torch.float64).expand_as(places)
        one = torch.zeros_like(weights)
        one[..., 1, 0] = 1
        expected = value[:, 6 + 2 * 5 + 1].flatten(1)[:, None].expand(2, 4, 6)
        torch.testing.assert_close(attend(value, shapes, starts, middle, one, 64), expected)


@needs_stand_in
@pytest.mark.parametrize('bias', [True, False])
def test_modulation_scales_what_is_sampled(generator, bias):
    """As the plain op where the mask is 1, and linear in the mask."""
    from mmcv.ops import ModulatedDeformConv2d, deform_conv2d

    geometry = dict(stride=(2, 1), padding=(1, 2), dilation=(2, 1))
    modulated = ModulatedDeformConv2d(4, 2, (3, 2), **geometry, deform_groups=2, bias=bias)
    x = torch.randn(2, 4, 7, 6, generator=generator)
    plain = F.conv2d(x, modulated.weight, None, **geometry)
    offset = torch.randn(2, 24, *plain.shape[2:], generator=generator)
    mask = torch.rand(2, 12, *plain.shape[2:], generator=generator)
    constant = modulated.bias.view(1, -1, 1, 1) if bias else 0.0
    sampled = deform_conv2d(x, offset, modulated.weight, *geometry.values(), 1, 2)
    ones = torch.ones_like(mask)
    torch.testing.assert_close(modulated(x, offset, ones) - constant, sampled)
    both = modulated(x, offset, mask) + modulated(x, offset, 1 - mask) - 2 * constant
    torch.testing.assert_close(both, sampled, atol=1e-5, rtol=1e-5)
    # A mask that lets one tap through leaves the convolution with that tap alone.
    only = ones.view(2, 2, 6, *plain.shape[2:]) * (torch.arange(6) == 3).view(1, 1, 6, 1, 1)
    one_tap = torch.zeros_like(modulated.weight).flatten(2)
    one_tap[..., 3] = modulated.weight.flatten(2)[..., 3]
    expected = F.conv2d(x, one_tap.view_as(modulated.weight), None, **geometry)
    result = modulated(x, offset * 0, only.flatten(1, 2)) - constant
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


@needs_stand_in
def test_an_unknown_op_names_itself():
    from mmcv.ops import nms_match

    with pytest.raises(NotImplementedError, match=r"'nms_match'.*MMCV_WITH_OPS=1 pip install") as e:
        nms_match(torch.rand(3, 5), 0.5)
    assert isinstance(e.value, RuntimeError)
    assert '\n' not in str(e.value)


def test_dunder_names_do_not_pretend_to_exist(ext):
    assert callable(ext.an_op_of_the_future)
    assert not hasattr(ext, '__wrapped__')


def test_install_is_idempotent():
    before = list(sys.meta_path)
    compat.install()
    assert sys.meta_path == before
    assert sum(type(finder).__name__ == '_MmcvExtFinder' for finder in before) == 1


def test_the_finder_answers_for_one_name_only():
    assert importlib.util.find_spec('mmcv._ext') is not None
    assert importlib.util.find_spec('mmcv._other') is None


def run_python(code, *paths):
    lines = [f'import sys; sys.path[:0] = {[str(path) for path in (*paths, ROOT)]!r}']
    script = '\n'.join([*lines, textwrap.dedent(code)])
    return subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)


def test_a_compiled_mmcv_wins(tmp_path):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / '_ext.py').write_text("origin = 'compiled'\n")
    code = """
        import mmdet_moe
        import mmcv._ext
        print(mmcv._ext.origin)
    """
    done = run_python(code, tmp_path)
    assert done.stdout == 'compiled\n', done.stderr


def test_importing_the_package_imports_no_toolbox():
    code = """
        import mmdet_moe
        heavy = {'torch', 'torchvision', 'mmcv', 'mmengine', 'mmdet', 'mmpretrain', 'numpy'}
        print(sorted(heavy & set(sys.modules)))
    """
    done = run_python(code)
    assert done.stdout == '[]\n', done.stderr


@needs_stand_in
def test_loading_is_logged_once():
    code = """
        import mmdet_moe
        import mmcv.ops
        import mmcv._ext
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count('torchvision stands in') == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_equals_cpu(ext, generator):
    boxes, scores = random_boxes(50, generator), torch.rand(50, generator=generator)
    assert ext.nms(boxes.cuda(), scores.cuda(), 0.5, 1).tolist() == (
        ext.nms(boxes, scores, 0.5, 1).tolist()
    )
    rois = torch.cat([torch.zeros(50, 1), boxes], dim=1)
    features = torch.rand(1, 2, 32, 32, generator=generator)
    results = {}
    for device in ('cpu', 'cuda'):
        pooled = torch.empty(50, 2, 3, 3, device=device)
        grad = torch.empty(1, 2, 32, 32, device=device)
        none = torch.empty(0, device=device)
        arguments = (none, none)
        settings = dict(aligned_height=3, aligned_width=3, spatial_scale=1.0, sampling_ratio=2)
        settings |= dict(pool_mode=1, aligned=True)
        ext.roi_align_forward(features.to(device), rois.to(device), pooled, *arguments, **settings)
        ext.roi_align_backward(pooled, rois.to(device), *arguments, grad, **settings)
        loss = torch.empty(50, 4, device=device)
        target = torch.arange(50, device=device) % 5
        ext.sigmoid_focal_loss_forward(boxes.to(device), target, none, loss, 2.0, 0.25)
        dets = torch.empty(50, 5, device=device)
        inds = ext.softnms(boxes.to(device), scores.to(device), dets, 0.3, 0.5, 0.05, 1, 0)
        results[device] = (pooled, grad, loss, inds, dets[: len(inds)])
    for on_cpu, on_gpu in zip(results['cpu'], results['cuda'], strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
