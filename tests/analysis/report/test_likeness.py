"""Sentences and figures on experts that are alike, of made up numbers."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage
from synthetic import make_experts

from mmdet_moe.analysis.report.figures import draw_figures
from mmdet_moe.analysis.report.likeness import (
    draw_similarity,
    draw_similarity_over_training,
    likeness,
)
from mmdet_moe.drawing import style, to_rgb

LAYER = 'bbox_head.cls_moe'


def matrix(experts, value):
    return (np.full((experts, experts), value) + (1 - value) * np.eye(experts)).tolist()


def similar(experts=4, cosine=0.5, cka=0.3):
    pairs = experts * (experts - 1) // 2
    return {
        'reason': None,
        'weights': {'cosine': matrix(experts, -0.1)},
        'outputs': {
            'cosine': matrix(experts, cosine), 'cka': matrix(experts, cka), 'num_examples': 4096,
        },
        'linkage_of': 'outputs',
        'linkage': linkage(np.linspace(0.1, 0.9, pairs), 'average').tolist(),
        'training': {'step': [10, 20], 'mean': [1.0, 0.7], 'least': [1, 0.5], 'most': [1, 0.8]},
    }  # fmt: skip


def made(experts=4, **options):
    content = make_experts(experts, layers=(LAYER,), interventions=False, history=False)
    content['layers'][LAYER]['similarity'] = similar(experts, **options)
    return content


def test_sentences():
    content = made()
    assert likeness(content) == [
        f'{LAYER}: what two experts make of the same inputs has in the mean cosine 0.50, CKA 0.30.'
    ]
    (sentence,) = likeness(made(cosine=0.98, cka=0.97))
    assert 'near copies: what two' in sentence
    (sentence,) = likeness(made(cosine=0.98, cka=0.01))  # a mean in common, and nothing else
    assert 'near copies' not in sentence
    content['layers'][LAYER]['similarity'] = {'reason': 'there is one expert alone'}
    assert likeness(content) == []
    shares = {
        'num_decisions': 1200, 'changed': 0.25, 'changed_by_chance': 0.75,
        'changed_relabelled_by_chance': 0.7,
    }  # fmt: skip
    content['stability'] = [
        {'run': 'a', 'reason': None, 'layers': {LAYER: {**shares, 'changed_relabelled': 0.25}}},
        {'run': 'b', 'reason': None, 'layers': {LAYER: {**shares, 'changed_relabelled': 0.1}}},
        {'run': 'c', 'reason': 'it is of another split', 'layers': {}},
    ]
    one, two, three = likeness(content)
    assert one == (
        f'{LAYER}: against a, 25.0 % of 1,200 decisions have another main expert (75.0 % by '
        'chance).'
    )
    assert two.endswith('(75.0 % by chance; with experts renumbered 10.0 %, 70.0 % by chance).')
    assert three == 'Decisions are not compared with those of c: it is of another split.'


def test_figures_of_a_layer():
    """One with the similarity, one over the training; none where experts are not compared."""
    content = made(2)
    layer = content['layers'][LAYER]
    layer['associations'] = {}
    with style():
        names = [name for _, name, _ in draw_figures(content)]
        assert {'similarity', 'similarity_training'} < set(names)
        layer['similarity'] = {'reason': 'there is one expert alone'}
        assert 'similarity' not in [name for _, name, _ in draw_figures(content)]
        assert to_rgb(draw_similarity_over_training(LAYER, similar()['training']), 50).min() == 0


@pytest.mark.parametrize('experts', [2, 4, 32])
@pytest.mark.parametrize('is_complete', [True, False])
def test_matrices_and_tree(experts, is_complete):
    found = similar(experts)
    if not is_complete:
        found |= {'outputs': None, 'linkage_of': 'weights'}
    with style():
        figure = draw_similarity(LAYER, found)
        assert to_rgb(figure, 50).min() < 10
    *panels, tree, bar = figure.axes
    cells = [len(axes.collections[0].get_array().ravel()) for axes in panels]
    assert cells == [experts**2] * (3 if is_complete else 1)
    leaves = sorted(int(tick.get_text()) for tick in tree.get_xticklabels())
    assert leaves == list(range(experts))
    assert bar.get_xlim() == (0, 1)
