"""The tables of the experiments on generated scenes."""

import torch

from mmdet_moe.analysis.experiments.scenes import markdown_table, specialisation_table
from mmdet_moe.analysis.runs import COCO_METRICS, RunResult
from mmdet_moe.moe import UtilizationReport


def result(ap, load, mi):
    metrics = dict.fromkeys(COCO_METRICS.values(), ap)
    report = UtilizationReport(
        num_items=10, load=load, importance=load, load_cv2=0.5, usage_entropy=0.6,
        decision_entropy=0.1, mi_input=mi, mi_level=mi / 2, level_shares=[load],
    ).as_dict()  # fmt: skip
    return RunResult(metrics, 0.2, 1, 2, 10, {'cls': report, 'reg': report})


def test_table_has_mean_and_deviation_over_the_seeds():
    runs = [result(0.4, [0.5, 0.5], 0.2), result(0.6, [0.996, 0.004], 0.4)]
    # Both layers' only level has all objects.
    table = markdown_table({'some': runs, 'none yet': []}, torch.ones(1))
    lines = table.splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].split('|')[1:-1]]
    # Two of the eight experts (two layers, two experts, two seeds) get less than 1 % of 1 / 2.
    assert cells == [
        'some', '2', *['0.500 ± 0.141'] * 5, '0.50 / 0.50', '2 of 8', '0.30 / 0.30', '0.15 / 0.15',
        '0.00 / 0.00',
    ]  # fmt: skip


def experts_of(ap, mi, p_value, alone, equal, random, both):
    """The parts of an ``experts.json`` that the table reads; ``alone`` has one AP per expert."""
    sizes = {'mi': mi, 'p_value': p_value}
    associations = {
        'objects': {'size_coco': sizes, 'class': {'mi': mi / 10, 'p_value': 0.5}},
        'detections': {'size_coco': {'mi': 2 * mi, 'p_value': p_value / 2}},
    }
    changed = [('cls', 'only', value) for value in alone]
    changed += [('cls', 'equal', equal), ('cls', 'random', random), ('all', 'random', both)]
    return {
        'metrics': {'AP': ap},
        'layers': {'cls': {'associations': associations}},
        'interventions': [
            {'layer': layer, 'kind': kind, 'metrics': {'AP': value}}
            for layer, kind, value in changed
        ],
    }


def test_table_of_specialisation():
    runs = [
        experts_of(0.6, 0.2, 0.001, [0.5, 0.3], 0.55, 0.45, 0.35),
        experts_of(0.4, 0.4, 0.020, [0.1, 0.3], 0.35, 0.25, 0.15),
    ]
    (line,) = specialisation_table({'some': runs}).splitlines()[2:]
    cells = [cell.strip() for cell in line.split('|')[1:-1]]
    # The best and the worst expert of each seed, whichever they are.
    assert cells == [
        'some', '2', '0.30', '0.60', '0.020', '0.03', '0.500 ± 0.141', '0.400', '0.200', '0.450',
        '0.350', '0.250',
    ]  # fmt: skip
