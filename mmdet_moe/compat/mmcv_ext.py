"""mmcv's compiled ops on top of torch and torchvision.

Loaded under the name ``mmcv._ext`` by :func:`mmdet_moe.compat.install` when mmcv has no compiled
ops of its own. The functions keep the argument names and the in-place outputs of the compiled ones,
because mmcv's Python wrappers (``mmcv.ops``) call them; they run on any device that torchvision
supports. An op without a stand-in exists as a name (mmcv looks all names up at import time) and
raises :class:`MissingOpError` when it is called.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torchvision
from mmengine.logging import print_log
from torch import Tensor

_COMPILE_HINT = (
    'compile mmcv with `MMCV_WITH_OPS=1 pip install --no-binary onedl-mmcv --force-reinstall '
    '--no-deps onedl-mmcv`'
)
_SOFT_NMS_METHODS = {0: 'naive', 1: 'linear', 2: 'gaussian'}
_AVERAGE_POOLING = 1


class MissingOpError(NotImplementedError):
    """An op of mmcv was called that has no stand-in."""


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: at least float32, since box coordinates overflow half precision."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Indices of the kept boxes, by descending score.

    Args:
        boxes: ``(n, 4)`` corners.
        scores: ``(n,)``.
        iou_threshold: a box is dropped when its overlap with a kept one is greater.
        offset: added to widths and heights; 1 for boxes whose corners are pixel indices.
    """
    dtype = _working_dtype(boxes, scores)
    boxes = boxes.to(dtype)
    if offset:
        # Moving the lower right corners adds the offset to every side of a box and of an overlap.
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores.to(dtype), float(iou_threshold))


def _overlap_with_one(box: Tensor, boxes: Tensor, offset: int) -> Tensor:
    corner_min = torch.maximum(box[:2], boxes[:, :2])
    corner_max = torch.minimum(box[2:], boxes[:, 2:])
    overlap = (corner_max - corner_min + offset).clamp(min=0).prod(dim=1)
    area = (box[2:] - box[:2] + offset).prod()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(dim=1)
    union = area + areas - overlap
    return torch.where(union > 0, overlap / union, torch.zeros_like(union))


def _soft_nms_decay(overlap: Tensor, iou_threshold: float, sigma: float, method: str) -> Tensor:
    if method == 'gaussian':
        return torch.exp(-overlap.square() / sigma)
    weight = 1 - overlap if method == 'linear' else torch.zeros_like(overlap)
    return torch.where(overlap >= iou_threshold, weight, torch.ones_like(overlap))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int = 0,
) -> Tensor:
    """Soft-NMS (arXiv 1704.04503): lower the scores of overlapping boxes instead of dropping them.

    Args:
        boxes: ``(n, 4)`` corners.
        scores: ``(n,)``.
        dets: ``(n, 5)`` output buffer; its first rows receive the kept boxes and new scores.
        iou_threshold: overlaps below it leave a score alone (methods 0 and 1).
        sigma: width of the Gaussian (method 2).
        min_score: a box whose lowered score falls below it is dropped.
        method: 0 naive (ordinary NMS), 1 linear, 2 Gaussian.
        offset: added to widths and heights.

    Returns:
        Indices of the kept boxes, in the order of ``dets``.
    """
    if method not in _SOFT_NMS_METHODS:
        raise ValueError(f'soft NMS method must be 0, 1 or 2, got {method}')
    dtype = _working_dtype(boxes, scores)
    # The candidates shrink in every round, the best one first moving to the output.
    candidates = torch.cat([boxes.to(dtype), scores.to(dtype)[:, None]], dim=1)
    indices = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    while len(indices):
        best = candidates[:, 4].argmax()
        dets[len(kept)] = candidates[best].to(dets.dtype)
        kept.append(indices[best])
        overlap = _overlap_with_one(candidates[best, :4], candidates[:, :4], offset)
        decay = _soft_nms_decay(overlap, iou_threshold, sigma, _SOFT_NMS_METHODS[method])
        candidates[:, 4] *= decay
        remaining = candidates[:, 4] >= min_score
        remaining[best] = False
        candidates, indices = candidates[remaining], indices[remaining]
    if not kept:
        return indices
    return torch.stack(kept)


def _sample_weight(target: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight[target]``; background, which has no class weight, counts fully."""
    if weight.numel() == 0:
        return torch.ones_like(target, dtype=dtype)
    foreground = (target >= 0) & (target < weight.numel())
    class_weight = weight.to(dtype)[target.clamp(0, weight.numel() - 1)]
    return torch.where(foreground, class_weight, torch.ones_like(class_weight))


def _is_target(target: Tensor, num_classes: int) -> Tensor:
    return target[:, None] == torch.arange(num_classes, device=target.device)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss (arXiv 1708.02002) of every logit into ``output``.

    Args:
        input: ``(n, c)`` logits.
        target: ``(n,)`` class indices; ``c`` means background.
        weight: ``(c,)`` class weights, or empty.
        output: ``(n, c)`` buffer.
        gamma: focusing exponent.
        alpha: weight of the positive term; the negative one gets ``1 - alpha``.
    """
    dtype = _working_dtype(input)
    logit = input.to(dtype)
    prob = logit.sigmoid()
    positive = -alpha * (1 - prob).pow(gamma) * F.logsigmoid(logit)
    negative = -(1 - alpha) * prob.pow(gamma) * F.logsigmoid(-logit)
    loss = torch.where(_is_target(target, input.size(1)), positive, negative)
    output.copy_(loss * _sample_weight(target, weight, dtype)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of the sigmoid focal loss by ``input`` into ``grad_input``."""
    dtype = _working_dtype(input)
    logit = input.to(dtype)
    prob = logit.sigmoid()
    positive_term = 1 - prob - gamma * prob * F.logsigmoid(logit)
    positive = -alpha * (1 - prob).pow(gamma) * positive_term
    negative_term = gamma * (1 - prob) * F.logsigmoid(-logit) - prob
    negative = -(1 - alpha) * prob.pow(gamma) * negative_term
    grad = torch.where(_is_target(target, input.size(1)), positive, negative)
    grad_input.copy_(grad * _sample_weight(target, weight, dtype)[:, None])


def _target_probability(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of the target class, away from 0 and 1, and whether the target counts at all."""
    counts = (target >= 0) & (target < probs.size(1))
    index = target.clamp(0, probs.size(1) - 1)[:, None]
    prob = probs.to(_working_dtype(probs)).gather(1, index).squeeze(1)
    return prob.clamp(min=torch.finfo(prob.dtype).tiny), counts


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of every sample into ``output``.

    Args:
        input: ``(n, c)`` probabilities (after the softmax).
        target: ``(n,)`` class indices; a sample whose index names no class counts as 0.
        weight: ``(c,)`` class weights, or empty.
        output: ``(n,)`` buffer.
        gamma: focusing exponent.
        alpha: factor of the loss.
    """
    prob, counts = _target_probability(input, target)
    loss = -alpha * (1 - prob).pow(gamma) * prob.log() * counts
    output.copy_(loss * _sample_weight(target, weight, prob.dtype))


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Write the derivative of the softmax focal loss by the LOGITS into ``grad_input``.

    ``input`` holds probabilities, as in the forward; ``buff`` receives the factor per sample.
    """
    prob, counts = _target_probability(input, target)
    # A negative power of an exact zero would be infinite where its factor log(1) is zero.
    rest = (1 - prob).clamp(min=torch.finfo(prob.dtype).tiny)
    factor = alpha * (gamma * rest.pow(gamma - 1) * prob * prob.log() - rest.pow(gamma)) * counts
    factor = factor * _sample_weight(target, weight, prob.dtype)
    buff.copy_(factor)
    is_target = _is_target(target, input.size(1)).to(prob.dtype)
    grad_input.copy_(factor[:, None] * (is_target - input))


def _roi_align(
    input: Tensor,
    rois: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> Tensor:
    if pool_mode != _AVERAGE_POOLING:
        raise MissingOpError(
            "RoIAlign with pool_mode='max' has no torchvision stand-in: use pool_mode='avg', or "
            f'{_COMPILE_HINT}.'
        )
    size = (aligned_height, aligned_width)
    rois = rois.to(input.dtype)
    return torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    **options: Any,
) -> None:
    """Write the average-pooled RoI features into ``output``; ``argmax_*`` serve max pooling only.

    Raises:
        MissingOpError: for max pooling (``pool_mode`` 0).
    """
    output.copy_(_roi_align(input.to(_working_dtype(input)), rois, **options))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    **options: Any,
) -> None:
    """Write the gradient by the input of :func:`roi_align_forward` into ``grad_input``.

    Raises:
        MissingOpError: for max pooling (``pool_mode`` 0).
    """
    dtype = _working_dtype(grad_output)
    with torch.enable_grad():
        # Average pooling is linear in the features, so its derivative at zero holds everywhere.
        features = torch.zeros_like(grad_input, dtype=dtype, requires_grad=True)
        pooled = _roi_align(features, rois, **options)
        (grad,) = torch.autograd.grad(pooled, features, grad_output.to(dtype))
    grad_input.copy_(grad)


def _deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: dict[str, int],
) -> Tensor:
    """torchvision's counterpart, which reads the kernel's size and the groups from the shapes.

    Args:
        geometry: mmcv calls the stride ``dH`` in the plain op, ``stride_h`` in the modulated one,
            and the padding and dilation alike.
    """
    stride, padding, dilation = (
        tuple(
            geometry.get(f'{name}{axis.upper()}', geometry.get(f'{long}_{axis}')) for axis in 'hw'
        )
        for name, long in (('d', 'stride'), ('pad', 'pad'), ('dilation', 'dilation'))
    )
    dtype = _working_dtype(input, weight)
    return torchvision.ops.deform_conv2d(
        *(tensor.to(dtype) for tensor in (input, offset, weight)),
        mask=None if mask is None else mask.to(dtype),
        bias=None if bias is None else bias.to(dtype),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def _deform_conv_gradients(
    grad_output: Tensor, tensors: tuple[Tensor | None, ...], geometry: dict[str, int]
) -> tuple[Tensor, ...]:
    """The gradients by the tensors of :func:`_deform_conv`, without those that are None."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors if tensor is not None]
    input, offset, weight, *others = leaves
    mask, bias = (None if tensor is None else others.pop(0) for tensor in tensors[3:])
    with torch.enable_grad():
        output = _deform_conv(input, offset, weight, mask, bias, geometry)
    return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: int,
) -> None:
    """Write the deformable convolution (arXiv 1703.06211) into ``output``.

    Args:
        input: ``(n, c, h, w)``.
        weight: ``(o, c / groups, kh, kw)``.
        offset: ``(n, deform_groups * kh * kw * 2, oh, ow)`` pixels, y before x.
        output: ``(n, o, oh, ow)`` buffer.
        columns: working memory of the compiled op.
        ones: the same.
        geometry: ``dH``, ``dW`` (the stride), ``padH``, ``padW``, ``dilationH`` and ``dilationW``;
            the others follow from the shapes.
    """
    output.copy_(_deform_conv(input, offset, weight, None, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Write the gradients of :func:`deform_conv_forward` by input and offset into the buffers."""
    tensors = (input, offset, weight, None, None)
    by_input, by_offset, _ = _deform_conv_gradients(grad_output, tensors, geometry)
    grad_input.copy_(by_input)
    grad_offset.copy_(by_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: int,
) -> None:
    """Add the gradient of :func:`deform_conv_forward` by the weight to ``grad_weight``."""
    # The convolution is linear in its weight, so that its derivative at zero holds everywhere.
    tensors = (input, offset, torch.zeros_like(grad_weight), None, None)
    *_, by_weight = _deform_conv_gradients(grad_output, tensors, geometry)
    grad_weight.add_(by_weight, alpha=geometry['scale'])


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Write the modulated deformable convolution (DCNv2, arXiv 1811.11168) into ``output``.

    Args:
        input: as in :func:`deform_conv_forward`, and so ``weight``, ``offset`` and ``output``.
        bias: ``(o,)``, or empty.
        mask: ``(n, deform_groups * kh * kw, oh, ow)`` factors of what is sampled.
        ones: working memory of the compiled op, and so ``columns``.
        with_bias: whether there is a bias.
        geometry: ``stride_h``, ``pad_h``, ``dilation_h``, and the same with ``_w``; the others
            follow from the shapes.
    """
    output.copy_(_deform_conv(input, offset, weight, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Write the gradients of :func:`modulated_deform_conv_forward` into the buffers."""
    tensors = (input, offset, weight, mask, bias if with_bias else None)
    gradients = _deform_conv_gradients(grad_output, tensors, geometry)
    buffers = (grad_input, grad_offset, grad_weight, grad_mask, grad_bias)
    for buffer, gradient in zip(buffers, gradients, strict=False):
        buffer.copy_(gradient)


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159) as mmcv computes it on a CPU.

    Args:
        value: ``(n, s, heads, d)``, all levels one after the other.
        spatial_shapes: ``(levels, 2)`` heights and widths.
        level_start_index: follows from the shapes.
        sampling_locations: ``(n, q, heads, levels, points, 2)`` in 0..1, x before y.
        attention_weights: ``(n, q, heads, levels, points)``.
        im2col_step: how the compiled op divides its work.

    Returns:
        ``(n, q, heads * d)``.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(
        value, spatial_shapes, sampling_locations, attention_weights
    )


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`ms_deform_attn_forward` into the buffers."""
    tensors = (value, sampling_locations, attention_weights)
    leaves = value, locations, weights = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        output = ms_deform_attn_forward(
            value, spatial_shapes, level_start_index, locations, weights, im2col_step
        )
    gradients = torch.autograd.grad(output, leaves, grad_output)
    for buffer, gradient in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True
    ):
        buffer.copy_(gradient)


def get_compiler_version() -> str:
    """What environment reports print as mmcv's compiler, and as its CUDA compiler."""
    return 'none (torchvision stands in)'


get_compiling_cuda_version = get_compiler_version


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A function that raises :class:`MissingOpError`, for every op without a stand-in."""
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing_op(*args: object, **kwargs: object) -> NoReturn:
        raise MissingOpError(
            f"mmcv's compiled op '{name}' is not available, because this mmcv was installed "
            f'without compiled ops and torchvision has no counterpart: {_COMPILE_HINT}.'
        )

    missing_op.__name__ = missing_op.__qualname__ = name
    return missing_op


if os.environ.get('RANK', '0') == '0':
    print_log(
        "torchvision stands in for mmcv's compiled ops, which this mmcv was installed without",
        logger='current',
        level=logging.INFO,
    )
