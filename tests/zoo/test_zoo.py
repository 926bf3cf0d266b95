"""Experts in the models of the toolboxes' shipped configs, made tiny, against the dense models."""

import copy
import dataclasses
import math

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint, save_checkpoint, set_random_seed
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from running import CONFIGS
from zoo_cases import (
    CASES,
    DETECTORS,
    FOUR,
    SIZE,
    TOKENS,
    batch,
    build,
    shrink,
    tiny_config,
    with_experts,
)

from mmdet_moe import moe
from mmdet_moe.engine.dry_run import dry_run
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.flops import counting
from mmdet_moe.moe.surgery.paths import find_places
from mmdet_moe.moe.surgery.survey import survey

ZOO = sorted((CONFIGS / 'zoo').glob('*.py'))


def all_cases(test):
    """On every model; the samples of the tests take turns, so that none is left out."""
    return pytest.mark.sweep(keep=1 / 6)(
        pytest.mark.parametrize('case', CASES.values(), ids=CASES)(test)
    )


def build_pair(case, **options):
    """The dense model and the one with experts, with weights of their own."""
    model = tiny_config(case).model
    return build(model, case), build(with_experts(model, case, **options), case)


def losses_of(model, case):
    losses = model.train()(**model.data_preprocessor(batch(case), training=True), mode='loss')
    return model.parse_losses(losses)[0]


@torch.no_grad()
def outputs_of(model, case, mode='tensor'):
    return model.eval()(**model.data_preprocessor(batch(case), training=False), mode=mode)


def tensors_in(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [t for value in values if value is not None for t in tensors_in(value)]


def assert_same(outputs, expected, **tolerance):
    outputs, expected = tensors_in(outputs), tensors_in(expected)
    assert len(outputs) == len(expected) > 0
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference, **tolerance)


def shake(model):
    """Expert for expert and batch norm for batch norm, no two are alike afterwards."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value += 0.02 * torch.randn_like(value)


@all_cases
def test_outputs_equal_the_dense_models_and_survive_a_round_trip(case, tmp_path):
    dense, model = build_pair(case)
    losses_of(dense, case)  # so that batch norm has seen something
    save_checkpoint(dense.state_dict(), str(tmp_path / 'dense.pth'))

    load_checkpoint(model, str(tmp_path / 'dense.pth'))

    assert type(model) is type(dense)
    assert_same(outputs_of(model, case), outputs_of(dense, case), atol=1e-5, rtol=1e-5)
    for layer in moe.find_moe_layers(model).values():
        assert layer.routing.expert_ids.shape[1] == 2
    assert len(outputs_of(model, case, 'predict')) == 2

    shake(model)
    other = build_pair(case)[1]
    other.load_state_dict(model.state_dict())
    assert_same(outputs_of(other, case), outputs_of(model, case), atol=0, rtol=0)


@all_cases
def test_initial_weights_are_the_dense_models(case):
    """Number for number, in every expert: whatever ``init_cfg`` and the classes' own code say."""
    models = []
    for config in (tiny_config(case).model, with_experts(tiny_config(case).model, case)):
        set_random_seed(3)
        models.append(build(config, case, seed=4))
    dense, model = models
    initial = copy.deepcopy(model.state_dict())
    not_loaded, unknown = model.load_state_dict(dense.state_dict(), strict=False)
    routers = tuple(f'{name}.router.' for name in moe.find_moe_layers(model))
    assert all(name.startswith(routers) for name in not_loaded)  # each expert has got a copy
    assert not unknown
    for name, value in model.state_dict().items():
        assert initial[name].equal(value) or name in not_loaded, name


@all_cases
def test_every_call_of_a_layer_is_in_its_routing(case):
    _, model = build_pair(case)
    outputs_of(model, case)
    layers = moe.find_moe_layers(model)
    calls = [len(layer.routing.items_per_level) for layer in layers.values()]
    # A layer that five levels share stands for one entry, a level's own layer for its entry alone.
    assert set(calls) == set(case.calls)
    assert len(layers) >= len(case.experts)


@all_cases
def test_the_experts_gradients_add_up_to_the_dense_layers(case):
    """Copies of the dense layer whose weights sum to 1 share its gradient between them."""
    # No noise, which would take random numbers from the samplers of the losses.
    router = {'type': 'mmdet_moe.GAPRouter', 'noise': False}
    dense, model = build_pair(case, top_k=FOUR['num_experts'], router=router)
    shake(dense)
    model.load_state_dict(dense.state_dict(), strict=False)
    for trained in (dense, model):
        no_dropout(trained)
        set_random_seed(1)
        losses_of(trained, case).backward()

    expected = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    noise = 1e-5 * max(gradient.abs().max().item() for gradient in expected.values())
    learning = 0
    for name, layer in moe.find_moe_layers(model).items():
        for parameter, gradients in gradients_of_experts(layer).items():
            path = dense_path(expected, name, parameter)
            assert len(gradients) == FOUR['num_experts']
            torch.testing.assert_close(sum(gradients), expected[path], atol=noise, rtol=1e-3)
            if expected[path].abs().max() > noise:
                learning += 1
                assert all(gradient.any() for gradient in gradients), path
    assert learning > 0


@pytest.mark.sweep(keep=0.1)
@pytest.mark.parametrize('case', DETECTORS.values(), ids=DETECTORS)
def test_odd_batches_cost_what_they_cost_the_dense_model(case, monkeypatch):
    """One image, images without objects, and one that is 4,000 pixels long."""
    router = {'type': 'mmdet_moe.GAPRouter', 'noise': False}
    dense, model = build_pair(case, top_k=FOUR['num_experts'], router=router)
    model.load_state_dict(dense.state_dict(), strict=False)
    one = {key: values[:1] for key, values in batch(case).items()}
    empty, long = batch(case), copy.deepcopy(one)
    for sample in (*empty['data_samples'], *long['data_samples']):
        sample.gt_instances = sample.gt_instances[:0]
    long['inputs'] = [torch.randint(256, (3, 32, 4000), dtype=torch.uint8)]
    shape = {'img_shape': (32, 4000), 'ori_shape': (32, 4000)}
    long['data_samples'][0].set_metainfo(shape)
    for odd in (one, empty, long):
        monkeypatch.setattr('test_zoo.batch', lambda _, odd=odd: copy.deepcopy(odd))
        losses = []
        for trained in (dense, model):
            no_dropout(trained)
            set_random_seed(1)
            trained.zero_grad()
            losses.append(losses_of(trained, case))
            losses[-1].backward()
            gradients = [p.grad for p in trained.parameters() if p.grad is not None]
            assert all(gradient.isfinite().all() for gradient in gradients)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)


PARTS = ['backbone', 'backbone.layer4', 'neck', 'bbox_head', 'bbox_head.cls_convs_moe']


@pytest.mark.parametrize('part', PARTS)
def test_parts_computed_again_for_their_gradient(part):
    """By ``activation_checkpointing``; the gradients and the states of the constraints."""
    case = CASES['retinanet']
    constraint = {'type': 'mmdet_moe.RelativeImportanceConstraint', 'threshold': 0.0}
    router = {'type': 'mmdet_moe.GAPRouter', 'init_std': 3.0, 'constraint': constraint}
    plain = build_pair(case, router=router)[1]
    shake(plain)
    again = copy.deepcopy(plain)
    turn_on_activation_checkpointing(again, part)
    for model in (plain, again):
        for _ in range(2):
            losses_of(model, case).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in again.named_parameters():
        reference = expected[name].grad
        assert (parameter.grad is None) == (reference is None), name
        if reference is not None:
            noise = 1e-3 * reference.abs().max().item()
            torch.testing.assert_close(parameter.grad, reference, rtol=1e-3, atol=noise, msg=name)
    states = {n: b for n, b in again.named_buffers() if 'constraint' in n}
    assert states
    for name, state in states.items():
        assert torch.equal(state, plain.get_buffer(name)), name


def dense_path(paths, layer, parameter):
    """Where the dense model has the parameter of that name within an expert of the layer."""
    module = layer.removesuffix('_moe')  # what siblings that became one expert go by
    stem = layer.rpartition('.')[0] if module != layer else layer
    (path,) = [
        path for path in paths if path.startswith(f'{stem}.') and path.endswith(f'.{parameter}')
    ]
    return path


def no_dropout(model):
    """Experts would drop other numbers than the dense layer."""
    for module in model.modules():
        for field in ('p', 'drop_prob', 'dropout'):
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)


def gradients_of_experts(layer):
    """Name within one expert to its gradients, expert after expert."""
    gradients = {}
    for name, parameter in layer.experts.named_parameters():
        if not parameter.requires_grad:
            continue
        expert, _, inner = name.partition('.')
        assert parameter.grad is not None, name
        if expert.isdigit():
            gradients.setdefault(inner, []).append(parameter.grad)
        else:  # stacked: the experts are the first dimension
            gradients[name] = list(parameter.grad)
    return gradients


@all_cases
def test_an_iteration_of_the_runner(case, tmp_path):
    config = tiny_config(case)
    config.model = with_experts(config.model, case)
    config.custom_hooks = [
        *config.get('custom_hooks', []),
        {'type': 'mmdet_moe.ExpertUtilizationHook'},
        {'type': 'mmdet_moe.BalancingLossHook', 'loss': {'type': 'mmdet_moe.ImportanceLoss'}},
    ]
    runner = run_one_iteration(config, case, tmp_path)
    assert len(moe.find_moe_layers(runner.model)) == len(moe.report_of(runner.model).rows) > 0


@pytest.mark.parametrize('path', ZOO, ids=lambda path: path.stem)
def test_a_config_of_the_zoo_takes_eight_lines_and_trains(path, tmp_path):
    text = path.read_text()
    # The tiny options of a model serve all of the shipped configs in its folder.
    case = next(case for case in CASES.values() if case.config.split('/')[0] in text)
    assert len(text.splitlines()) <= 8
    run_one_iteration(shrink(Config.fromfile(path), case), case, tmp_path)


@all_cases
def test_report_knows_what_the_dense_model_costs(case):
    """FLOPs and parameters, against the dense model itself."""
    dense, model = build_pair(case)
    model.load_state_dict(dense.state_dict(), strict=False)
    run, run_dense = (dry_run(m, case.toolbox, (SIZE, SIZE), num_images=1) for m in (model, dense))
    with counting(dense) as counter:
        run_dense()
    report = moe.report_of(model, run)
    assert len(report.rows) == len(moe.find_moe_layers(model))
    assert report.whole.dense == sum(p.numel() for p in dense.parameters())
    assert report.whole.dense_flops == counter.get_total_flops()
    assert report.whole.flops > report.whole.dense_flops


@all_cases
def test_what_is_listed_can_become_experts(case):
    """One module of each class, in every way; and what the case makes experts of is listed."""
    dense = build(tiny_config(case).model, case).eval()
    run, *also = (
        dry_run(dense, case.toolbox, (SIZE, SIZE), mode=mode)
        for mode in ('tensor', 'predict', 'loss')
    )
    infos = survey(dense, run, also=also)
    ways = {
        (path, way): info for info in infos for path in info.paths for way in info.granularities
    }
    for path, way in {(info.kind, way): (path, way) for (path, way), info in ways.items()}.values():
        entry = {'at': path, 'granularity': way, 'in_channels': ways[path, way].in_channels}
        model = copy.deepcopy(dense)
        moe.add_experts(model, [{**FOUR, **entry, 'grid_size': 1 + (way == 'patch')}])
        outputs_of(model, case, 'predict')
        assert model.get_submodule(path).has_run
    called = {path for info in infos for path in info.paths if info.obstacle != 'is frozen'}
    for entry in case.experts:
        for place in find_places(dense, entry['at'], entry.get('every')):
            way = entry.get('granularity', 'image')
            assert (str(place), way) in ways or str(place) not in called


def run_one_iteration(config: Config, case, work_dir):
    """Train on one batch; every layer is balanced, and its router changes."""
    config = copy.deepcopy(config)
    images = {'type': 'mmdet_moe.ZooImages', 'toolbox': case.toolbox, 'with_masks': case.with_masks}
    config.train_dataloader = {
        'batch_size': 2,
        'num_workers': 0,
        'sampler': {'type': 'DefaultSampler', 'shuffle': False},
        'dataset': images,
    }
    config.train_cfg = {'type': 'IterBasedTrainLoop', 'max_iters': 1}
    config.param_scheduler = None
    for part in ('dataloader', 'cfg', 'evaluator'):
        config[f'val_{part}'] = config[f'test_{part}'] = None
    config.default_hooks.checkpoint = None
    config.work_dir = str(work_dir)
    runner = Runner.from_cfg(config)
    layers = moe.find_moe_layers(runner.model)
    assert layers
    before = {name: copy.deepcopy(layer.router.state_dict()) for name, layer in layers.items()}
    runner.train()
    balanced = any('BalancingLoss' in hook['type'] for hook in config.custom_hooks)
    for name, layer in layers.items():
        if balanced:
            paid = runner.message_hub.get_scalar(
                f'train/loss_moe_{name.replace(".", "_")}'
            ).current()
            assert math.isfinite(paid)
        changed = {k for k, v in layer.router.state_dict().items() if not v.equal(before[name][k])}
        assert changed, name
    return runner


@pytest.mark.parametrize(
    ('name', 'at', 'reason'),
    [
        # Convolutions that the levels share (share_conv).
        ('rtmdet', 'bbox_head.cls_convs.*', 'shares its weights with'),
        # What comes out between the two is the centerness' input, too.
        ('fcos', 'bbox_head.{cls_convs,conv_cls}', 'uses what comes out between'),
        ('atss', 'bbox_head.{reg_convs,atss_reg}', 'uses what comes out between'),
        # The outputs of all are concatenated.
        ('tood', 'bbox_head.inter_convs', 'uses what comes out between'),
        ('tood', 'bbox_head.cls_decomp', 'another tensor'),
        # Functional activations in between.
        ('faster_rcnn', 'roi_head.bbox_head.shared_fcs', 'uses what comes out between'),
        ('faster_rcnn', 'neck', 'called with a tuple'),
        ('ssd', 'backbone.features', 'iterates over'),
        # Runs in parallel.
        ('retinanet', 'neck.lateral_convs', 'layer 2 of 3.*not run one after the other.*channels'),
        # They look at several tokens at once, as none does that is called with one.
        ('detr', 'encoder.layers.*', 'single tokens.*AssertionError'),
        ('swin', 'backbone.stages.*.blocks.*', 'single tokens.*ValueError'),
        ('detr', 'encoder.layers.*.self_attn', 'called with keywords alone'),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(name, at, reason):
    is_tokens = any(part in at for part in ('fcs', 'encoder', 'blocks'))
    granularity = 'token' if is_tokens else 'image'
    entry = {'at': at, **FOUR, 'granularity': granularity}
    case = dataclasses.replace(CASES[name], experts=(entry,))
    with pytest.raises(ConfigError, match=reason):
        outputs_of(build_pair(case)[1], case)


# Plain PyTorch -----------------------------------------------------------------------------------


def timm_resnet():
    timm = pytest.importorskip('timm')
    model = timm.create_model('resnet18', num_classes=3, channels=(8, 16, 32, 64), stem_width=8)
    paths = {'layer4': FOUR, 'layer3.*.conv1': FOUR}
    return (
        model.double(),
        paths,
        lambda model: model(torch.ones(2, 3, SIZE, SIZE).double().cumsum(3) / SIZE),
    )


def torchvision_faster_rcnn():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    backbone = resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=5)
    model = FasterRCNN(
        backbone,
        box_head=TwoMLPHead(256 * 49, 32),
        box_predictor=FastRCNNPredictor(32, 4),
        min_size=SIZE,
        max_size=SIZE,
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=10,
    )
    paths = {'roi_heads.box_head.fc6': TOKENS, 'backbone.body.layer4': FOUR, 'rpn.head.conv': FOUR}
    images = list(torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64))
    boxes = torch.tensor([[4.0, 5.0, 18.0, 20.0], [3.0, 8.0, 60.0, 55.0]], dtype=torch.float64)
    targets = [{'boxes': boxes, 'labels': torch.tensor([1, 2])}] * 2

    def call(model):
        if not model.training:
            return [list(detections.values()) for detections in model(images)]
        return torch.stack(list(model(images, targets).values()))

    return model.double(), paths, call


@pytest.mark.parametrize('make', [timm_resnet, torchvision_faster_rcnn])
def test_plain_pytorch(make):
    dense, paths, call = make()
    shake(dense)
    call(dense.train())
    expected = call(dense.eval())
    model = copy.deepcopy(dense)

    moe.add_experts(model, paths)

    assert set(moe.find_moe_layers(model)) >= {path for path in paths if '*' not in path}
    assert_same(call(model), expected, atol=1e-5, rtol=1e-5)
    fresh = make()[0].eval()
    moe.add_experts(fresh, paths)
    fresh.load_state_dict(dense.state_dict(), strict=False)
    assert_same(call(fresh), expected, atol=1e-5, rtol=1e-5)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    call(model.train()).square().sum().backward()
    for name, layer in moe.find_moe_layers(model).items():
        for parameter in layer.experts.parameters():
            assert parameter.grad is not None, name
        assert any(p.grad is not None and p.grad.any() for p in layer.experts.parameters()), name
    optimizer.step()
    fresh.load_state_dict(model.state_dict())
    assert_same(call(fresh.eval()), call(model.eval()), atol=0, rtol=0)
