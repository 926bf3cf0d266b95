"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import torch

import mmdet_moe
from mmdet_moe.moe import MoELayer, Routing

ROOT = Path(mmdet_moe.__file__).parents[1]


def examples(page):
    return re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)


def test_extending(capsys):
    use, granularity, experts, loss, constraint, router = examples('docs/extending.md')
    exec(use, {})
    assert 'tensor' in capsys.readouterr().out
    exec(granularity, {})
    assert 'torch.Size([512, 2])' in capsys.readouterr().out
    scope = {}
    exec(experts, scope)
    check_scale_experts(scope['layer'])
    for code in (loss, constraint, router):
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
