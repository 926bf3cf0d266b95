"""What is said about experts of which it is known."""

import copy

import numpy as np
import pytest

from mmdet_moe.analysis.report.names import layer_names
from mmdet_moe.analysis.report.verdict import spoken, verdict
from mmdet_moe.analysis.statistics.association import Association, as_family
from mmdet_moe.analysis.statistics.bins import COCO_SIZES, SIZES, Bins

HEAD = 'bbox_head.cls_moe'


def numbers(mi=0.001, chance=0.001, p=0.5, interval=None, **fields):
    """An information without any association, unless told otherwise."""
    low, high = (max(0, mi - chance - 0.01), mi - chance + 0.01) if interval is None else interval
    return {
        'mi': mi,
        'chance': chance,
        'p_value': p,
        'p_adjusted': p,
        'interval': [low, high],
        'permutations': 999,
        'num_units': 500,
        'num_images': 100,
        'mi_max': 1.0,
        **fields,
    }


def association(mi=0.001, chance=0.001, p=0.5, bins=('a', 'b'), counts=None, **fields):
    """Two bins and four experts."""
    counts = np.array(counts if counts is not None else np.full((len(bins), 4), 50.0))
    with np.errstate(invalid='ignore'):
        of_bin = np.nan_to_num(counts / counts.sum(1, keepdims=True))
        of_expert = np.nan_to_num(counts / counts.sum(0))
    return {
        'bins': list(bins),
        'edges': None,
        'unit': None,
        'counts': counts.tolist(),
        'bin_given_expert': of_expert.tolist(),
        'expert_given_bin': of_bin.tolist(),
        'given': {},
        **numbers(mi, chance, p),
        **fields,
    }


def layer(**fields):
    """Four experts, two chosen, nothing conspicuous."""
    return {
        'num_experts': 4,
        'top_k': 2,
        'granularity': 'image',
        'num_decisions': 1000,
        'load': [0.25] * 4,
        'load_interval': [[0.24, 0.26]] * 4,
        'importance': [0.25] * 4,
        'mi_input': 0.5,
        'dead_experts': [],
        'collapsed': False,
        'coactivation': (np.full((4, 4), 1 / 6) + np.eye(4) / 3).tolist(),
        'associations': {'objects': {'class': association()}},
        **fields,
    }


def change(kind, effect, expert=None, layer=HEAD, metric='AP', width=0.001, before=0.6):
    """By an effect, known up to a width."""
    known = {'value': effect, 'interval': [effect - width, effect + width]}
    return {
        'layer': layer,
        'kind': kind,
        'expert': expert,
        'metrics': {metric: before + effect},
        'difference': {metric: known},
    }


def experts_of(of_layer, interventions=(), task='detection', metric=0.6, num_images=5000):
    name = 'accuracy' if task == 'classification' else 'AP'
    return {
        'run': {'task': task, 'num_images': num_images},
        'metrics': {name: metric, 'per_class': {}},
        'layers': {HEAD: of_layer},
        'interventions': list(interventions),
    }


def judged(of_layer, *interventions, **kwargs):
    """The entries; the dict is only read."""
    experts = experts_of(of_layer, interventions, **kwargs)
    before = copy.deepcopy(experts)
    entries = verdict(experts)
    assert experts == before
    assert len(entries[0]['lines']) <= 3
    return entries


def said(of_layer, *interventions, **kwargs):
    """All sentences, one per line."""
    text = '\n'.join(spoken(judged(of_layer, *interventions, **kwargs), verbose=True))
    assert 'nan' not in text
    return text


SIZE_COUNTS = [
    [9.0, 5.0, 81.0, 5.0],  # small: 81 % on expert 2
    [20.0, 30.0, 20.0, 30.0],  # medium
    [92.0, 4.0, 0.0, 4.0],  # large
]


def test_specialised_by_size():
    size = association(0.4, 0.01, 0.001, COCO_SIZES.names, SIZE_COUNTS, mi_max=1.05)
    entry, rest = judged(layer(associations={'objects': {'size_coco': size}}))
    assert (entry['layer'], entry['name']) == (HEAD, 'classification head')
    # 0.4 / 1.05 = 38 %; above chance 37 %.
    assert entry['lines'] == [
        'not collapsed: the input explains 0.500 of 1.39 nats, 36 %, of the choice of experts.',
        'strongly specialised by object size (small, medium, large) (objects: 0.400 nats, 0.380 to '
        '0.400, p = 0.001).',
    ]
    # The largest part of the information is large on 0: of 300 objects 121 on expert 0, 92 of them
    # large; then small on 2.
    assert entry['details'] == [
        'expert 0 carries 92 % of large objects (of everything: 40 %); 80 % of what expert 2 sees '
        'are small objects (of everything: 33 %).',
        'object size (small, medium, large) (objects): 0.400 nats, 38 % of the possible 1.05, '
        '0.380 to 0.400, by chance 0.010, p = 0.001, 100 images.',
    ]
    assert rest['layer'] is None
    assert 'corrected for all tests of a layer' in rest['details'][0]
    assert 'No interventions were run' in rest['details'][1]


def test_a_terminal_shows_the_lines_of_each_layer():
    entries = verdict(experts_of(layer()), [f'{HEAD}: near copies.', 'unlike another run.'])
    assert 'near copies.' in entries[0]['details']
    assert 'unlike another run.' in entries[1]['details']
    short = list(spoken(entries))
    assert short[0] == f'Classification head ({HEAD})'
    assert short[1:] == [f'- {line}' for line in entries[0]['lines']]
    assert len(list(spoken(entries, verbose=True))) > len(short)


def test_what_all_have_alike_gets_no_number():
    """Objects of a map of one level: that tells nothing, and 0 nats would be a finding."""
    level = association(mi=0, chance=0, p=1, mi_max=0, bins=('level 0',))
    text = said(layer(associations={'objects': {'class': association(), 'level': level}}))
    assert 'pyramid level (objects): nothing to tell, for all have the same' in text
    assert '0.0000' not in text


def test_by_the_level_and_nothing_of_size_beyond_it():
    """What explains the most leads, even if another explains as much; then what is left of that."""
    given = {'level': numbers(0.0001, 0.0001, 0.3, (0, 0.0004))}
    found = {
        'size': association(0.55, 0.01, 0.001, SIZES.names[:2], given=given),
        'size_coco': association(0.4, 0.01, 0.001, given=given),
        'level': association(0.54, 0.01, 0.001, given={'class': numbers(0.5, 0.01, 0.001)}),
        'class': association(0.02, 0.02, 0.7, given={'level': numbers()}),
    }
    (_, line), *_ = (entry['lines'] for entry in judged(layer(associations={'objects': found})))
    assert line == (
        'strongly specialised by pyramid level (objects: 0.540 nats, 0.520 to 0.540, p = 0.001); '
        'nothing of object size beyond it (0.0001 nats, 0.0000 to 0.0004, p = 0.3).'
    )
    # So it is if a random router knows as much of size, and one test of many looks significant.
    found['size']['controls'] = {'random': {'mi': 0.5, 'draws': [0.56]}}
    given['level'].update(p_value=0.01, p_adjusted=0.07)
    (_, line), *_ = (entry['lines'] for entry in judged(layer(associations={'objects': found})))
    assert line.endswith(
        '; nothing of object size beyond it (0.0001 nats, 0.0000 to 0.0004, p = 0.07).'
    )
    del found['size']['controls']
    # Something is left.
    given['level'].update(numbers(0.2, 0.01, 0.001))
    found['level'].update(numbers(0.6, 0.01, 0.001))
    text = said(layer(associations={'objects': found}))
    assert 'by pyramid level (objects: 0.600' in text
    assert 'also by object size beyond it (0.200 nats, 0.180 to 0.200, p = 0.001)' in text
    # More by size than by level.
    found['level'].update(numbers(0.5, 0.01, 0.001))
    text = said(layer(associations={'objects': found}))
    assert 'by object size (objects: 0.550' in text
    assert 'also beyond the pyramid level (0.200 nats' in text
    # It may be little, and may be much.
    given['level'].update(numbers(0.03, 0.02, 0.2, (0, 0.06)))
    text = said(layer(associations={'objects': found}))
    assert 'strongly specialised by pyramid level' in text
    # Width 0.06 for 100 images, 0.02 are needed: at half of it, (0.03 / 0.02)^2.
    assert (
        'whether by object size beyond it cannot be told (0.030 nats, 0.000 to 0.060, p = 0.2; '
        'about 230 images would do)' in text
    )


def test_what_is_left_out_is_said():
    """Classes on too few images: how much of it, and that nothing can be told if it is all."""
    rest = numbers(0.2, 0.01, 0.001, left_out=0.34)
    found = {
        'class': association(0.5, 0.01, 0.001),
        'size': association(0.4, 0.01, 0.001, given={'class': rest}),
    }
    text = said(layer(associations={'objects': found}))
    assert (
        'also by object size beyond it (0.200 nats, 0.180 to 0.200, p = 0.001, 34 % left out, of '
        'values on too few images)' in text
    )
    # An estimate above its interval, which is without the bias, says what chance gives.
    rest.update(numbers(0.25, 0.05, 0.001, (0.18, 0.21)))
    assert '0.250 nats, 0.180 to 0.210, by chance 0.050, p = 0.001' in said(
        layer(associations={'objects': found})
    )
    rest.update(numbers(0, 0, 1, (0, 1), left_out=1.0, num_images=0, num_units=0))
    text = said(layer(associations={'objects': found}))
    assert (
        'whether by object size beyond it cannot be told (not tested, as each value is on too few '
        'images)' in text
    )
    assert 'given the class: not tested' in text


def test_effects_within_the_levels_alone_are_found():
    found = {
        'size': association(given={'level': numbers(0.5, 0.01, 0.001)}),
        'level': association(),
    }
    text = said(layer(associations={'objects': found}))
    assert 'strongly specialised by object size within the same pyramid level (objects' in text
    assert 'nothing of it shows without regard to the pyramid level' in text
    # By itself it is there, but so it may be in routers with random weights.
    found['size'] |= numbers(0.5, 0.01, 0.001)
    found['size']['controls'] = {'random': {'mi': 0.3, 'draws': [0.6]}}
    text = said(layer(associations={'objects': found}))
    regardless = 'without regard to the pyramid level'
    assert f'{regardless} it is not told from what random routers have' in text
    assert 'nothing of it' not in text
    # Nothing was found of it by itself, but there may be something.
    found['size'] |= numbers(0.03, 0.02, 0.2, (0, 0.06))
    text = said(layer(associations={'objects': found}))
    assert f'whether it shows {regardless} cannot be told (0.030 nats' in text


def test_objects_speak_before_detections():
    objects, detections = association(0.2, 0.01, 0.001), association(0.4, 0.01, 0.001)
    both = {'detections': {'class': detections}, 'objects': {'class': objects}}
    assert 'class (objects: 0.200' in said(layer(associations=both))
    objects['num_units'] = 0
    assert 'class (detections: 0.400' in said(layer(associations=both))


def test_no_more_than_random_weights_give():
    found = association(
        0.2, 0.01, 0.001, controls={'random': {'mi': 0.15, 'draws': [0.115, 0.185]}}
    )
    text = said(layer(associations={'objects': {'class': found}}))
    assert (
        'no specialisation that is told from what routers with random weights give (up to 0.185'
        in text
    )
    assert 'specialised by' not in text
    found['controls']['random']['draws'] = [0.25]
    text = said(layer(associations={'objects': {'class': found}}))
    assert 'no specialisation beyond what routers with random weights give (up to 0.250' in text
    found['controls']['random']['draws'] = [0.05, 0.1]
    text = said(layer(associations={'objects': {'class': found}}))
    assert 'clearly specialised by class' in text
    assert 'routers with random weights: up to 0.100 nats' in text
    # Given the level as well.
    found['controls']['random']['draws_given'] = {'level': [0.0, 0.3]}
    found['given'] = {'level': numbers(0.2, 0.01, 0.001)}
    level = association(0.5, 0.01, 0.001)
    text = said(layer(associations={'objects': {'class': found, 'level': level}}))
    assert 'also by class' not in text
    assert (
        'by class beyond it no more than routers with random weights (up to 0.300 nats; 0.200'
        in text
    )
    found['controls']['random']['draws_given'] = {'level': [0.0, 0.199]}
    text = said(layer(associations={'objects': {'class': found, 'level': level}}))
    assert 'by class beyond it not told from routers with random weights (up to 0.199' in text


def test_collapsed():
    text = said(layer(collapsed=True, mi_input=0.004))
    assert 'COLLAPSED: the choice of experts hardly depends on the input (0.004 of 1.39' in text
    assert 'specialised by' not in text
    # Even if the little that is left goes with something.
    found = {'objects': {'class': association(0.1, 0.01, 0.001)}}
    text = said(layer(collapsed=True, mi_input=0.004, associations=found))
    assert 'specialised by' not in text
    assert 'the little that the choice depends on goes with class (objects: 0.100' in text


def test_dead():
    """Only where so many images cannot have missed more: 1 % of a quarter is 0.25 %."""
    ends = [[0.49, 0.51], [0.0, 0.002], [0.49, 0.51], [0.0, 0.001]]
    usage = {'dead_experts': [1, 3], 'load': [0.5, 0.001, 0.499, 0], 'load_interval': ends}
    entry, *_ = judged(layer(**usage))
    assert entry['lines'][0].endswith('of the choice of experts; dead experts: 1, 3.')
    assert (
        'candidates for pruning: expert 1, 3 (load 0.1 %, 0 %; below 1 % of the fair 25 %'
        in entry['details'][0]
    )
    assert 'dead' not in said(layer())
    ends[3][1] = 0.03  # 3 / 100
    entry, *_ = judged(layer(**usage), num_images=100)
    assert entry['lines'][0].endswith('; dead experts: 1; perhaps dead: 3.')
    assert entry['details'][1] == (
        'whether expert 3 is dead cannot be told from 100 images (load up to 3 %; below 1 % of the '
        'fair 25 % counts as dead); about 1,200 images would do.'  # 3 / 0.0025
    )
    text = said(layer(**{**usage, 'load_interval': None}), num_images=4)
    assert 'candidates' not in text
    assert 'perhaps dead: 1, 3' in text


def test_prunable():
    """If the whole interval is a loss within the tolerance, or a gain."""
    changes = [change('without', e, i) for i, e in enumerate([-0.003, -0.2, 0.01, -0.02])]
    entry, *_ = judged(layer(), *changes)
    assert entry['lines'][2] == 'prunable, each on its own: expert 0, 2; needed: expert 1, 3.'
    text = '\n'.join(entry['details'])
    assert 'expert 0 -0.003 (-0.004 to -0.002), 2 +0.010 (+0.009 to +0.011)' in text
    assert 'AP falls from 0.600 by no more than 0.005' in text
    assert 'expert 1 is needed most: without it AP changes by -0.200 (-0.201 to -0.199)' in text
    text = said(layer(), change('without', -0.2, 1))
    assert 'no expert can be pruned: each removal costs more than 0.005 AP' in text


def test_nothing_is_judged_without_power():
    entry, *_ = judged(layer(), change('without', 0.0, 2, width=0.02), num_images=200)
    assert entry['lines'][2] == 'open: expert 2.'
    # Four times too wide.
    assert (
        'whether it can be pruned cannot be told of expert 2 +0.000 (-0.020 to +0.020) from 200 '
        'images; about 3,200 images would do.' in entry['details']
    )
    text = said(layer(), change('random', 0.0, width=0.02), num_images=200)
    assert (
        'whether the routing matters cannot be told from 200 images (effect on AP between -0.020 '
        'and +0.020); about 3,200 images would do.' in text
    )
    assert 'does not matter' not in text
    text = said(layer(), change('only', -0.01, 1, width=0.01))
    # Its upper end has to fall to the tolerance, from 0.01 to 0.005 away: (0.01 / 0.005)^2.
    assert 'whether expert 1 alone does as well as all together cannot be told' in text
    assert 'about 20,000 images would do' in text
    # A model that finds hardly anything has hardly anything to lose.
    text = said(layer(), change('random', -0.004, before=0.005), metric=0.005)
    assert 'it matters which experts are chosen' in text
    # A bootstrap of very few images knows nothing.
    text = said(layer(), change('random', -0.1, width=0.01), num_images=4)
    assert '4 images are too few for intervals' in text
    assert 'cannot be told from 4 images' in text
    # Equal on all of few images: 3 / 200 of others may still differ.
    text = said(layer(), change('random', 0.0, width=0), num_images=200)
    assert 'between -0.015 and +0.015); about 600 images would do' in text
    text = said(layer(), change('random', 0.0, width=0), num_images=1000)
    assert 'the routing does not matter' in text
    # So it is if hardly any image shows an effect: 3 / 500 more on either side.
    few = change('random', 0.0, width=0.001)
    assert 'the routing does not matter' in said(layer(), few, num_images=500)
    few['difference']['AP']['num_changed'] = 9
    assert 'between -0.007 and +0.007)' in said(layer(), few, num_images=500)


def test_random_routing():
    entry, *_ = judged(layer(), change('random', -0.002))
    assert entry['lines'][2] == (
        'random routing changes AP by -0.002 (-0.003 to -0.001) from 0.600: the routing does not '
        'matter.'
    )
    text = said(layer(), change('random', -0.1), change('equal', -0.001))
    assert 'the router is no better than chance.' in said(layer(), change('random', 0.01))
    assert '-0.100 (-0.101 to -0.099) from 0.600: it matters which experts are chosen' in text
    assert 'weighing all experts equally changes AP by -0.001' in text
    entry, rest = judged(layer(), change('random', -0.5, layer='all'))
    assert rest['name'] == 'All layers'
    assert rest['lines'][0].startswith('random routing changes AP by -0.500')
    assert len(entry['lines']) == 2


def test_one_expert_alone():
    only = [change('only', value, e) for e, value in enumerate([-0.4, -0.05, -0.5, -0.3])]
    assert 'best single expert, 1, does not replace the others (AP 0.550' in said(layer(), *only)
    only[3] = change('only', 0.0, 3)
    assert 'expert 3 alone does as well as all together' in said(layer(), *only)


def test_pairs_that_are_always_together():
    together = np.array(
        [[0.5, 0.49, 0.01, 0.0], [0.49, 0.5, 0.0, 0.01], [0.01, 0, 0.5, 0.2], [0, 0.01, 0.2, 0.5]]
    )
    text = said(layer(coactivation=together.tolist()))
    # 0.49 of 0.51 decisions with either.
    assert 'experts 0 and 1 are redundant as a choice: of the decisions with either, 96 %' in text
    assert text.count('redundant') == 1
    text = said(layer(coactivation=np.ones((4, 4)).tolist(), top_k=4))
    assert 'redundant' not in text
    assert 'every decision uses all 4 experts' in text
    # Two experts that are never chosen are no pair.
    text = said(layer(coactivation=np.zeros((4, 4)).tolist(), dead_experts=[0, 1]))
    assert 'redundant' not in text


def test_no_evidence():
    wide = association()
    wide['interval'] = [0, 0.1]
    text = said(layer(associations={'objects': {'class': wide}}))
    assert (
        'whether there is a specialisation cannot be told from 100 images (closest to it: class'
        in text
    )
    assert 'about 2,500 images would do' in text  # (0.1 / 0.02)^2
    text = said(layer())
    assert 'no specialisation by anything compared (closest to it: class, objects: 0.001' in text
    assert 'what the choice depends on was not among what was compared' in text
    found = {'objects': {'class': association(0.05, 0.01, 0.03)}}
    assert 'a hint of a specialisation, no proof' in said(layer(associations=found))
    # Significant, yet 1.9 % of the possible above chance.
    found = {'objects': {'class': association(0.02, 0.001, 0.001)}}
    assert 'no specialisation worth the name' in said(layer(associations=found))
    assert 'nothing was measured' in said(layer(associations={}))
    found = {'objects': {'class': association(0.3, 0.01, 0.01, permutations=99)}}
    assert '99 flips cannot reach p < 0.01' in said(layer(associations=found))
    found['objects']['class'].update(num_units=0, num_images=0, mi=0.0, chance=0.0, mi_max=0.0)
    assert '0 images cannot be compared' in said(layer(associations=found))


def test_rare_bins_are_no_examples():
    """A bin of four objects, all on one expert, is not what a layer is specialised by."""
    counts = [[4.0, 0, 0, 0], [10.0, 300.0, 10.0, 80.0], [290.0, 10.0, 200.0, 100.0]]
    found = {'class': association(0.4, 0.01, 0.001, ['rare', 'cat', 'dog'], counts)}
    text = said(layer(associations={'objects': found}))
    assert 'rare' not in text
    assert 'expert 1 carries 75 % of objects of class cat' in text


def test_classification():
    found = {'objects': {'class': association(0.4, 0.01, 0.001, ['cat', 'dog'], np.eye(2, 4) * 60)}}
    text = said(
        layer(associations=found),
        change('without', -0.003, 2, metric='accuracy', before=0.9),
        change('without', -0.4, 0, metric='accuracy', before=0.9),
        task='classification',
        metric=0.9,
    )
    assert 'images of class cat' in text
    assert 'images of class dog' in text
    assert 'expert 2 -0.003 (-0.004 to -0.002); accuracy falls from 0.900 by no more' in text
    assert 'AP' not in text


def test_undefined_metrics():
    unknown = [{**change(*args), 'difference': {}} for args in (('random', 0), ('without', 0, 1))]
    text = said(layer(), *unknown, metric=None)
    assert 'AP is undefined here' in text
    text = said(layer(), *unknown)
    assert 'random' not in text
    assert 'No interventions were run' in said(layer())


@pytest.mark.parametrize('fields', [{'num_experts': 1}, {'num_decisions': 1}])
def test_nothing_to_choose(fields):
    entry, *_ = judged(layer(**fields))
    assert len(entry['lines']) == 1
    assert 'cannot show any specialisation' in entry['lines'][0]
    assert not entry['details']


@pytest.mark.parametrize('planted', ['level', 'size within level', 'size'])
def test_from_data_to_words(planted):
    """Objects on four levels, larger ones on coarser levels; experts by what was planted."""
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(150), 8)
    level, odd = rng.integers(0, 4, 1200), rng.integers(0, 2, 1200)
    size = 2 * level + odd
    expert = {'level': level, 'size within level': odd, 'size': (size // 2 + odd) % 4}[planted]
    weights = 0.8 * np.eye(4)[expert] + 0.2 * np.eye(4)[rng.integers(0, 4, 1200)]
    found, given = {}, {'level': level}
    for name, values, bins in [
        ('level', level, Bins(list('0123'))),
        ('size', size, Bins(list('abcdefgh'))),
    ]:
        table = Association(len(bins), 4, () if name == 'level' else ('level',))
        table.add(np.arange(1200), values, np.ones(1200), weights, image, given)
        found[name] = bins, table.result()
    text = judged(layer(associations=as_family({'objects': found})))[0]['lines'][1]
    if planted == 'level':
        assert 'strongly specialised by pyramid level (objects: 0.' in text
        assert 'nothing of object size beyond it (0.0' in text
    else:
        assert 'specialised by object size (objects: 0.' in text
        assert 'also beyond the pyramid level (0.' in text


def test_layers_have_human_names():
    names = layer_names(
        [
            *('bbox_head.cls_moe', 'bbox_head.reg_moe', 'backbone.layer4', 'neck.fpn_convs.0.conv'),
            *('roi_head.bbox_head.0.shared_fcs', 'backbone.stages.2.blocks.1.ffn', 'some.thing'),
        ]
    )
    assert list(names.values()) == [
        *('classification head', 'regression head', 'stage 4 of the backbone', 'neck'),
        *('box head of stage 1', 'stage 3 of the backbone', 'some.thing'),
    ]
    counted = layer_names(['backbone.stage1', 'backbone.stage_2', 'backbone.stages.2'])
    assert list(counted.values()) == [f'stage {i} of the backbone' for i in (1, 2, 3)]
    both = layer_names(['backbone.layer4.0.conv1', 'backbone.layer4.1.conv1', 'backbone.layer40'])
    assert list(both.values()) == [
        *('stage 4 of the backbone, 0.conv1', 'stage 4 of the backbone, 1.conv1'),
        'stage 40 of the backbone',
    ]


def test_polysemanticity():
    found = {
        'num_zeroed': 4,
        'num_mattering': 2,
        'mean': 0.5,
        'experts': [0, 1, 2, 3],
        'values': [None, 0.2, None, 0.8],
        'classes': [None, 'cat', None, 'dog'],
        'drops': [0.0, 0.4, 0.0, 0.125],
        'largest': {'expert': 3, 'class': 'dog', 'drop': 0.125, 'p_adjusted': 0.002},
    }
    experts = experts_of(layer(polysemanticity=found), task='classification')
    experts['run']['classes'] = list('abcde')
    (sentence,) = (s for s in verdict(experts)[0]['details'] if 'polysemanticity' in s)
    assert 'polysemanticity 0.50' in sentence
    assert 'at most 2.00' in sentence
    assert 'of the 2 of 4 experts' in sentence
    assert sentence.endswith(
        'expert 3 costs most, 12.5 points of accuracy of class dog (p = 0.002).'
    )
    found['largest'] = None
    (sentence,) = (s for s in verdict(experts)[0]['details'] if 'polysemanticity' in s)
    assert sentence.endswith('; which expert costs which class most cannot be told.')
    nobody = {**found, 'num_mattering': 0}
    assert 'any single one of 4 experts lowers the AP of no class' in said(
        layer(polysemanticity=nobody)
    )


def test_factorised_layers_choose_nobody():
    of_layer = layer(kind='factorised', top_k=4, active_share=[1.0, 0.5, 0.5, 0.25])
    text = said(of_layer)
    assert 'on average 2.2 of the 4 experts have a coefficient above 0' in text
    assert 'every decision uses all' not in text
    ends = [[0.0, 1e-4]] * 40
    dead = layer(num_experts=40, load=[0.0] * 40, load_interval=ends, dead_experts=list(range(20)))
    assert 'dead experts: 20 of 40' in said({**dead, 'coactivation': np.eye(40).tolist()})
