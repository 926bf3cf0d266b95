"""What is said about experts of which it is known."""

import copy
import math

import numpy as np
import pytest

from mmdet_moe.analysis.report.verdict import verdict
from mmdet_moe.analysis.statistics.association import Association
from mmdet_moe.analysis.statistics.bins import COCO_SIZES, SIZES, Bins

HEAD = 'bbox_head.cls_moe'


def association(mi=0.001, chance=0.001, p_value=0.5, bins=('a', 'b'), counts=None, **fields):
    """Two bins and four experts without any association, unless told otherwise."""
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
        'mi': mi,
        'chance': chance,
        'p_value': p_value,
        'permutations': 999,
        'num_units': 500,
        'mi_max': 1.0,
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
        'importance': [0.25] * 4,
        'mi_input': 0.5,
        'dead_experts': [],
        'collapsed': False,
        'coactivation': (np.full((4, 4), 1 / 6) + np.eye(4) / 3).tolist(),
        'associations': {'objects': {'class': association()}},
        **fields,
    }


def change(kind, value, expert=None, layer=HEAD, metric='AP'):
    return {'layer': layer, 'kind': kind, 'expert': expert, 'metrics': {metric: value}}


def experts_of(of_layer, interventions=(), task='detection', metric=0.6, num_images=5000):
    name = 'accuracy' if task == 'classification' else 'AP'
    return {
        'run': {'task': task, 'num_images': num_images},
        'metrics': {name: metric, 'per_class': {}},
        'layers': {HEAD: of_layer},
        'interventions': list(interventions),
    }


def said(of_layer, *interventions, **kwargs):
    """All sentences, one per line; the dict is only read."""
    experts = experts_of(of_layer, interventions, **kwargs)
    before = copy.deepcopy(experts)
    text = '\n'.join(verdict(experts))
    assert experts == before
    assert 'nan' not in text
    return text


SIZE_COUNTS = [
    [9.0, 5.0, 81.0, 5.0],  # small: 81 % on expert 2
    [20.0, 30.0, 20.0, 30.0],  # medium
    [92.0, 4.0, 0.0, 4.0],  # large
]


def test_specialised_by_size():
    size = association(0.4, 0.01, 0.001, COCO_SIZES.names, SIZE_COUNTS, mi_max=1.05)
    text = said(
        layer(associations={'objects': {'size_coco': size}, 'decisions': {'image': association()}})
    )
    # 0.4 / 1.05 = 38 %; above chance 37 %.
    assert (
        'strongly specialised by object size (small, medium, large) (objects, 0.400 nats, 38 % of '
        'the possible 1.05, by chance 0.010, p = 0.001, 500 decisions).' in text
    )
    # The largest part of the information is large on 0: of 300 objects 121 on expert 0, 92 of them
    # large; then small on 2.
    assert (
        'expert 0 carries 92 % of large objects (of everything: 40 %); 80 % of what expert 2 sees '
        'are small objects (of everything: 33 %).' in text
    )
    assert 'not collapsed: the input explains 0.500 of 1.39 nats, 36 %' in text
    assert text.count('\n') == 3
    assert all(line.startswith(f'{HEAD}: ') for line in text.split('\n')[:-1])


def test_size_comes_first_then_the_strongest():
    found = {
        'class': association(0.5, 0.01, 0.001),
        'position': association(0.3, 0.01, 0.001),
        'size': association(0.2, 0.01, 0.001, SIZES.names[:2]),
        'size_coco': association(0.15, 0.01, 0.001),
    }
    text = said(layer(associations={'objects': found}))
    assert 'clearly specialised by object size (objects, 0.200' in text
    assert text.index('class (objects, 0.500') < text.index('position in the image (objects, 0.300')
    assert '0.150' not in text  # the same said twice
    del found['size'], found['size_coco']
    text = said(layer(associations={'objects': found}))
    assert 'strongly specialised by class' in text


def test_objects_speak_before_detections():
    objects, detections = association(0.2, 0.01, 0.001), association(0.4, 0.01, 0.001)
    both = {'detections': {'class': detections}, 'objects': {'class': objects}}
    assert 'class (objects, 0.200' in said(layer(associations=both))
    objects['num_units'] = 0
    assert 'class (detections, 0.400' in said(layer(associations=both))


def test_images_are_no_speciality():
    found = {'image': association(0.9, 0.01, 0.001), 'level': association()}
    text = said(layer(associations={'decisions': found}))
    assert 'no evidence of a specialisation' in text
    assert '0.900' not in text


def test_collapsed():
    text = said(layer(collapsed=True, mi_input=0.004))
    assert 'COLLAPSED: the choice of experts hardly depends on the input (0.004 of 1.39' in text
    assert 'specialised by' not in text
    # Even if the little that is left goes with something.
    found = {'objects': {'class': association(0.1, 0.01, 0.001)}}
    text = said(layer(collapsed=True, mi_input=0.004, associations=found))
    assert 'specialised by' not in text
    assert 'the little that the choice depends on goes with class (objects, 0.100' in text


def test_dead():
    text = said(layer(dead_experts=[1, 3], load=[0.5, 0.001, 0.499, 0]))
    assert (
        'candidates for pruning: expert 1, 3 (load 0.1 %, 0 %; below 1 % of the fair 25 %' in text
    )
    assert 'dead' not in said(layer())


def test_prunable():
    """A loss within the tolerance is allowed, and so is a gain."""
    changes = (change('without', 0.596, 0), change('without', 0.610, 2), change('without', 0.4, 1))
    text = said(layer(), *changes, change('without', 0.594, 3))
    assert 'expert 0 (-0.004), 2 (+0.010); AP falls from 0.600 by no more than 0.005' in text
    assert 'expert 1 is needed most: without it AP changes by -0.200 from 0.600' in text
    text = said(layer(), change('without', 0.4, 1))
    assert 'no expert can be pruned: each removal costs more than 0.005 AP' in text


def test_random_routing():
    text = said(layer(), change('random', 0.598))
    assert 'random routing does not hurt (AP 0.598 instead of 0.600): the routing does not' in text
    text = said(layer(), change('random', 0.5), change('equal', 0.599))
    assert 'random routing costs 0.100 (AP 0.500 instead of 0.600): it matters' in text
    assert 'equally does not hurt' in text
    text = said(layer(), change('random', 0.1, layer='all'))
    assert 'All layers together: random routing costs 0.500' in text
    assert f'{HEAD}: random' not in text


def test_one_expert_alone():
    only = [change('only', value, e) for e, value in enumerate([0.2, 0.55, 0.1, 0.3])]
    assert 'best single expert, 1, does not replace the others (AP 0.550' in said(layer(), *only)
    only[3] = change('only', 0.6, 3)
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
    text = said(layer())
    assert 'no evidence of a specialisation (closest to it, class: objects, 0.001' in text
    assert 'p = 0.5' in text
    found = {'objects': {'class': association(0.05, 0.01, 0.03)}}
    assert 'a hint of a specialisation, no proof' in said(layer(associations=found))
    # Significant, yet 1.9 % of the possible above chance.
    found = {'objects': {'class': association(0.02, 0.001, 0.001)}}
    assert 'no specialisation worth the name' in said(layer(associations=found))
    assert 'nothing was measured' in said(layer(associations={}))


def test_few_data():
    found = {'objects': {'class': association(0.05, 0.04, 0.3, num_units=40)}}
    assert '40 decisions are few' in said(layer(associations=found))
    found['objects']['class'].update(p_value=0.001, mi=0.3)
    text = said(layer(associations=found))
    assert 'only 40 decisions had something to compare with' in text
    found['objects']['class'].update(permutations=99, p_value=0.01)
    assert '99 permutations cannot reach p < 0.01' in said(layer(associations=found))
    found['objects']['class'].update(num_units=0, p_value=1.0, mi=0.0, chance=0.0, mi_max=0.0)
    assert '0 decisions cannot be compared' in said(layer(associations=found))
    text = said(layer(), change('random', 0.598), num_images=200)
    assert 'measured on 200 images: differences near the tolerance of 0.005 AP' in text


def test_rare_bins_are_no_examples():
    """A bin of four objects, all on one expert, is not what a layer is specialised by."""
    counts = [[4.0, 0, 0, 0], [10.0, 300.0, 10.0, 80.0], [290.0, 10.0, 200.0, 100.0]]
    found = {'class': association(0.4, 0.01, 0.001, ['rare', 'cat', 'dog'], counts)}
    text = said(layer(associations={'objects': found}))
    assert 'rare' not in text
    assert 'expert 1 carries 75 % of objects of class cat' in text


def test_neighbours_are_not_independent():
    found = {'objects': {'class': association(0.4, 0.01, 0.001)}}
    pixels = layer(granularity='pixel', associations=found)
    assert 'p-values are too small' in said({**pixels, 'num_decisions': 90_000})
    assert 'p-values are too small' not in said({**pixels, 'num_decisions': 500})  # one an image
    assert 'p-values are too small' not in said(layer(associations=found))


def test_classification():
    found = {'objects': {'class': association(0.4, 0.01, 0.001, ['cat', 'dog'], np.eye(2, 4) * 60)}}
    text = said(
        layer(associations=found),
        change('without', 0.896, 2, metric='accuracy'),
        change('without', 0.5, 0, metric='accuracy'),
        task='classification',
        metric=0.9,
    )
    assert 'images of class cat' in text
    assert 'images of class dog' in text
    assert 'expert 2 (-0.004); accuracy falls from 0.900 by no more than 0.005' in text
    assert 'AP' not in text


def test_undefined_metrics():
    text = said(layer(), change('random', None), change('without', None, 1), metric=None)
    assert 'AP is undefined here' in text
    text = said(layer(), change('random', None), change('without', None, 1))
    assert 'random' not in text
    assert 'No interventions were run' in said(layer())


@pytest.mark.parametrize('fields', [{'num_experts': 1}, {'num_decisions': 1}])
def test_nothing_to_choose(fields):
    text = said(layer(**fields))
    assert 'cannot show any specialisation' in text
    assert text.count('\n') == 1


def test_from_data_to_words():
    """Experts that know the class, from the entries on."""
    classes = np.arange(300) % 2
    weights = np.where(classes[:, None] == 0, [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5])
    joint = Association(2, 4)
    joint.add(np.arange(300), classes, np.ones(300), weights)
    found = joint.result().as_dict(Bins(['cat', 'dog']))
    text = said(layer(associations={'objects': {'class': found}}, mi_input=math.log(2)))
    assert 'strongly specialised by class (objects, 0.69' in text
    assert 'p = 0.001, 300 decisions' in text
    assert 'carries 50 % of objects of class' in text


def test_polysemanticity():
    found = {
        'num_zeroed': 4,
        'num_mattering': 2,
        'mean': 0.5,
        'experts': [0, 1, 2, 3],
        'values': [None, 0.2, None, 0.8],
        'classes': [None, 'cat', None, 'dog'],
        'drops': [0.0, 0.4, 0.0, 0.125],
    }
    experts = experts_of(layer(polysemanticity=found), task='classification')
    experts['run']['classes'] = list('abcde')
    (sentence,) = (s for s in verdict(experts) if 'polysemanticity' in s)
    assert 'polysemanticity 0.50' in sentence
    assert 'at most 2.00' in sentence
    assert 'of the 2 of 4 experts' in sentence
    assert 'expert 1 costs most, 40.0 points of accuracy of class cat' in sentence
    nobody = {**found, 'num_mattering': 0}
    assert 'any single one of 4 experts lowers the AP of no class' in said(
        layer(polysemanticity=nobody)
    )


def test_factorised_layers_choose_nobody():
    of_layer = layer(kind='factorised', top_k=4, active_share=[1.0, 0.5, 0.5, 0.25])
    text = said(of_layer)
    assert 'on average 2.2 of the 4 experts have a coefficient above 0' in text
    assert 'every decision uses all' not in text
    dead = layer(num_experts=40, load=[0.0] * 40, dead_experts=list(range(20)))
    assert '20 of 40 experts are dead' in said({**dead, 'coactivation': np.eye(40).tolist()})
