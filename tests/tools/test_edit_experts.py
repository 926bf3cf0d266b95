"""The whole tool on a tiny classifier and a tiny detector; edited checkpoints in other tools."""

import json
import re

import numpy as np
import pytest
import torch
from tiny_tools import DETECTOR, IMAGES, Tool, tiny_classifier

from mmdet_moe.analysis import measuring
from mmdet_moe.analysis.command import run_analysis
from mmdet_moe.analysis.data import AnalysisData, drawn
from mmdet_moe.analysis.editing import edit_checkpoint, parse, parse_edit
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import Edit


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp('classifier'))


@pytest.fixture(scope='module')
def detector(tmp_path_factory, digit_scenes_folder):
    return Tool(tmp_path_factory.mktemp('detector'), DETECTOR, digit_scenes_folder)


@pytest.mark.usefixtures('quick_analysis')
def test_classifier(classifier, tmp_path, capsys):
    out = tmp_path / 'edited.pth'
    edits = [f'layer=head.fc,expert={e},output=1,add=1e4' for e in range(3)]
    before, after = edit_checkpoint(parse(classifier.argv(out, *edits)))
    # Every image is taken for one of class b, which 2 are.
    assert after['per_class'] == {'a': 0.0, 'b': 1.0, 'c': 0.0}
    labels = np.array([*'aaaaaaaabbcc'])
    assert after['accuracy'] == pytest.approx((labels == 'b').mean())
    marked = np.arange(IMAGES) % 3 == 0
    assert after['per_group'] == {
        'mark': pytest.approx((labels == 'b')[marked].mean()),
        'no mark': pytest.approx((labels == 'b')[~marked].mean()),
    }
    assert before['per_class'] != after['per_class']
    printed = capsys.readouterr().out
    for name, value in [
        ('group mark', lambda m: m['per_group']['mark']), ('class b', lambda m: m['per_class']['b'])
    ]:  # fmt: skip
        change = value(after) - value(before)
        numbers = f'{value(before):.4f}  {value(after):.4f}  {change:+.4f}'
        assert re.search(rf'^{name} +{re.escape(numbers)}$', printed, re.MULTILINE)
    assert 'layer "head.fc", expert 2, output 1: +10000' in printed

    original = torch.load(classifier.checkpoint, weights_only=False)
    edited = torch.load(out, weights_only=False)
    assert edited['meta']['epoch'] == 3
    assert edited['meta']['edits'] == [str(parse_edit(edit)) for edit in edits]
    assert 'optimizer' not in edited
    changed = [
        k for k, v in original['state_dict'].items() if not torch.equal(v, edited['state_dict'][k])
    ]
    assert changed == ['head.fc.experts.bias']
    assert classifier.test(classifier.checkpoint, tmp_path / 'a')['accuracy/top1'] == (
        pytest.approx(100 * before['accuracy'], abs=1e-3)
    )
    assert classifier.test(out, tmp_path / 'b')['accuracy/top1'] == pytest.approx(
        100 * after['accuracy'], abs=1e-3
    )
    argv = classifier.argv(tmp_path / 'analysis', checkpoint=out, more=['--no-interventions'])
    run_analysis(argv)
    experts = json.loads((tmp_path / 'analysis' / 'experts.json').read_text())
    assert experts['metrics']['accuracy'] == after['accuracy']

    undone = [edit.replace('add=', 'add=-') for edit in edits]
    again = classifier.argv(out, *undone, checkpoint=out, more=['--overwrite'])
    with pytest.raises(ConfigError, match='is the checkpoint itself'):
        edit_checkpoint(parse(again))
    again = classifier.argv(tmp_path / 'undone.pth', *undone, checkpoint=out)
    assert edit_checkpoint(parse(again)) == (after, before)
    meta = torch.load(tmp_path / 'undone.pth', weights_only=False)['meta']
    assert len(meta['edits']) == 6


@pytest.mark.usefixtures('quick_analysis')
def test_factorised_experts(classifier, tmp_path):
    """The ranks of the edited checkpoint are not those of the config, and it loads all the same."""
    sparse = "dict(at='head.fc', num_experts=3, top_k=2, granularity='token')"
    assert sparse in classifier.config.read_text()
    factorised = "dict(at='head.fc', type='mmdet_moe.CPMuMoE', num_experts=3, rank=4, norm='ln')"
    text = classifier.config.read_text().replace(sparse, factorised)
    tool = Tool(tmp_path, text, classifier.folder / 'data')
    out = tmp_path / 'edited.pth'
    edits = [f'layer=head.fc,expert={e},output=1,add=1e4' for e in range(3)]
    before, after = edit_checkpoint(parse(tool.argv(out, *edits)))
    assert before['per_class']['b'] != after['per_class']['b'] == 1
    shapes = {k: v.shape for k, v in torch.load(out)['state_dict'].items() if 'factors' in k}
    assert [shape[1] for shape in shapes.values()] == [7, 7, 7]
    assert tool.test(out, tmp_path / 'test')['accuracy/top1'] == pytest.approx(
        100 * after['accuracy'], abs=1e-3
    )
    undone = [edit.replace('add=', 'add=-') for edit in edits]
    again = parse(tool.argv(tmp_path / 'undone.pth', *undone, checkpoint=out))
    assert edit_checkpoint(again) == (after, before)

    run_analysis(tool.argv(tmp_path / 'analysis', checkpoint=out))
    experts = json.loads((tmp_path / 'analysis' / 'experts.json').read_text())
    assert experts['metrics']['accuracy'] == after['accuracy']
    state = torch.load(out)['state_dict']
    state['head.fc.experts.factors.1'] = torch.zeros(9, 7)
    torch.save({'state_dict': state}, tmp_path / 'other.pth')
    other = parse(tool.argv(tmp_path / 'no.pth', *edits, checkpoint=tmp_path / 'other.pth'))
    with pytest.raises(ConfigError, match=r'head.fc.experts.factors: .* only ranks may differ'):
        edit_checkpoint(other)


def test_detector(detector, tmp_path, capsys, monkeypatch):
    first = np.array(drawn(8, 4))
    halves = {'first': first, 'second': np.setdiff1d(np.arange(8), first)}
    monkeypatch.setattr(AnalysisData, 'groups', halves)
    monkeypatch.setattr(AnalysisData, 'superclasses', {'low': [0, 2, 4], 'rest': [1]})
    out = tmp_path / 'edited.pth'
    edits = [f'layer=bbox_head.cls_moe,expert={e},output=all,zero=true' for e in range(3)]
    before, after = edit_checkpoint(parse(detector.argv(out, *edits)))
    assert before['AP'] != after['AP']
    per_class = before['per_class']
    assert list(per_class) == list('0123456789')
    low = (per_class['0'] + per_class['2'] + per_class['4']) / 3
    assert before['per_superclass'] == {'low': pytest.approx(low), 'rest': None}
    monkeypatch.setattr(AnalysisData, 'groups', {})
    argv = detector.argv(tmp_path / 'half.pth', *edits, more=['--max-images', '4'])
    assert edit_checkpoint(parse(argv))[0]['AP'] == before['per_group']['first']
    assert before['per_group']['second'] != before['per_group']['first']
    assert detector.test(out, tmp_path / 'b')['coco/bbox_mAP'] == pytest.approx(
        after['AP'], abs=6e-4
    )
    assert re.search(r'^class 7 +\d', capsys.readouterr().out, re.MULTILINE)


def test_some_images(classifier, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        measuring, 'predictions_of', lambda i, r: seen.extend(i) or np.zeros(len(i))
    )
    edit = 'layer=head.fc,expert=0,output=0,scale=2'
    argv = classifier.argv(tmp_path / 'e.pth', edit, more=['--max-images', '7', '--split', 'train'])
    edit_checkpoint(parse(argv))
    assert seen == [*range(7), *range(7)]


@pytest.mark.parametrize(
    ('text', 'edit'),
    [
        ('layer=a.b,expert=3,output=2,scale=0', Edit('a.b', 3, 2, scale=0.0)),
        ('output=all, zero=true, expert=1, layer=x', Edit('x', 1, None, zero=True)),
        ('layer=x,expert=0,output=0,add=-1.5e-3', Edit('x', 0, 0, add=-0.0015)),
    ],
)
def test_edits_as_text(text, edit):
    assert parse_edit(text) == edit


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('layer=x,expert=0,output=0,size=1', "it has the unknown field 'size'"),
        ('layer=x,layer=y,expert=0,output=0', "it repeats 'layer'"),
        ('layer=x,expert=0,scale=1', 'give output, too'),
        ('layer=x,expert=0.5,output=0,scale=1', 'expert=0.5 must be an integer'),
        ('layer=x,expert=0,output=cat,scale=1', "output=cat must be an integer or 'all'"),
        ('layer=x,expert=0,output=0,scale=much', 'scale=much must be a number'),
        ('layer=x,expert=0,output=0,zero=no', "zero=no must be 'true'"),
        ('layer=x,expert=0,output=0', 'exactly one of scale, add and zero'),
        (
            'layer=head.cf,expert=0,output=0,scale=0',
            'no layer "head.cf" has experts; there is head.fc',
        ),
    ],
)
def test_mistakes_in_edits(text, message, classifier, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        measuring.run_tool(edit_checkpoint, parse(classifier.argv(tmp_path / 'e.pth', text)))
    assert exit_.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('error: ')]
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('out', 'more', 'message'),
    [
        ('no/e.pth', (), '--out: there is no folder'),
        ('old.pth', (), 'exists; choose another name, or use --overwrite'),
        ('.', ('--overwrite',), 'exists; choose another name'),
        ('e.pth', ('--max-images', '0'), '--max-images=0 must be at least 1'),
    ],
)
def test_mistakes_in_arguments(out, more, message, classifier, tmp_path):
    (tmp_path / 'old.pth').write_bytes(b'old')
    edit = 'layer=head.fc,expert=0,output=0,scale=0'
    with pytest.raises(ConfigError, match=message):
        edit_checkpoint(parse(classifier.argv(tmp_path / out, edit, more=more)))
    assert (tmp_path / 'old.pth').read_bytes() == b'old'


def test_checkpoint_that_is_no_file_and_an_old_output(classifier, tmp_path):
    (tmp_path / 'old.pth').write_bytes(b'old')
    edit = 'layer=head.fc,expert=0,output=0,scale=0'
    argv = classifier.argv(
        tmp_path / 'old.pth', edit, checkpoint=tmp_path / 'no.pth', more=['--overwrite']
    )
    with pytest.raises(ConfigError, match='checkpoint: there is no file'):
        edit_checkpoint(parse(argv))
