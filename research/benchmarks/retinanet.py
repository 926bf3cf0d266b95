"""The MoE RetinaNet against dense ones: a training iteration, and the head alone."""

import bisect
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from mmdet.registry import MODELS as DETECTORS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmdet_moe.moe import BalancingLoss, find_moe_layers
from mmdet_moe.registry import MODELS
from research.benchmarks.harness import (
    PASSES,
    Alternative,
    Benchmark,
    Computation,
    Inputs,
    Results,
    waits,
)
from research.runs import REPOSITORY, quiet

STRIDES = (8, 16, 32, 64, 128)
MOE, DENSE = 'MoE', 'dense'
#: The same model whose experts compute one pyramid level after the other.
BY_LEVEL = 'MoE, level by level'
#: Images, and their height and width in px.
GPU_BATCHES = ((2, 800), (16, 800))
#: Iterations before the first one that is timed.
GPU_WARM_UP = 40


def run_retinanet(bench: Benchmark, image_size: int) -> None:
    """A training iteration, and the head alone, against a dense head of the same active FLOPs.

    On a GPU, whose time for 2 small images would be that of starting operations, the iteration is
    measured for the batches of :data:`GPU_BATCHES` instead, in both memory formats.
    """
    cfg = Config.fromfile(REPOSITORY / 'configs' / 'retinanet_moe_soft_coco.py')
    dense_cfg = Config.fromfile(REPOSITORY / 'configs' / 'retinanet_dense_coco.py')
    width = _width_of_same_flops(dense_cfg.model, cfg.model.bbox_head.top_k, image_size)
    baseline = f'dense, head of {width} channels'
    wide = copy.deepcopy(dense_cfg.model)
    wide.bbox_head.feat_channels = width
    models = {
        name: _build_detector(model).to(bench.device)
        for name, model in ((MOE, cfg.model), (baseline, wide), (DENSE, dense_cfg.model))
    }
    # Experts that are copies of the dense subnets compute what these compute: something to check.
    models[MOE].load_state_dict(models[DENSE].state_dict(), strict=False)
    # Between equal experts a router's gradient is nothing but rounding errors, which its weights
    # would spread into the features. Its noise alone decides as well.
    for layer in find_moe_layers(models[MOE]).values():
        nn.init.zeros_(layer.router.fc.weight)
    hook = next(hook for hook in cfg.custom_hooks if hook.type.endswith('BalancingLossHook'))
    balancing = MODELS.build(hook.loss)
    if bench.device.type == 'cuda':
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for model in models.values():
                model.to(memory_format=memory_format)
            for images, size in GPU_BATCHES:
                batch = _batch(models[DENSE], size, images)
                _compare_iterations(
                    bench, models, batch, balancing, baseline, f'{memory_format}'.split('.')[-1]
                )
        return
    batch = _batch(models[DENSE], image_size)
    _compare_heads(bench, models, batch['inputs'], baseline)
    _compare_iterations(bench, models, batch, balancing, baseline)


def _compare_heads(
    bench: Benchmark, models: dict[str, nn.Module], images: Tensor, baseline: str
) -> None:
    with torch.no_grad():
        levels = models[DENSE].extract_feat(images)
    features: Inputs = {f'level {i}': x.detach().requires_grad_() for i, x in enumerate(levels)}

    def computation(name: str) -> Computation:
        head = models[name].bbox_head

        def forward() -> list[Tensor]:
            with _autocast(bench):
                scores, boxes = head(list(features.values()))
            return [*scores, *boxes]

        return Computation(name, forward, features | dict(head.named_parameters()))

    heads = {name: computation(name) for name in models}
    counts = {
        name: f'{_count_flops(head.function) / 2e9:.4g} G multiply-adds forward'
        for name, head in heads.items()
    }
    for pass_ in PASSES:
        expected = {
            name: value
            for name, value in heads[DENSE].run(pass_).items()
            # A dense head and a mixture have no parameters in common.
            if name.startswith(('output', 'gradient of level'))
        }
        bench.compare(
            f'head alone; {pass_}',
            [
                head.row(pass_, expected if name == MOE else None, note=counts[name])
                for name, head in heads.items()
            ],
            baseline=baseline,
            watch=[(MOE, baseline)],
        )


def _compare_iterations(
    bench: Benchmark,
    models: dict[str, nn.Module],
    batch: dict[str, Any],
    balancing: BalancingLoss,
    baseline: str,
    layout: str = 'contiguous_format',
) -> None:
    def losses_of(model: nn.Module) -> dict[str, Any]:
        with _autocast(bench):
            return model.loss(batch['inputs'], batch['data_samples'])

    def iteration_of(model: nn.Module, impl: str = 'auto') -> Callable[[], Results]:
        # With so small a rate the model is the same after hundreds of iterations.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
        layers = find_moe_layers(model)

        def iteration() -> Results:
            for layer in layers.values():
                layer.experts.impl = impl
            losses = losses_of(model)
            results = {name: sum(value).detach() for name, value in losses.items()}
            for name, layer in layers.items():
                losses[f'loss_moe_{name}'] = balancing(layer.routing)
            total, _ = model.parse_losses(losses)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            return results

        return iteration

    with torch.no_grad():
        expected = {name: sum(value) for name, value in losses_of(models[DENSE]).items()}
    iterations = {name: iteration_of(model) for name, model in models.items()}
    what = (
        f'{len(batch["inputs"])} images of {"×".join(map(str, batch["inputs"].shape[-2:]))}, '
        f'{layout}'
    )
    notes = dict.fromkeys(iterations, '')
    if bench.device.type == 'cuda':  # a CPU goes level by level anyway
        iterations[BY_LEVEL] = iteration_of(models[MOE], 'levels')
        # A router's decisions change the sizes of what experts compute, and cuDNN plans each new
        # size once: what a training soon has behind it.
        for run in (iterations[MOE], iterations[BY_LEVEL]):
            for _ in range(GPU_WARM_UP):
                run()
        notes = {
            name: f'the host waits {len(waits(run))} times' for name, run in iterations.items()
        }
    comparison = bench.compare(
        f'training iteration (loss, gradients, SGD step), {what}',
        [
            Alternative(name, run, expected if name in (MOE, BY_LEVEL) else None, note=notes[name])
            for name, run in iterations.items()
        ],
        baseline=baseline,
        watch=[(MOE, baseline)],
    )
    bench.target(
        f'training iteration, {what}: MoE at most 1.10x of the dense model with the same active '
        'FLOPs',
        comparison.ratio(MOE, baseline),
        at_most=1.10,
    )


def _autocast(bench: Benchmark) -> torch.autocast:
    return torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32)


def _build_detector(cfg: ConfigDict) -> nn.Module:
    cfg = copy.deepcopy(cfg)
    cfg.backbone.init_cfg = None  # no pretrained weights: nothing to download
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = DETECTORS.build(cfg)
        with quiet():
            model.init_weights()
    return model.train()


def _batch(model: nn.Module, size: int, images: int = 2) -> dict[str, Any]:
    return model.data_preprocessor(_synthetic_batch(size, images), training=True)


def _synthetic_batch(size: int, images: int) -> dict[str, list]:
    """Images of noise with eight boxes each."""
    samples = []
    for _ in range(images):
        corner = torch.rand(8, 2) * size * 0.6
        extent = (0.05 + 0.3 * torch.rand(8, 2)) * size
        sample = DetDataSample(metainfo={'img_shape': (size, size), 'scale_factor': (1.0, 1.0)})
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corner, corner + extent], dim=1),
            labels=torch.randint(80, (8,)),
        )
        samples.append(sample)
    images = [torch.randint(256, (3, size, size), dtype=torch.uint8) for _ in samples]
    return {'inputs': images, 'data_samples': samples}


def _width_of_same_flops(cfg: ConfigDict, k: int, size: int) -> int:
    """Channels of a dense head with k times the FLOPs of the one in ``cfg``, by counting.

    A multiple of 8, which convolutions are fastest with, and rather a little too few than too many.
    """
    sizes = [math.ceil(size / stride) for stride in STRIDES]
    levels = [torch.empty(1, cfg.neck.out_channels, s, s, device='meta') for s in sizes]

    def flops(width: int) -> int:
        with torch.device('meta'):  # counting needs no values
            head = DETECTORS.build({**cfg.bbox_head, 'feat_channels': width})
        return _count_flops(lambda: head(levels))

    base = cfg.bbox_head.feat_channels
    widths = range(8, k * base + 1, 8)
    return widths[bisect.bisect_right(widths, k * flops(base), key=flops) - 1]


def _count_flops(function: Callable[[], object]) -> int:
    """Two for each multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
