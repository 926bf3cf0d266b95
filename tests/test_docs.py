"""The examples of the documentation run as they stand."""

import copy
import re
import shlex
from dataclasses import fields
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hub import get_config

import mmdet_moe
from mmdet_moe.analysis.balancing import parse as parse_balancing
from mmdet_moe.analysis.editing import parse, parse_edit
from mmdet_moe.engine.dry_run import build_model
from mmdet_moe.moe import Edit, MoELayer, Routing, add_experts, find_moe_layers
from mmdet_moe.moe.surgery import Entry
from mmdet_moe.registry import HOOKS

ROOT = Path(mmdet_moe.__file__).parents[1]


def examples(page):
    return re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)


def layers_of(config, path, at):
    """Of the model that a config describes, those below ``at``; they and no others are there."""
    path.write_text(config)
    cfg = Config.fromfile(path)
    cfg.setdefault('default_scope', 'mmdet')  # which the whole config has
    layers = find_moe_layers(build_model(cfg))
    assert layers
    assert all(name.startswith(at) for name in layers)
    hooks = [hook['type'].split('.')[-1] for hook in cfg.custom_hooks]
    assert 'ExpertUtilizationHook' in hooks
    constraint = any(layer.router.constraint is not None for layer in layers.values())
    assert ('BalancingLossHook' in hooks) != constraint
    return list(layers.values())


def test_readme(tmp_path, capsys):
    config, plain = examples('README.md')[:2]
    stage, subnet = layers_of(config, tmp_path / 'c.py', ('backbone.layer4', 'bbox_head'))
    assert (stage.num_experts, stage.top_k, stage.width) == (4, 2, 1)
    assert 0.5 < subnet.width < 0.75
    scope = {}
    exec(plain, scope)
    assert scope['loss'].requires_grad
    assert 'layer3.0.conv1  Conv2d' in capsys.readouterr().out


def test_data(tmp_path):
    (config,) = examples('docs/data.md')
    layers_of(config, tmp_path / 'c.py', 'bbox_head')
    cfg = Config.fromfile(tmp_path / 'c.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert len(loader.dataset.metainfo.classes) == cfg.model.bbox_head.num_classes == 2


def test_experts(tmp_path, capsys):
    first, paths, plain, hooks, pure = examples('docs/experts.md')
    layers = layers_of(first, tmp_path / 'a.py', ('backbone.layer4', 'neck.fpn_convs.'))
    assert [layer.granularity for layer in layers] == ['image', *['patch'] * 5]
    assert len(layers_of(hooks, tmp_path / 'b.py', 'neck.out_convs.')) == 3
    assert layers_of(pure, tmp_path / 'c.py', 'backbone.layer4')[0].num_experts == 8
    exec(plain, {})
    assert 'layer4          Sequential  3  2' in capsys.readouterr().out
    scope = {}
    exec(paths, scope)
    dense = build_model(get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'))
    found = []
    for entry in scope['experts']:
        model = copy.deepcopy(dense)
        add_experts(model, [entry])
        found.append(sorted(find_moe_layers(model)))
    convs = [f'{block}.conv{i}' for block in found[1] for i in (1, 2, 3)]
    assert found[0] == ['backbone.layer4']
    assert found[1] == [f'backbone.layer4.{i}' for i in range(3)]
    assert len(found[2]) == 16
    assert found[3] == sorted([*convs, 'backbone.layer4.0.downsample.0'])
    assert found[4:] == [['bbox_head.cls_moe'], ['bbox_head.cls_convs_moe']]


def test_balancing(tmp_path):
    config, several = examples('docs/balancing.md')
    (layer,) = layers_of(config, tmp_path / 'c.py', 'backbone.layer4')
    assert (layer.num_experts, layer.top_k) == (4, 2)
    fragment = ROOT / 'configs/_base_/balancing/soft_importance.py'
    (tmp_path / 'd.py').write_text(f"_base_ = '{fragment}'\n{several}")
    utilization, losses = map(HOOKS.build, Config.fromfile(tmp_path / 'd.py').custom_hooks)
    assert utilization.interval == 10
    assert [loss.weight for loss in losses.losses] == [0.25, 1e-3]

    page = (ROOT / 'docs/balancing.md').read_text()
    for path in fragment.parent.glob('*.py'):
        assert f'`{path.name}`' in page, path.name
    commands = re.findall(r'```bash\n(.*?)```', page, re.DOTALL)
    lines = ' '.join(commands).replace('\\\n', ' ').splitlines()
    drawn = [
        parse_balancing(shlex.split(line.split('plot_balancing.py')[1], comments=True))
        for line in lines
        if 'plot_balancing.py' in line
    ]
    assert [args.layer for args in drawn] == [None, 'bbox_head.cls_moe', 'bbox_head.cls_moe']
    for run in drawn[2].runs:
        assert (ROOT / f'configs/demo/retinanet_moe_{run.name}_digits.py').exists()


def test_mumoe(tmp_path, capsys):
    layers, config, by_path, published, look = examples('docs/mumoe.md')
    exec(layers, {})
    assert 'torch.Size([33, 10])' in capsys.readouterr().out
    (tmp_path / 'c.py').write_text(config)
    model = build_model(Config.fromfile(tmp_path / 'c.py'))
    found = mmdet_moe.moe.find_expert_layers(model)
    laterals = [f'neck.lateral_convs.{i}' for i in range(3)]
    assert list(found) == [*(f'backbone.layer4.{i}.conv3' for i in range(3)), *laterals]
    assert [layer.levels for layer in found.values()] == [(16, 16)] * 3 + [(64,)] * 3
    exec(by_path, {})
    assert 'fc     Linear  16 × 16  all' in capsys.readouterr().out
    exec(published, {})
    exec(look, {})
    assert 'rows that expert 3 takes part in: ' in capsys.readouterr().out


def test_every_option_is_in_the_table():
    table = (ROOT / 'docs' / 'experts.md').read_text().split('## Options')[1].split('**Tokens')[0]
    cells = [row.split('|')[1] for row in table.splitlines() if row.startswith('| `')]
    assert set(re.findall(r'`(\w+)`', ''.join(cells))) == {f.name for f in fields(Entry)}


def test_extending(capsys):
    use, granularity, experts, loss, sources, constraint, router = examples('docs/extending.md')
    exec(use, {})
    assert 'tensor' in capsys.readouterr().out
    exec(granularity, {})
    assert 'torch.Size([512, 2])' in capsys.readouterr().out
    scope = {}
    exec(experts, scope)
    check_scale_experts(scope['layer'])
    for code in (loss, sources, constraint, router):
        exec(code, {'__name__': 'example'})

    kwargs = dict(num_experts=3, top_k=1, in_channels=4)
    layer = MoELayer(
        torch.nn.Conv2d(4, 4, 1),
        router=dict(
            type='mmdet_moe.EnergyRouter',
            constraint=dict(type='mmdet_moe.NotTwiceTheSameFavourite'),
        ),
        **kwargs,
    )
    x = torch.randn(1, 4, 8, 8)
    layer(x)
    first = layer.routing.expert_ids.item()
    layer(x)
    assert layer.routing.expert_ids.item() != first
    # The logits by hand.
    fc = layer.router.fc
    expected = x.square().mean(dim=(2, 3)) @ fc.weight.T + fc.bias
    torch.testing.assert_close(layer.routing.logits, expected)


def check_scale_experts(layer):
    """Against the weighted factors of each image's experts."""
    x = torch.randn(3, 8, 4, 4)
    y = layer.eval()(x)
    factors = layer.routing.dense_weights() @ layer.experts.scale
    torch.testing.assert_close(y, x * factors[:, :, None, None])
    assert (layer.experts.scale.grad != 0).any()


def test_export():
    (code,) = examples('docs/export.md')
    exec(code, {})


def test_editing(capsys):
    plain, which, groups = examples('docs/editing.md')
    scope = {}
    exec(plain, scope)
    assert (scope['edited'][:, 1] != scope['before'][:, 1]).all()
    assert not scope['model'][2].experts.expert_weight(7).any()
    exec(which, scope)
    gain = scope['coefficients'].topk(8).values.sum()
    torch.testing.assert_close(scope['gain'].mean(), gain)
    assert ' on the output of class 2' in capsys.readouterr().out
    exec(groups, {'__name__': 'example'})
    text = (ROOT / 'docs' / 'editing.md').read_text()
    (command,) = re.findall(r'```bash\npython tools/edit_experts.py (.*?)```', text, re.DOTALL)
    args = parse(shlex.split(command.replace('\\\n', ' ')))
    assert [parse_edit(edit) for edit in args.edit] == [
        Edit('head.fc', 7, 2, scale=0.5), Edit('head.fc', 9, None, zero=True)
    ]  # fmt: skip
    assert (args.split, str(args.out)) == ('test', 'edited.pth')


def test_loss_of_the_documentation():
    namespace = {'__name__': 'example'}
    exec(
        examples('docs/extending.md')[3].replace('LargestShareLoss', 'LargestShareLoss2'), namespace
    )
    routing = Routing(
        expert_ids=torch.tensor([[0], [1], [1], [1]]),
        weights=torch.ones(4, 1),
        logits=torch.zeros(4, 2),
        items_per_level=(4,),
        num_images=4,
        decision_weights=torch.ones(4),
    )
    assert namespace['LargestShareLoss2'](weight=2.0)(routing) == 2 * 3 / 4


def test_links_and_pictures_exist():
    for page in (ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *ROOT.glob('projects/*/*.md')):
        for target in re.findall(r'\]\(([^)#]+)\)', page.read_text()):
            if not target.startswith('http'):
                assert (page.parent / target).exists(), f'{page.name}: {target}'


def test_guarantees_are_held_by_tests():
    promises = re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', (ROOT / 'docs/guarantees.md').read_text())
    assert promises
    for path, name in promises:
        assert f'def {name}(' in (ROOT / path).read_text(), f'{path}::{name}'
