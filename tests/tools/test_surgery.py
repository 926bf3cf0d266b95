"""Upcycling, pruning and merging of a tiny classifier and a tiny detector, by the whole tools."""

import json
import re

import pytest
import torch
from running import load_tool
from tiny_tools import CLASSIFIER, DETECTOR, Tool, tiny_classifier

from mmdet_moe import cli
from mmdet_moe.analysis.models import load_model
from mmdet_moe.analysis.surgery import merge, prune, top_k, upcycle
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, find_moe_layers
from mmdet_moe.moe.surgery.fewer import set_top_k

WITH_EXPERTS = "type='mmdet_moe.WithExperts', of='ImageClassifier'"
EXPERTS = "experts=[dict(at='head.fc', num_experts=3, top_k=2, granularity='token')],"
HEADS = ('bbox_head.cls_moe', 'bbox_head.reg_moe')


class Classifier(Tool):
    """The tiny classifier with other experts, on the same images."""

    def __init__(self, folder, data, experts=EXPERTS, depth=18):
        folder.mkdir(exist_ok=True)
        text = CLASSIFIER.replace('ROOT', str(data)).replace(EXPERTS, experts)
        text = text.replace('depth=18', f'depth={depth}')
        if not experts:
            text = text.replace(WITH_EXPERTS, "type='ImageClassifier'")
        super().__init__(folder, text, data)

    def run(self, main, parse, out, *more):
        argv = [str(self.config), str(self.checkpoint), *more, '--out', str(out)]
        return main(parse([*argv, '--device', 'cpu', *self.options]))

    def change(self, change):
        """Change the checkpoint's weights."""
        content = torch.load(self.checkpoint)
        change(content['state_dict'])
        torch.save(content, self.checkpoint)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp('classifier')).folder / 'data'


@pytest.fixture(scope='module')
def detector(tmp_path_factory, digit_scenes_folder):
    tool = Tool(tmp_path_factory.mktemp('detector'), DETECTOR, digit_scenes_folder)
    tool.run = lambda *args: Classifier.run(tool, *args)
    tool.change = lambda change: Classifier.change(tool, change)
    return tool


def loaded(config, checkpoint, options=None):
    return load_model(cli.load_config(str(config), options), str(checkpoint), 'cpu')


def outputs(model, size=32):
    """What a model makes of noise, all of it."""
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)) * 60
    with torch.no_grad():
        found = model(images, [None] * 8, mode='tensor')
    found = found if isinstance(found, (tuple, list)) else [found]
    return [t for part in found for t in (part if isinstance(part, (tuple, list)) else [part])]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def said_of(out, folder):
    """What the ordinary test tool says of the two files, without any option."""
    argv = [str(out / 'config.py'), str(out / 'checkpoint.pth'), '--work-dir', str(folder)]
    cli.run_test(argv)
    return next(folder.glob('*/*.json')).read_text()


# Upcycling ---------------------------------------------------------------------------------------


def test_upcycled_classifier(data, tmp_path, capsys):
    dense, moe = Classifier(tmp_path / 'dense', data, ''), Classifier(tmp_path / 'moe', data)
    out = tmp_path / 'new' / 'out'
    argv = [dense.config, dense.checkpoint, moe.config, '--out', out, '--device', 'cpu']
    before, after = upcycle.upcycle_checkpoint(upcycle.parse([*map(str, argv), *dense.options]))
    assert before == after
    assert 'The predicted classes for the 12 images are the same' in capsys.readouterr().out
    assert f'"accuracy/top1": {100 * before["accuracy"]:.4f}'[:22] in said_of(
        out, tmp_path / 'test'
    )
    model, meta = loaded(out / 'config.py', out / 'checkpoint.pth')
    original, _ = loaded(dense.config, dense.checkpoint)
    for one, other in zip(outputs(model), outputs(original), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
    assert meta['epoch'] == 3
    assert meta['surgery'] == [
        f'upcycle: \'{dense.checkpoint}\' has become experts, 3 in "head.fc"'
    ]


def test_upcycled_detector(detector, tmp_path, digit_scenes_folder):
    sparse = "type='mmdet_moe.MoERetinaHead', num_experts=4, top_k=2, "
    text = DETECTOR.replace('retinanet_moe_soft', 'retinanet_dense').replace(' num_experts=3,', '')
    assert sparse not in text
    dense = Tool(tmp_path, text, digit_scenes_folder)
    argv = [dense.config, dense.checkpoint, detector.config, '--out', tmp_path / 'out']
    before, after = upcycle.upcycle_checkpoint(
        upcycle.parse([*map(str, argv), '--max-images', '4', '--device', 'cpu', *dense.options])
    )
    assert after['AP'] == pytest.approx(before['AP'], abs=1e-4)
    model, _ = loaded(tmp_path / 'out' / 'config.py', tmp_path / 'out' / 'checkpoint.pth')
    original, _ = loaded(dense.config, dense.checkpoint)
    for one, other in zip(outputs(model, 64), outputs(original, 64), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_mistakes_in_upcycling(data, tmp_path):
    dense, moe = Classifier(tmp_path / 'dense', data, ''), Classifier(tmp_path / 'moe', data)
    deep = Classifier(tmp_path / 'deep', data, '', depth=34)

    def run(*argv):
        argv = [*map(str, argv), '--out', str(tmp_path / 'out'), *dense.options]
        upcycle.upcycle_checkpoint(upcycle.parse(argv))

    with pytest.raises(ConfigError, match='has no sparse experts'):
        run(dense.config, dense.checkpoint, dense.config)
    with pytest.raises(ConfigError, match='that the dense one has not'):
        run(moe.config, moe.checkpoint, moe.config)
    with pytest.raises(ConfigError, match='lacks'):
        run(dense.config, moe.checkpoint, moe.config)
    with pytest.raises(ConfigError, match=r"no place for \d+ of .* such as 'backbone.layer1.2"):
        run(deep.config, deep.checkpoint, moe.config)
    assert not (tmp_path / 'out').exists()


# Pruning -----------------------------------------------------------------------------------------


def never(name, expert):
    """Let a router never choose an expert."""

    def change(state):
        state[f'{name}.router.fc.bias'][expert] = -1e6

    return change


@pytest.mark.sweep(keep=0.6)
@pytest.mark.parametrize(
    'experts',
    [
        EXPERTS,  # stacked
        EXPERTS.replace("'head.fc'", "'backbone.layer4'").replace("'token'", "'image'"),  # modules
        EXPERTS.replace("'head.fc'", "'backbone.conv1'").replace("'token'", "'image'"),  # kernels
        "experts={'head.fc': dict(num_experts=3, top_k=2, granularity='token', shared=1)},",
        "experts=[dict(at='neck')],backbone_experts=1",
    ],
)
def test_experts_that_nobody_chooses(experts, data, tmp_path, capsys):
    if 'backbone_experts' in experts:  # of a class, in which the number is the default
        experts = ''
    tool = Classifier(tmp_path / 'tool', data, experts)
    if not experts:
        text = tool.config.read_text().replace("type='ResNet_CIFAR'", (
            "type='mmdet_moe.MoEResNet_CIFAR', expert_channels=4"))  # fmt: skip
        tool = Tool(tool.folder, text, data)
        tool.run = lambda *args: Classifier.run(tool, *args)
        tool.change = lambda change: Classifier.change(tool, change)
    keys = torch.load(tool.checkpoint)['state_dict']
    (name,) = {key.partition('.router.')[0] for key in keys if '.router.' in key}
    tool.change(never(name, 1))
    out = tmp_path / 'out'
    more = ['--by', 'load', '--threshold', '0', '--split', 'train']
    before, after = tool.run(prune.prune_checkpoint, prune.parse, out, *more)
    assert before == after
    printed = capsys.readouterr().out
    assert 'The predicted classes for the 12 images are the same' in printed
    assert re.search(rf'^{name} +1 +0\.0000 +0\.0000 +- +removed$', printed, re.MULTILINE)
    said_of(out, tmp_path / 'test')
    model, meta = loaded(out / 'config.py', out / 'checkpoint.pth')
    original, _ = loaded(tool.config, tool.checkpoint)
    assert_same(outputs(model), outputs(original))
    removed = re.findall(rf'^{name} +(\d) .* removed$', printed, re.MULTILINE)
    kept = [e for e in range(original.get_submodule(name).num_experts) if str(e) not in removed]
    assert 1 not in kept
    assert model.get_submodule(name).num_experts == len(kept)
    (note,) = meta['surgery']
    assert f'layer "{name}" has kept the experts {", ".join(map(str, kept))} of' in note
    old, new = (torch.load(f)['state_dict'] for f in (tool.checkpoint, out / 'checkpoint.pth'))
    for entry in ('fc.weight', 'fc.bias', 'noise_fc.weight'):
        entry = f'{name}.router.{entry}'
        assert torch.equal(new[entry], old[entry][kept])


ROUTERS = {
    'relative_importance': "noise=False, constraint=dict(type='RelativeImportanceConstraint')",
    'mean_importance': "noise=False, constraint=dict(type='MeanImportanceConstraint')",
    'bias': "constraint=dict(type='BiasBalancing')",
}


@pytest.mark.parametrize('state', ROUTERS)
def test_states_of_constraints(state, data, tmp_path, capsys):
    router = ROUTERS[state].replace("type='", "type='mmdet_moe.")
    experts = EXPERTS.replace('num_experts=3', f'num_experts=3, router=dict({router})')
    tool = Classifier(tmp_path / 'tool', data, experts)
    key, given = f'head.fc.router.constraint.{state}', torch.tensor([0.5, 0.2, 0.3])

    def change(weights):
        weights[key] = given
        never('head.fc', 1)(weights)

    tool.change(change)
    out = tmp_path / 'out'
    tool.run(prune.prune_checkpoint, prune.parse, out, '--by', 'importance', '--keep', '2')
    wanted = {
        'relative_importance': torch.tensor([0.1, -0.1]),  # sums to 0
        'mean_importance': torch.tensor([0.625, 0.375]),  # sums to 1
        'bias': torch.tensor([0.5, 0.3]),  # of which only the differences count
    }[state]
    torch.testing.assert_close(torch.load(out / 'checkpoint.pth')['state_dict'][key], wanted)
    assert ('goes by the softmax over all' in capsys.readouterr().out) == (state == 'bias')


def test_pruned_detector(detector, tmp_path):
    """Both subnets have one number of experts in the config, and each keeps its own best."""
    for name, expert in zip(HEADS, (0, 2), strict=True):
        detector.change(never(name, expert))
    out, more = tmp_path / 'out', ('--by', 'load', '--keep', '2', '--max-images', '4')
    before, after = detector.run(prune.prune_checkpoint, prune.parse, out, *more)
    assert before == after
    model, meta = loaded(out / 'config.py', out / 'checkpoint.pth')
    original, _ = loaded(detector.config, detector.checkpoint, {'data_root': '/nowhere'})
    for one, other in zip(outputs(model, 64), outputs(original, 64), strict=True):
        torch.testing.assert_close(one, other)
    assert [note.split(' of 3')[0].split('experts ')[-1] for note in meta['surgery']] == [
        '1, 2', '0, 1'
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r'cls_moe: it shares num_experts .* bbox_head.reg_moe'):
        detector.run(
            prune.prune_checkpoint, prune.parse, tmp_path / 'no', *more, '--layer', HEADS[0]
        )


def test_effect_of_removal(data, tmp_path, capsys):
    tool = Classifier(tmp_path / 'tool', data)
    more = ['--by', 'effect', '--threshold', '-1', '--layer', 'head.fc']
    with pytest.raises(ConfigError, match='every expert has more effect'):
        tool.run(prune.prune_checkpoint, prune.parse, tmp_path / 'out', *more)
    more = ['--by', 'effect', '--keep', '2']
    before, after = tool.run(prune.prune_checkpoint, prune.parse, tmp_path / 'out', *more)
    rows = re.findall(r'^head.fc .* ([+-]\d\.\d+) +(kept|removed)$', capsys.readouterr().out, re.M)
    (lost,) = [float(effect) for effect, fate in rows if fate == 'removed']
    assert lost == min(float(effect) for effect, _ in rows)
    assert before['accuracy'] - after['accuracy'] == pytest.approx(lost, abs=1e-4)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (('--keep', '1'), r'top_k=2 experts for each item and would be left with 1 of 3'),
        (('--keep', '3'), r'--keep 3: layer "head.fc" has 3 experts; keep fewer'),
        (('--threshold', '2'), r'would be left with 0 of 3'),
        (('--keep', '2', '--layer', 'head'), r'no sparse layer of that name; there is head.fc'),
        (('--keep', '2', '--out', 'FILE'), r'is a file; choose a folder'),
    ],
)
def test_mistakes_in_pruning(more, message, data, tmp_path):
    tool = Classifier(tmp_path / 'tool', data)
    more = [str(tool.config) if part == 'FILE' else part for part in more]
    argv = [str(tool.config), str(tool.checkpoint), '--out', str(tmp_path / 'out'), '--by', 'load']
    with pytest.raises(ConfigError, match=message):
        prune.prune_checkpoint(prune.parse([*argv, *more, *tool.options]))
    assert not (tmp_path / 'out').exists()


def test_experts_that_several_ranks_would_hold(data, tmp_path):
    """In one process the field does nothing, and what is written has to be possible with it."""
    experts = EXPERTS.replace('num_experts=3', 'num_experts=4, expert_parallel=2')
    tool = Classifier(tmp_path / 'tool', data, experts)
    argv = [str(tool.config), str(tool.checkpoint), '--by', 'load']
    message = r'^model\.experts\.0\.expert_parallel=2 does not divide the 3 experts'
    with pytest.raises(ConfigError, match=message):
        prune.prune_checkpoint(
            prune.parse([*argv, '--keep', '3', '--out', str(tmp_path / 'three'), *tool.options])
        )
    tool.run(prune.prune_checkpoint, prune.parse, tmp_path / 'two', '--by', 'load', '--keep', '2')
    model, _ = loaded(*(tmp_path / 'two' / n for n in ('config.py', 'checkpoint.pth')))
    assert model.head.fc.num_experts == 2


def test_what_is_there_stays(data, tmp_path):
    tool = Classifier(tmp_path / 'tool', data)
    more = ['--by', 'load', '--keep', '2']
    tool.run(prune.prune_checkpoint, prune.parse, tmp_path / 'out', *more)
    with pytest.raises(ConfigError, match=r'exists; choose another folder, or use --overwrite'):
        tool.run(prune.prune_checkpoint, prune.parse, tmp_path / 'out', *more)
    tool.run(prune.prune_checkpoint, prune.parse, tmp_path / 'out', *more, '--overwrite')
    tool.config, tool.checkpoint = (tmp_path / 'out' / n for n in ('config.py', 'checkpoint.pth'))
    with pytest.raises(ConfigError, match='is what is read'):
        tool.run(prune.prune_checkpoint, prune.parse, tmp_path / 'out', *more, '--overwrite')


# Merging -----------------------------------------------------------------------------------------


def test_average_is_the_mean_of_linear_experts(data, tmp_path):
    experts = EXPERTS.replace('num_experts=3, top_k=2', 'num_experts=4, top_k=4, shared=1')
    tool = Classifier(tmp_path / 'tool', data, experts)
    tool.change(lambda state: state['head.fc.router.fc.weight'].zero_())  # equal weights
    out = tmp_path / 'out'
    before, after = tool.run(merge.merge_checkpoint, merge.parse, out, '--how', 'average')
    assert before == after
    assert 'accuracy' in said_of(out, tmp_path / 'test')
    cfg = cli.load_config(str(out / 'config.py'))
    assert cfg.model.type == 'ImageClassifier'
    model, meta = loaded(out / 'config.py', out / 'checkpoint.pth')
    original, _ = loaded(tool.config, tool.checkpoint)
    torch.testing.assert_close(outputs(model), outputs(original))
    assert meta['surgery'][0].endswith('of "head.fc", how=average, weights=uniform')
    dense = Classifier(tmp_path / 'dense', data, '')
    assert model.state_dict().keys() == torch.load(dense.checkpoint)['state_dict'].keys()


def test_one_expert_of_a_detector(detector, tmp_path, digit_scenes_folder):
    out = tmp_path / 'out'
    detector.run(merge.merge_checkpoint, merge.parse, out, '--how', 'expert=1', '--max-images', '2')
    cfg = cli.load_config(str(out / 'config.py'))
    assert cfg.model.bbox_head.type == 'mmdet.RetinaHead'
    assert 'BalancingLossHook' not in (out / 'config.py').read_text()
    old, new = (torch.load(f)['state_dict'] for f in (detector.checkpoint, out / 'checkpoint.pth'))
    for name in ('cls_convs.0.conv.weight', 'retina_cls.bias'):
        assert torch.equal(new[f'bbox_head.{name}'], old[f'bbox_head.cls_moe.experts.1.{name}'])
    assert 'bbox_mAP' in said_of(out, tmp_path / 'test')


def test_average_by_load(data, tmp_path):
    tool = Classifier(tmp_path / 'tool', data)
    tool.change(never('head.fc', 1))
    more = ['--how', 'average', '--weights', 'load']
    tool.run(merge.merge_checkpoint, merge.parse, tmp_path / 'out', *more)
    # Two are left for every image, and both have every image.
    old, new = (
        torch.load(f)['state_dict'] for f in (tool.checkpoint, tmp_path / 'out' / 'checkpoint.pth')
    )
    mean = old['head.fc.experts.weight'][[0, 2]].mean(0)
    torch.testing.assert_close(new['head.fc.weight'], mean)


def test_a_dense_config_of_ones_own(data, tmp_path):
    tool = Classifier(tmp_path / 'tool', data)
    for depth in (34, 18):
        given = Classifier(tmp_path / f'dense{depth}', data, '', depth).config
        more = ['--how', 'average', '--dense-config', str(given)]
        if depth == 34:
            with pytest.raises(ConfigError, match='is not the config of its dense model'):
                tool.run(merge.merge_checkpoint, merge.parse, tmp_path / 'out', *more)
            assert not (tmp_path / 'out').exists()
    tool.run(merge.merge_checkpoint, merge.parse, tmp_path / 'out', *more)
    model, _ = loaded(tmp_path / 'out' / 'config.py', tmp_path / 'out' / 'checkpoint.pth')
    assert model.head.fc.weight.shape == (3, 32)


def test_distillation(data, tmp_path, monkeypatch):
    """The dense layers come closer to what the experts give than their start; no label is seen."""
    experts = EXPERTS.replace("'head.fc'", "'backbone.layer4'").replace("'token'", "'image'")
    tool = Classifier(tmp_path / 'tool', data, experts)
    # Two experts for every image, with equal weights.
    tool.change(lambda state: state['backbone.layer4.router.fc.weight'].zero_())
    errors = []
    loss = merge._loss
    monkeypatch.setattr(merge, '_loss', lambda *a: errors.append(loss(*a)) or errors[-1])
    more = ['--how', 'distill', '--iterations', '30', '--lr', '3e-3']
    tool.run(merge.merge_checkpoint, merge.parse, tmp_path / 'out', *more)
    starts, course = errors[:4], errors[4:]
    assert len(course) == 30
    assert course[0] == min(starts)
    assert sum(course[-3:]) < 0.5 * sum(course[:3])
    assert 'accuracy' in said_of(tmp_path / 'out', tmp_path / 'test')


MUMOE = "experts=[dict(at='head.fc', type='mmdet_moe.CPMuMoE', num_experts=3, rank=4, norm='ln')],"


@pytest.mark.parametrize(
    ('experts', 'how', 'message'),
    [
        (EXPERTS, 'middle', r"--how middle: it must be 'average', 'expert=I'"),
        (EXPERTS, 'expert=x', r"--how expert=x: it must be 'average', 'expert=I'"),
        (EXPERTS, 'expert=3', r'layer "head.fc" has 3 experts, counted from 0'),
        (EXPERTS.replace('top_k=2', 'residual=True').replace("'head.fc'", "'backbone.layer4'")
         .replace("'token'", "'image'"), 'average', 'adds a shortcut to its experts'),
        (EXPERTS.replace('top_k=2', 'width=0.5').replace("'head.fc'", "'backbone.layer4'")
         .replace("'token'", "'image'"), 'average', 'not as wide as the dense layer'),
        (MUMOE, 'average', 'is a μMoE'),
        (EXPERTS, 'average --lr 1', '--lr is for --how distill; --how average trains nothing'),
        (EXPERTS, 'expert=1 --weights load', '--weights load: --how expert=1 has nothing to weigh'),
        (EXPERTS, 'distill --iterations 0', '--iterations=0 must be'),
    ],
)  # fmt: skip
def test_mistakes_in_merging(experts, how, message, data, tmp_path):
    tool = Classifier(tmp_path / 'tool', data, experts)
    with pytest.raises(ConfigError, match=message):
        tool.run(merge.merge_checkpoint, merge.parse, tmp_path / 'out', '--how', *how.split())
    assert not (tmp_path / 'out').exists()


# Another k, and what experts cost ----------------------------------------------------------------


def told_of_both(tool, k, folder):
    """What ``tools/test.py --top-k`` says of the metric, with the usual k and with this one."""
    argv = [str(tool.config), str(tool.checkpoint), '--work-dir', str(folder)]
    cli.run_test([*argv, '--top-k', str(k), *tool.options])
    table = r'top_k=\d +top_k=\d\n\S+(?:/top1|bbox_mAP) +(\S+) +(\S+)'
    return [float(v) for v in re.search(table, next(folder.glob('*/*.log')).read_text()).groups()]


BLOCKS = EXPERTS.replace("'head.fc'", "'backbone.layer4'").replace("'token'", "'image'")
OF_ALL = "router=dict(type='mmdet_moe.GAPRouter', noise=False), "


@pytest.mark.sweep(keep=0.6)
@pytest.mark.parametrize(
    ('experts', 'k', 'router'),
    [
        (EXPERTS, 1, {'softmax': 'straight_through'}),  # 'over_chosen' is refused for k = 1
        (EXPERTS, 3, {'softmax': 'over_chosen'}),
        (EXPERTS.replace('top_k=2', 'top_k=1'), 2, {'softmax': 'over_all'}),  # by default for k = 1
        (BLOCKS.replace('top_k=2', "top_k=2, width='equal'"), 1, {'softmax': 'straight_through'}),
        (OF_ALL + EXPERTS, 3, {'type': 'mmdet_moe.GAPRouter', 'noise': False,
                               'softmax': 'over_chosen'}),
    ],
)  # fmt: skip
def test_another_k_to_keep(experts, k, router, data, tmp_path, capsys):
    """The written pair is the model whose k is set by hand, and has what the test tool says."""
    tool, out = Classifier(tmp_path / 'tool', data, experts), tmp_path / 'out'
    # Every expert has its say.
    tool.change(lambda s: [v.mul_(0.01) for n, v in s.items() if n.endswith('router.fc.weight')])
    before, after = tool.run(top_k.change_top_k, top_k.parse, out, '--top-k', str(k))
    found = told_of_both(tool, k, tmp_path / 'twice')
    assert [100 * m['accuracy'] for m in (before, after)] == pytest.approx(found, abs=1e-4)
    said = json.loads(said_of(out, tmp_path / 'test'))['accuracy/top1']
    assert said == pytest.approx(found[1], abs=1e-4)
    model, meta = loaded(out / 'config.py', out / 'checkpoint.pth')
    original, _ = loaded(tool.config, tool.checkpoint)
    unchanged = outputs(original)
    ((name, layer),) = find_moe_layers(original).items()
    usual, layer.top_k, layer.router.top_k = layer.top_k, k, k
    for one, other, old in zip(outputs(model), outputs(original), unchanged, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))
        assert not torch.allclose(one, old, rtol=1e-3)
    (note,) = meta['surgery']
    assert note == f'set_top_k: layer "{name}" chooses {k} of 3 experts instead of {usual}'
    assert note in capsys.readouterr().out
    (entry,) = cli.load_config(str(out / 'config.py')).model.experts
    assert entry.router == router


def test_another_k_of_a_detector(detector, tmp_path):
    """Both subnets have one k in the config."""
    out, more = tmp_path / 'out', ('--top-k', '1', '--max-images', '4')
    with pytest.raises(ConfigError, match=r'cls_moe: it shares .* top_k .* bbox_head.reg_moe'):
        detector.run(top_k.change_top_k, top_k.parse, out, *more, '--layer', HEADS[0])
    detector.run(top_k.change_top_k, top_k.parse, out, *more)
    model, meta = loaded(out / 'config.py', out / 'checkpoint.pth')
    original, _ = loaded(detector.config, detector.checkpoint)
    for layer in find_moe_layers(original).values():
        layer.top_k = layer.router.top_k = 1
    torch.testing.assert_close(outputs(model, 64), outputs(original, 64))
    assert [note.split()[2] for note in meta['surgery']] == [f'"{name}"' for name in HEADS]
    assert 'bbox_mAP' in said_of(out, tmp_path / 'test')


def test_another_k_of_one_layer(data, tmp_path):
    experts = EXPERTS.replace('experts=[', "experts=[dict(at='backbone.conv1', num_experts=2), ")
    tool, out = Classifier(tmp_path / 'tool', data, experts), tmp_path / 'out'
    with pytest.raises(ConfigError, match=r'top_k=3 must .* between 1 and 2, .* "backbone.conv1"'):
        tool.run(top_k.change_top_k, top_k.parse, out, '--top-k', '3')
    tool.run(top_k.change_top_k, top_k.parse, out, '--top-k', '3', '--layer', 'head.fc')
    model, _ = loaded(out / 'config.py', out / 'checkpoint.pth')
    found = {name: layer.top_k for name, layer in find_moe_layers(model).items()}
    assert found == {'backbone.conv1': 2, 'head.fc': 3}


CIFAR = ("type='ResNet_CIFAR'", "type='mmdet_moe.MoEResNet_CIFAR', num_experts=3")


@pytest.mark.parametrize(
    ('experts', 'more', 'message'),
    [
        (EXPERTS, ('0',), r'top_k=0 must lie between 1 and 3, the experts of layer "head.fc"'),
        (EXPERTS, ('4',), r'top_k=4 must lie between 1 and 3, the experts of layer "head.fc"'),
        (EXPERTS, ('2',), r'--top-k 2: every layer \(head.fc\) has it already'),
        (EXPERTS, ('1', '--layer', 'head'), r'no sparse layer of that name; there is head.fc'),
        ('', ('1',), 'the model has no sparse layer with several experts'),
        (CIFAR, ('1',), r'of the shape \(12,\) would be \(32,\) .* the width of the experts to a'),
        ("experts=[dict(at='backbone.layer*.0', num_experts=3, width='equal')],", ('1',),
         'is not one number'),
    ],
)  # fmt: skip
def test_mistakes_in_another_k(experts, more, message, data, tmp_path):
    if experts == CIFAR:  # whose experts cost what the stage does, by default
        tool = Classifier(tmp_path / 'tool', data, '')
        tool = Tool(tool.folder, tool.config.read_text().replace(*CIFAR), data)
        tool.run = lambda *args: Classifier.run(tool, *args)
    else:
        tool = Classifier(tmp_path / 'tool', data, experts)
    with pytest.raises(ConfigError, match=message):
        tool.run(top_k.change_top_k, top_k.parse, tmp_path / 'out', '--top-k', *more)
    assert not (tmp_path / 'out').exists()


def test_another_k(data, tmp_path):
    """The second test is that of one expert alone, with the weight 1."""
    tool = Classifier(tmp_path / 'tool', data, EXPERTS.replace('top_k=2', 'top_k=3'))
    tool.change(lambda state: state['head.fc.router.fc.bias'].copy_(torch.tensor([1e3, 0, 0])))
    tool.change(lambda state: state['head.fc.experts.bias'][1:].copy_(1e4 * torch.eye(2, 3)))
    argv = [str(tool.config), str(tool.checkpoint), '--work-dir', str(tmp_path / 'test')]
    cli.run_test([*argv, '--top-k', '1', *tool.options])
    text = next((tmp_path / 'test').glob('*/*.log')).read_text()
    table = re.search(r'top_k=3 +top_k=1\naccuracy/top1 +(\d+\.\d+) +(\d+\.\d+)', text)
    logged = re.findall(r'Epoch\(test\) .*accuracy/top1: (\d+\.\d+)', text)
    assert list(table.groups()) == logged
    for wrong in ('0', '4'):
        with pytest.raises(SystemExit):
            cli.run_test([*argv, '--top-k', wrong, *tool.options])


def test_set_top_k():
    layers = torch.nn.ModuleDict({
        'two': MoELayer(torch.nn.Linear(4, 4), 3, 2, in_channels=4, granularity='token'),
        'one': MoELayer(torch.nn.Linear(4, 4), 2, 1, in_channels=4, granularity='token'),
        'only': MoELayer(torch.nn.Linear(4, 4), 1, 1, in_channels=4, granularity='token'),
    }).eval()  # fmt: skip
    before = set_top_k(layers, 1)
    assert before == {'two': 2, 'one': 1}
    layers['two'](torch.randn(5, 4))
    assert torch.equal(layers['two'].routing.weights, torch.ones(5, 1))
    assert set_top_k(layers, before) == {'two': 1, 'one': 1}
    assert layers['two'].top_k == layers['two'].router.top_k == 2
    with pytest.raises(ConfigError, match=r'top_k=3 must lie between 1 and 2, .* layer "one"'):
        set_top_k(layers, 3)
    assert layers['two'].top_k == 2
    with pytest.raises(ConfigError, match='there is no layer "only"; there is two, one'):
        set_top_k(layers, {'only': 1})
    with pytest.raises(ConfigError, match='no sparse experts'):
        set_top_k(layers['only'], 1)


def test_the_table_of_costs(data, tmp_path, capsys):
    tool = load_tool('get_flops')
    config = Classifier(tmp_path / 'tool', data).config
    tool.main([str(config), '--shape', '32', '32'])
    row = capsys.readouterr().out.split('head.fc')[1].splitlines()[0].split()
    # Parameters in millions, which are few: 99 for each expert.
    assert row[:4] == ['Linear', '3', '2', 'token']
    with pytest.raises(SystemExit):
        tool.main([str(config), '--shape', '0', '0'])
