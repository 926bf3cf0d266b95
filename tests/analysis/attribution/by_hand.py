"""What the tests of the attribution share: predictions, decisions and priors found by hand."""

import copy
import math

import torch
import torch.nn.functional as F
from tiny_models import CLASSES, predict

from mmdet_moe.moe import find_moe_layers


def state_of(model):
    """What an instance has of its own, besides parameters, and its hooks."""
    found = {}
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[name] = (set(vars(module)), hooks)
        for attribute in ('bbox_coder', 'assigner', 'prior_generator'):
            if attribute in vars(module):
                found[f'{name}.{attribute}'] = set(vars(vars(module)[attribute]))
    return found


def check_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        a, b = a.pred_instances, b.pred_instances
        assert len(a) == len(b)
        for field in ('bboxes', 'scores', 'labels'):
            assert torch.equal(a[field], b[field])


@torch.no_grad()
def every_prior(model, batch):
    """For each image: level, cell, box, scores of every prior, decoded one level after another."""
    data = model.data_preprocessor(copy.deepcopy(batch), False)
    head = model.bbox_head
    scores, deltas, *factors = head(model.extract_feat(data['inputs']))
    sizes = [tuple(level.shape[-2:]) for level in scores]
    decode = _DECODERS.get(type(head).__name__, _standard)
    found = []
    for i, sample in enumerate(data['data_samples']):
        rows = []
        for level, (height, width) in enumerate(sizes):
            score = scores[level][i].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            delta = deltas[level][i].permute(1, 2, 0).reshape(len(score), -1)
            factor = [f[level][i].permute(1, 2, 0).reshape(-1, 1) for f in factors if f is not None]
            box, score = decode(head, level, sizes[level], score, delta, factor, sample.img_shape)
            box = box / torch.tensor(list(sample.scale_factor) * 2)
            per_cell = len(delta) // (height * width)
            cell = torch.arange(len(delta)) // per_cell
            levels = torch.full_like(cell, level)
            rows.append((levels, cell // width, cell % width, box, score))
        found.append([torch.cat(part) for part in zip(*rows, strict=True)])
    return found, sizes


def _standard(head, level, size, score, delta, factors, shape):
    priors = head.prior_generator.single_level_grid_priors(size, level, device='cpu')
    score = score.sigmoid() if head.use_sigmoid_cls else score.softmax(1)[:, :-1]
    for factor in factors:
        score = score * factor.sigmoid()
    return head.bbox_coder.decode(priors, delta, max_shape=shape), score


def _corners(size, stride, offset):
    """(cells, 4): x, y, x, y of the point of every cell."""
    y, x = torch.meshgrid(*(torch.arange(n) for n in size), indexing='ij')
    return (torch.stack([x, y, x, y], -1).reshape(-1, 4) + offset) * stride


def _distances(points, left_top_right_bottom, shape):
    box = points + left_top_right_bottom * torch.tensor([-1.0, -1, 1, 1])
    height, width = shape[:2]
    return torch.minimum(box.clamp(min=0), torch.tensor([width, height] * 2).float())


def _gfl(head, level, size, score, delta, factors, shape):
    """The mean of a distribution over distances, from the middle of the anchor."""
    bins = torch.arange(head.reg_max + 1).float()
    stride = head.prior_generator.strides[level][0]
    mean = (delta.reshape(len(score), 4, -1).softmax(2) * bins).sum(2) * stride
    # The anchors are around the corner of their cell.
    return _distances(_corners(size, stride, 0.0), mean, shape), score.sigmoid()


def _tood(head, level, size, score, delta, factors, shape):
    """The head has done it all, in strides."""
    return delta * head.prior_generator.strides[level][0], score


def _yolox(head, level, size, score, delta, factors, shape):
    """Middle and size; only the best class of a prior counts."""
    stride = head.prior_generator.strides[level][0]
    centre = _corners(size, stride, 0.0)[:, :2] + delta[:, :2] * stride
    half = delta[:, 2:].exp() * stride / 2
    (factor,) = factors
    score = score.sigmoid()
    best = F.one_hot(score.argmax(1), CLASSES).bool()
    score = (score * factor.sigmoid()).masked_fill(~best, -1)
    return torch.cat([centre - half, centre + half], 1), score


def _rtmdet(head, level, size, score, delta, factors, shape):
    points = _corners(size, head.prior_generator.strides[level][0], 0.0)
    return _distances(points, delta, shape), score.sigmoid()


_DECODERS = {
    'GFLHead': _gfl,
    'TOODHead': _tood,
    'YOLOXHead': _yolox,
    'RTMDetHead': _rtmdet,
    'RTMDetSepBNHead': _rtmdet,
}


def candidates_of(detections, image_priors):
    """For each detection the priors with its box and its score."""
    level, row, column, box, score = image_priors
    for i in range(len(detections)):
        label = detections.labels[i]
        same = (score[:, label] - detections.scores[i]).abs() < 1e-6
        same &= ((box - detections.bboxes[i]).abs() < 1e-3).all(1)
        yield same.nonzero().flatten(), level[same], row[same], column[same]


def weights_by_hand(router, vectors):
    """(T, E) of vectors (T, C)."""
    logits = vectors @ router.fc.weight.T + router.fc.bias
    kept = logits >= logits.topk(router.top_k).values[:, -1:]
    return logits.masked_fill(~kept, -math.inf).softmax(1)


@torch.no_grad()
def inputs_of(model, batch):
    """What each MoE layer is given, by its name: the maps of one call after the other."""
    seen, handles = {}, []
    for name, layer in find_moe_layers(model).items():

        def keep(_, args, name=name):
            maps = [args[0]] if isinstance(args[0], torch.Tensor) else list(args[0])
            seen.setdefault(name, []).extend(maps)

        handles.append(layer.register_forward_pre_hook(keep))
    predict(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def traced_weights(tracer, name, places, num_images):
    decisions = tracer.decisions(name, num_images)
    items = tracer.items(name, places)
    weights = torch.full((len(places), decisions.weights.shape[1]), math.nan)
    weights[items >= 0] = decisions.weights[items[items >= 0]]
    return weights, items, decisions


def cells_of(places, sizes):
    """Level, row, column of places."""
    for level, x, y in zip(places.level.tolist(), places.x, places.y, strict=True):
        height, width = sizes[level]
        yield level, math.floor(y * height), math.floor(x * width)


def patch_bounds(length, grid):
    grid = min(grid, length)
    return [i * length // grid for i in range(grid + 1)]


def patch_weights(layer, x, grid, row, column, stride=1):
    """Of the patch of one image's map that holds an output pixel."""
    height, width = (-(-size // stride) for size in x.shape[-2:])
    for top, bottom in zip(*[patch_bounds(height, grid)[k:] for k in (0, 1)], strict=False):
        for left, right in zip(*[patch_bounds(width, grid)[k:] for k in (0, 1)], strict=False):
            if top <= row < bottom and left <= column < right:
                patch = x[:, top * stride : bottom * stride, left * stride : right * stride]
                return weights_by_hand(layer.router, patch.mean((1, 2))[None])[0]
    raise AssertionError
