"""The examples of the documentation run as they stand, and its links lead somewhere.

Blocks are found by themselves (``pages.py``). Those of a page run in their order, and go on from
each other. A block that cannot run says so to its reader: its first line is NOT_RUN and a reason.
What else is asked of one block is a function with ``@about(page, what stands in the block)``.
Commands: ``test_docs_commands.py``.
"""

import ast
import copy
import re
import shlex
from dataclasses import dataclass, fields

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from pages import PAGES, ROOT, anchors, blocks, prose

from mmdet_moe.analysis.editing import parse, parse_edit
from mmdet_moe.engine.dry_run import build_model
from mmdet_moe.moe import (
    Edit,
    MoELayer,
    Routing,
    add_experts,
    find_expert_layers,
    find_moe_layers,
)
from mmdet_moe.moe.surgery import Entry
from mmdet_moe.registry import HOOKS

NOT_RUN = '# Not run by our tests: '
CHECKS = {}


@dataclass
class Run:
    """What a block of Python left behind.

    Attributes:
        scope: The names that it defined; those of the blocks before it on the page, too.
        output: What it printed.
        cfg: The config, if it is one.
        model: The model of that.
    """

    scope: dict
    output: str = ''
    cfg: Config | None = None
    model: torch.nn.Module | None = None


def about(page, text):
    """The function checks the block of ``page`` that has ``text`` in it."""
    assert page in PAGES, page

    def keep(function):
        CHECKS.setdefault(page, {})[text] = function
        return function

    return keep


@pytest.mark.parametrize('page', PAGES)
def test_python(page, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checks, scope = CHECKS.get(page, {}), {'__name__': 'example'}
    for block in blocks(page):
        if block.language != 'python' or block.code.startswith(NOT_RUN):
            continue
        if '_base_' in assigned(block) or 'with read_base():' in block.code:
            run = run_config(block, tmp_path)
        else:
            code = '\n' * (block.line - 1) + block.code  # the place in tracebacks
            exec(compile(code, ROOT / page, 'exec'), scope)
            run = Run(scope, capsys.readouterr().out)
        for text in [text for text in checks if text in block.code]:
            checks.pop(text)(run)
    assert not checks, f'{page}: no block has {list(checks)}'


def assigned(block):
    """The names that a block assigns to at its top level."""
    nodes = [node for node in ast.parse(block.code).body if isinstance(node, ast.Assign)]
    return {t.id for node in nodes for t in node.targets if isinstance(t, ast.Name)}


def run_config(block, folder):
    """Build the model of a config; one that puts experts into it has some.

    Its first line may name the file for those that come after it: ``# name.py``.
    """
    name = re.match(r'# (\w+\.py)\n', block.code)
    path = folder / (name[1] if name else f'line_{block.line}.py')
    path.write_text(block.code)
    cfg = Config.fromfile(path)
    cfg.setdefault('default_scope', 'mmdet')  # which the whole config has
    model = build_model(cfg)
    assert find_expert_layers(model) or 'WithExperts' not in block.code
    return Run({}, cfg=cfg, model=model)


def layers_of(run, at):
    """The sparse layers of a config; they are below ``at``, and balanced in one way."""
    layers = find_moe_layers(run.model)
    assert layers
    assert all(name.startswith(at) for name in layers)
    hooks = [hook['type'].split('.')[-1] for hook in run.cfg.custom_hooks]
    assert 'ExpertUtilizationHook' in hooks
    constraint = any(layer.router.constraint is not None for layer in layers.values())
    assert ('BalancingLossHook' in hooks) != constraint
    return list(layers.values())


# README ------------------------------------------------------------------------------------------


@about('README.md', "at='backbone.layer4'")
def readme_config(run):
    stage, subnet = layers_of(run, ('backbone.layer4', 'bbox_head'))
    for layer in (stage, subnet):
        assert (layer.num_experts, layer.top_k, layer.width) == (4, 2, 1)


@about('README.md', 'import torchvision')
def readme_pytorch(run):
    assert run.scope['loss'].requires_grad
    assert 'layer3.0.conv1  Conv2d' in run.output


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


# docs/start.md, docs/data.md, docs/experts.md ----------------------------------------------------


@about('docs/start.md', '# experts.py')
def five_lines_on_a_model_of_your_own(run):
    layers = layers_of(run, 'bbox_head')
    assert [layer.decision_weight for layer in layers] == ['positives', 'positives']
    assert run.cfg.train_dataloader.dataset.metainfo.classes == ('cat', 'dog')
    assert run.cfg.val_dataloader.dataset.ann_file == 'val.json'


@about('docs/data.md', 'metainfo')
def classes_of_your_own(run):
    layers_of(run, 'bbox_head')
    for loader in (run.cfg.train_dataloader, run.cfg.val_dataloader, run.cfg.test_dataloader):
        assert len(loader.dataset.metainfo.classes) == run.cfg.model.bbox_head.num_classes == 2


@about('docs/experts.md', "at='neck.fpn_convs.*'")
def two_places(run):
    layers = layers_of(run, ('backbone.layer4', 'neck.fpn_convs.'))
    assert [layer.granularity for layer in layers] == ['image', *['patch'] * 5]


@about('docs/experts.md', "at='backbone.**.conv2'")
def all_kinds_of_paths(run):
    dense = build_model(get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'))
    found = []
    for entry in run.scope['experts']:
        model = copy.deepcopy(dense)
        add_experts(model, [entry])
        found.append(sorted(find_moe_layers(model)))
    convs = [f'{block}.conv{i}' for block in found[1] for i in (1, 2, 3)]
    assert found[0] == ['backbone.layer4']
    assert found[1] == [f'backbone.layer4.{i}' for i in range(3)]
    assert len(found[2]) == 16
    assert found[3] == sorted([*convs, 'backbone.layer4.0.downsample.0'])
    assert found[4:] == [['bbox_head.cls_moe'], ['bbox_head.cls_convs_moe']]


@about('docs/experts.md', 'import torchvision')
def weights(run):
    assert 'layer4          Sequential  3  2' in run.output


@about('docs/experts.md', '*_base_.custom_hooks')
def hooks_of_their_own(run):
    assert len(layers_of(run, 'neck.out_convs.')) == 3


@about('docs/experts.md', 'read_base')
def pure_python(run):
    assert layers_of(run, 'backbone.stage4')[0].num_experts == 8


def test_every_option_is_in_the_table():
    table = (ROOT / 'docs' / 'experts.md').read_text().split('## Options')[1].split('**Tokens')[0]
    cells = [row.split('|')[1] for row in table.splitlines() if row.startswith('| `')]
    assert set(re.findall(r'`(\w+)`', ''.join(cells))) == {f.name for f in fields(Entry)}


# docs/balancing.md -------------------------------------------------------------------------------


@about('docs/balancing.md', "at='backbone.layer4'")
def balanced_stage(run):
    (layer,) = layers_of(run, 'backbone.layer4')
    assert (layer.num_experts, layer.top_k) == (4, 2)
    page = prose('docs/balancing.md')
    for path in (ROOT / 'configs' / '_base_' / 'balancing').glob('*.py'):
        assert f'`{path.name}`' in page, path.name


@about('docs/balancing.md', 'RouterZLoss')
def several_losses(run):
    utilization, losses = map(HOOKS.build, run.scope['custom_hooks'])
    assert utilization.interval == 10
    assert [loss.weight for loss in losses.losses] == [0.25, 1e-3]


# docs/mumoe.md -----------------------------------------------------------------------------------


@about('docs/mumoe.md', 'two_levels')
def layers_alone(run):
    assert 'torch.Size([33, 10])' in run.output


@about('docs/mumoe.md', '_base_')
def mumoe_config(run):
    found = find_expert_layers(run.model)
    laterals = [f'neck.lateral_convs.{i}' for i in range(3)]
    assert list(found) == [*(f'backbone.layer4.{i}.conv3' for i in range(3)), *laterals]
    assert [layer.levels for layer in found.values()] == [(16, 16)] * 3 + [(64,)] * 3


@about('docs/mumoe.md', 'import torchvision')
def by_path(run):
    assert 'fc     Linear  16 × 16  all' in run.output


@about('docs/mumoe.md', 'mix_without')
def a_look(run):
    assert 'rows that expert 3 takes part in: ' in run.output


# docs/extending.md -------------------------------------------------------------------------------


@about('docs/extending.md', 'damex.py')
def told_the_data_sets(run):
    for layer in layers_of(run, 'bbox_head'):
        assert (layer.num_experts, layer.top_k, layer.width) == (4, 1, 1)
        assert layer.router.softmax == 'straight_through'


@about('docs/extending.md', 'levels = [')
def in_any_program(run):
    assert 'tensor' in run.output


@about('docs/extending.md', 'pixels = ')
def granularities(run):
    assert 'torch.Size([512, 2])' in run.output


@about('docs/extending.md', 'class ScaleExperts')
def scale_experts(run):
    """Against the weighted factors of each image's experts."""
    layer, x = run.scope['layer'], torch.randn(3, 8, 4, 4)
    assert (layer.experts.scale.grad != 0).any()
    y = layer.eval()(x)
    factors = layer.routing.dense_weights() @ layer.experts.scale
    torch.testing.assert_close(y, x * factors[:, :, None, None])


@about('docs/extending.md', 'class LargestShareLoss')
def largest_share_loss(run):
    routing = Routing(
        expert_ids=torch.tensor([[0], [1], [1], [1]]),
        weights=torch.ones(4, 1),
        logits=torch.zeros(4, 2),
        items_per_level=(4,),
        num_images=4,
        decision_weights=torch.ones(4),
    )
    assert run.scope['LargestShareLoss'](weight=2.0)(routing) == 2 * 3 / 4


@about('docs/extending.md', 'class EnergyRouter')
def energy_router(run):
    """With the constraint of the page; the logits by hand."""
    layer = MoELayer(
        torch.nn.Conv2d(4, 4, 1),
        num_experts=3,
        top_k=1,
        in_channels=4,
        router=dict(
            type='mmdet_moe.EnergyRouter',
            constraint=dict(type='mmdet_moe.NotTwiceTheSameFavourite'),
        ),
    )
    x = torch.randn(1, 4, 8, 8)
    layer(x)
    first = layer.routing.expert_ids.item()
    layer(x)
    assert layer.routing.expert_ids.item() != first
    fc = layer.router.fc
    expected = x.square().mean(dim=(2, 3)) @ fc.weight.T + fc.bias
    torch.testing.assert_close(layer.routing.logits, expected)


# docs/editing.md ---------------------------------------------------------------------------------


@about('docs/editing.md', 'apply_edits(model')
def edits(run):
    scope = run.scope
    assert (scope['edited'][:, 1] != scope['before'][:, 1]).all()
    assert not scope['model'][2].experts.expert_weight(7).any()


@about('docs/editing.md', 'disadvantaged')
def which_expert(run):
    gain = run.scope['coefficients'].topk(8).values.sum()
    torch.testing.assert_close(run.scope['gain'].mean(), gain)
    assert ' on the output of class 2' in run.output


def test_command_with_edits():
    (block,) = (b for b in blocks('docs/editing.md') if b.language == 'bash')
    args = parse(shlex.split(block.code.replace('\\\n', ' '))[2:])
    assert [parse_edit(edit) for edit in args.edit] == [
        Edit('head.fc', 7, 2, scale=0.5), Edit('head.fc', 9, None, zero=True)
    ]  # fmt: skip
    assert (args.split, str(args.out)) == ('test', 'edited.pth')


# The pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    """What pages and pictures are linked to exist, and so do the headings."""
    text = re.sub(r'(?<!`)`[^`]*`', '', prose(page))
    definitions = dict(re.findall(r'^\[([^\]]+)\]: *(\S+)', text, re.MULTILINE))
    named = re.findall(r'\]\[([^\]]+)\]', text)
    assert set(named) <= set(definitions)
    targets = re.findall(r'\]\(([^)\s]+)\)', text) + list(definitions.values())
    for target in targets:
        if not re.match(r'https?:|mailto:', target):
            path, _, anchor = target.partition('#')
            file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
            assert file.exists(), f'{page}: {target}'
            if anchor:
                assert anchor in anchors(file.relative_to(ROOT)), f'{page}: {target}'


@pytest.mark.parametrize('page', PAGES)
def test_every_block_has_a_language(page):
    """Without one nobody would look at it."""
    assert [block.place for block in blocks(page) if not block.language] == []


def test_a_block_that_is_not_run_says_why():
    for page in PAGES:
        for block in blocks(page):
            if block.code.startswith(NOT_RUN):
                assert block.code.split('\n')[0].strip() != NOT_RUN.strip(), block.place


def test_every_config_is_on_its_page():
    named = [
        name
        for group in re.findall(r'`([\w{},/.-]+\.py)`', prose('docs/configs.md'))
        for name in braces(group)
    ]
    shipped, files = ROOT / 'configs', []
    for path in sorted(shipped.rglob('*.py')):
        if path.parent.name == 'balancing':
            files.append(path.name)
        elif '_base_' not in path.parts:
            files.append(str(path.relative_to(shipped)))
    assert sorted(set(named)) == sorted(files)


def braces(text):
    """``a{b,c}`` is ``ab`` and ``ac``, as in a shell."""
    match = re.match(r'(.*?)\{([^{}]*)\}(.*)', text)
    if match is None:
        return [text]
    return [name for part in match[2].split(',') for name in braces(match[1] + part + match[3])]


def test_every_tool_is_on_its_page():
    text = (ROOT / 'docs' / 'tools.md').read_text()
    assert [p.name for p in (ROOT / 'tools').iterdir() if p.is_file() and p.name not in text] == []


def test_guarantees_are_held_by_tests():
    promises = re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', (ROOT / 'docs/guarantees.md').read_text())
    assert promises
    for path, name in promises:
        assert f'def {name}(' in (ROOT / path).read_text(), f'{path}::{name}'
