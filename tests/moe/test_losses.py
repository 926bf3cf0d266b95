"""Soft constraints against their formulas, in plain Python over lists of numbers."""

import copy
import math
from statistics import fmean, variance

import pytest
import torch
from torch.autograd import gradcheck

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import (
    DatasetLoss,
    EntropyLoss,
    GAPRouter,
    ImportanceLoss,
    KLLoss,
    RouterZLoss,
    Routing,
    SwitchLoss,
    VarianceLoss,
)


def routing_of(logits, k, softmax='over_chosen', decision=None):
    """Top-k and softmax once more, without a Router."""
    ids = logits.topk(k).indices
    if softmax == 'over_chosen':
        weights = logits.gather(1, ids).softmax(-1)
    else:
        weights = logits.softmax(-1).gather(1, ids)
    return Routing(
        expert_ids=ids,
        weights=weights,
        logits=logits,
        items_per_level=(len(logits),),
        num_images=len(logits),
        decision_weights=logits.new_ones(len(logits)) if decision is None else decision,
        sources=tuple(2 * i // len(logits) for i in range(len(logits))),
    )


def table(routing):
    """Weights as T lists of E numbers, and what each decision counts."""
    rows = [[0.0] * routing.num_experts for _ in range(routing.num_items)]
    for row, ids, weights in zip(
        rows, routing.expert_ids.tolist(), routing.weights.tolist(), strict=True
    ):
        for expert, weight in zip(ids, weights, strict=True):
            row[expert] = weight
    return rows, routing.decision_weights.tolist()


def probabilities(routing):
    rows = []
    for logits in routing.logits.tolist():
        total = sum(math.exp(x) for x in logits)
        rows.append([math.exp(x) / total for x in logits])
    return rows


def sums_per_expert(rows, counts):
    return [
        sum(c * row[e] for row, c in zip(rows, counts, strict=True)) for e in range(len(rows[0]))
    ]


def mean_over_items(values, counts):
    return sum(v * c for v, c in zip(values, counts, strict=True)) / sum(counts)


def importance_formula(routing):
    importance = sums_per_expert(*table(routing))
    if len(importance) == 1:
        return 0.0
    return variance(importance) / (fmean(importance) ** 2 + 1e-10)


def kl_formula(routing):
    rows, counts = table(routing)
    importance = sums_per_expert(rows, counts)
    p = [(i + 1e-10) / sum(importance) for i in importance]
    return sum(x * math.log(x * len(p)) for x in p)


def variance_formula(routing):
    rows, counts = table(routing)
    variances = []
    for e in range(len(rows[0])):
        mean = mean_over_items([row[e] for row in rows], counts)
        variances.append(mean_over_items([(row[e] - mean) ** 2 for row in rows], counts))
    return -fmean(variances)


def switch_formula(routing):
    rows, counts = table(routing)
    load = sums_per_expert([[float(w > 0) for w in row] for row in rows], counts)
    p = [x / sum(counts) for x in sums_per_expert(probabilities(routing), counts)]
    return len(p) * sum(f / sum(load) * q for f, q in zip(load, p, strict=True))


def z_formula(routing):
    squares = [math.log(sum(math.exp(x) for x in row)) ** 2 for row in routing.logits.tolist()]
    return mean_over_items(squares, routing.decision_weights.tolist())


def entropy_of(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def batch_entropy_formula(routing):
    counts = routing.decision_weights.tolist()
    mean = [x / sum(counts) for x in sums_per_expert(probabilities(routing), counts)]
    return math.log(routing.num_experts) - entropy_of(mean)


def item_entropy_formula(routing):
    entropies = [entropy_of(p) for p in probabilities(routing)]
    return mean_over_items(entropies, routing.decision_weights.tolist())


#: The experts of either of two data sets, by the number of experts.
HALVES = {1: ([0], [0]), 3: ([0, 1], [2]), 4: ([0, 1], [2, 3])}


def dataset_formula(routing):
    halves = HALVES[routing.num_experts]
    surprise = [
        -math.log(sum(row[e] for e in halves[source]))
        for row, source in zip(probabilities(routing), routing.sources, strict=True)
    ]
    return mean_over_items(surprise, routing.decision_weights.tolist())


LOSSES = {
    'importance': (ImportanceLoss(1.0), importance_formula),
    'kl': (KLLoss(1.0), kl_formula),
    'variance': (VarianceLoss(1.0), variance_formula),
    'switch': (SwitchLoss(1.0), switch_formula),
    'z': (RouterZLoss(1.0), z_formula),
    'batch entropy': (EntropyLoss(1.0, over='batch'), batch_entropy_formula),
    'item entropy': (EntropyLoss(1.0, over='item'), item_entropy_formula),
    'data sets': (DatasetLoss(1.0, sources=2), dataset_formula),
}
CASES = {  # items, experts, k, softmax
    'usual': (12, 4, 2, 'over_chosen'),
    'switch weights': (12, 4, 1, 'over_all'),
    'softmax before the choice': (12, 4, 2, 'over_all'),
    'all experts': (5, 3, 3, 'over_chosen'),
    'one sample': (1, 4, 2, 'over_chosen'),
    'one expert': (6, 1, 1, 'over_chosen'),
    'one of each': (1, 1, 1, 'over_all'),
}

every_loss = pytest.mark.parametrize(('loss', 'formula'), LOSSES.values(), ids=LOSSES)
every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


@every_loss
@every_case
@pytest.mark.parametrize('weighed', [False, True])
def test_formula(loss, formula, case, weighed):
    items, experts, k, softmax = case
    decision = torch.rand(items).double() * 3 if weighed else None
    routing = routing_of(2 * torch.randn(items, experts).double(), k, softmax, decision)
    assert loss(routing).item() == pytest.approx(formula(routing), abs=1e-8)


@every_loss
@every_case
def test_gradients_by_finite_differences(loss, formula, case):
    items, experts, k, softmax = case
    decision = torch.rand(items).double()
    # Equidistant logits in random order: no finite difference changes a choice.
    logits = torch.stack([torch.randperm(experts).double() for _ in range(items)])
    logits = (logits + 0.2 * torch.rand(items, experts)).requires_grad_()
    assert gradcheck(lambda x: loss(routing_of(x, k, softmax, decision)), (logits,))


@every_loss
def test_all_samples_alike(loss, formula):
    logits = torch.tensor([[1.0, 3.0, 2.0]]).double().repeat(5, 1).requires_grad_()
    routing = routing_of(logits, 2)
    assert loss(routing).item() == pytest.approx(formula(routing), abs=1e-8)
    assert torch.autograd.grad(loss(routing), logits)[0].isfinite().all()


def test_numbers_written_out():
    """Two items, three experts; importance (1, 0.75, 0.25), load (2, 1, 1)."""
    weights = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).double()
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).double().log()
    routing = Routing(
        torch.tensor([[0, 2], [1, 0]]), weights, logits, (2,), 2, torch.ones(2).double()
    )
    # Deviations from 2/3: 1/3, 1/12, -5/12; their squares sum to 42/144, the variance is 21/144.
    assert ImportanceLoss(0.5)(routing).item() == pytest.approx(0.5 * 21 / 144 * 9 / 4)
    kl = 0.5 * math.log(1.5) + 0.375 * math.log(1.125) + 0.125 * math.log(0.375)
    assert KLLoss(0.5)(routing).item() == pytest.approx(0.5 * kl)
    # Columns (0.75, 0.25), (0, 0.75), (0.25, 0) have the variances 1/16, 9/64 and 1/64.
    assert VarianceLoss(0.5)(routing).item() == pytest.approx(-0.5 * 14 / 64 / 3)
    # f = (1/2, 1/4, 1/4), P = (3/8, 3/8, 1/4): 3 · (12 + 6 + 4) / 64.
    assert SwitchLoss(0.01)(routing).item() == pytest.approx(0.01 * 3 * 22 / 64)
    # The logits are log probabilities, their logsumexp is 0; shifted by 2 it is 2.
    assert RouterZLoss(1.0)(routing).item() == pytest.approx(0, abs=1e-12)
    routing.logits = logits + 2
    assert RouterZLoss(0.001)(routing).item() == pytest.approx(0.004)
    assert EntropyLoss(0.1, 'item')(routing).item() == pytest.approx(0.1 * 1.5 * math.log(2))
    mean_entropy = -(0.75 * math.log(3 / 8) + 0.25 * math.log(1 / 4))
    expected = 0.1 * (math.log(3) - mean_entropy)
    assert EntropyLoss(0.1, 'batch')(routing).item() == pytest.approx(expected)


def test_entropies_together_are_the_mutual_information():
    """Twice sure of different experts: log 2 nats; I = H(mean p) − mean H(p)."""
    routing = routing_of(torch.tensor([[30.0, 0.0], [0.0, 30.0]]), 1, 'over_all')
    batch, item = EntropyLoss(1.0, 'batch')(routing), EntropyLoss(1.0, 'item')(routing)
    assert (math.log(2) - batch - item).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize('k', [1, 2, 4])
def test_perfect_balance(k):
    """Every expert equally often and with the same weights."""
    base = torch.tensor([3.0, 2.0, 1.0, 0.0]).double()
    routing = routing_of(torch.stack([base.roll(i) for i in range(4)]), k, 'over_all')
    assert ImportanceLoss(1.0)(routing).item() == pytest.approx(0, abs=1e-12)
    assert KLLoss(1.0)(routing).item() == pytest.approx(0, abs=1e-12)
    assert SwitchLoss(1.0)(routing).item() == pytest.approx(1)


def test_surplus_weights_are_no_load():
    """With one free expert of two, f = (1, 0) and P = (1/4, 3/4)."""
    logits = torch.tensor([[0.25, 0.75]]).double().log()
    weights = torch.tensor([[1.0, 0.0]]).double()
    routing = Routing(torch.tensor([[0, 1]]), weights, logits, (1,), 1, torch.ones(1).double())
    assert SwitchLoss(1.0)(routing).item() == pytest.approx(2 * 0.25)
    assert KLLoss(1.0)(routing).item() == pytest.approx(math.log(2))
    assert ImportanceLoss(1.0)(routing).item() == pytest.approx(0.5 / 0.25)


@every_loss
def test_an_expert_without_importance(loss, formula):
    """No infinite gradient where a share or a probability is 0."""
    logits = torch.tensor([[200.0, 100.0, -100.0]] * 3).double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(routing_of(logits, 2)), logits)
    assert gradient.isfinite().all()
    logits = torch.tensor([[200.0, 100.0, -100.0]] * 3).requires_grad_()
    value = loss(routing_of(logits, 2))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert gradient.isfinite().all()


@every_loss
def test_decision_weights_of_zero_leave_items_out(loss, formula):
    logits = torch.randn(6, 4).double()
    decision = torch.tensor([1.0, 0, 1, 0, 0, 1]).double()
    some, alone = routing_of(logits, 2, decision=decision), routing_of(logits[[0, 2, 5]], 2)
    assert loss(some).item() == pytest.approx(formula(alone), abs=1e-9)


@every_loss
def test_only_ratios_of_decision_weights_matter(loss, formula):
    logits, decision = torch.randn(6, 4).double(), torch.rand(6).double()
    expected = loss(routing_of(logits, 2, decision=decision)).item()
    scaled = loss(routing_of(logits, 2, decision=100 * decision)).item()
    assert scaled == pytest.approx(expected, abs=1e-7)


@every_loss
def test_decision_weights_of_zero_everywhere(loss, formula):
    """A batch without objects: nothing to balance, no NaN, no gradient."""
    logits = torch.randn(3, 4).requires_grad_()
    value = loss(routing_of(logits, 2, decision=torch.zeros(3)))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite()
    assert torch.equal(gradient, torch.zeros(3, 4))


@every_loss
def test_unweighed_decisions_are_refused(loss, formula):
    routing = routing_of(torch.randn(3, 4), 2)
    routing.decision_weights = None
    with pytest.raises(RuntimeError, match='weigh_decisions'):
        loss(routing)


@every_loss
def test_float32_under_autocast(loss, formula):
    routing = routing_of(torch.randn(8, 4), 2)
    with torch.autocast('cpu', torch.bfloat16):
        value = loss(routing)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(formula(routing), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize('make', [ImportanceLoss, KLLoss, VarianceLoss, SwitchLoss, RouterZLoss])
def test_weight(make):
    routing = routing_of(torch.randn(8, 4), 2)
    assert make(0.25)(routing).item() == pytest.approx(0.25 * make(1.0)(routing).item())
    assert make(0.0)(routing).item() == 0
    for weight in (-1, float('nan'), '0.5', True):
        message = f'{make.__name__}: weight={weight!r} must be a finite number of at least 0'
        with pytest.raises(ConfigError, match=message):
            make(weight)


def test_unknown_entropy_is_refused():
    with pytest.raises(ConfigError, match="over='images' is unknown; use 'batch' or 'item'"):
        EntropyLoss(over='images')


@pytest.mark.parametrize('over', ['batch', 'item'])
def test_entropy_of_a_batch_that_counts_nothing_is_zero(over):
    routing = GAPRouter(2, 3, 2, noise=False)(torch.randn(4, 2, 4, 4))
    routing.decision_weights = torch.zeros(4)
    assert EntropyLoss(over=over)(routing) == 0


def test_one_expert_for_each_data_set_is_cross_entropy():
    """DAMEX: of three images on two levels, each with two items."""
    logits = torch.randn(12, 3).double()
    routing = routing_of(logits, 1, 'over_all')
    routing.items_per_level, routing.num_images, routing.sources = (6, 6), 3, (2, 0, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 2, 0, 0, 1, 1] * 2))
    for sources in (3, (0, 1, 2)):
        assert DatasetLoss(1.0, sources)(routing).item() == pytest.approx(expected.item())


def test_more_data_sets_than_experts_share_them():
    assert DatasetLoss(sources=5).experts_of(2) == [[0], [1], [0], [1], [0]]
    assert DatasetLoss(sources=[1, (0, 2)]).experts_of(3) == [[1], [0, 2]]


@pytest.mark.parametrize('sources', [0, True, (), ((0,), ()), ((0,), (-1,)), ('0', '1'), (0, 1.0)])
def test_data_sets_without_experts_are_refused(sources):
    with pytest.raises(ConfigError, match=r'DatasetLoss: .*sources=.* must be'):
        DatasetLoss(sources=sources)


def test_data_sets_that_do_not_fit_are_refused():
    routing = routing_of(torch.randn(4, 3), 2)
    for sources in (1, (0, 3)):  # the images are of two; there are experts 0 to 2
        with pytest.raises(ConfigError, match='does not fit a layer of 3 experts and images of'):
            DatasetLoss(sources=sources)(routing)
    routing.sources = None
    with pytest.raises(ConfigError, match=r'set routing\.sources to the number of the data set'):
        DatasetLoss()(routing)
    routing.sources = (0, 1)
    with pytest.raises(ConfigError, match='set sources to the number of data sets'):
        DatasetLoss()(routing)


@pytest.mark.parametrize('name', LOSSES)
def test_within_levels(name):
    """The mean of the losses of each level alone, which count as much as their decisions."""
    loss, formula = LOSSES[name]
    torch.manual_seed(0)
    counts = torch.tensor([1.0, 2, 0, 1, 5, 1, 2, 0, 0, 0]).double()
    logits = torch.randn(10, 4).double()
    whole = routing_of(logits, 2, decision=counts)
    whole.items_per_level, whole.num_images, whole.sources = (4, 4, 2), 2, (0, 1)
    parts = []
    for level in (slice(0, 4), slice(4, 8)):  # nothing counts on the last one
        part = routing_of(logits[level], 2, decision=counts[level])
        part.num_images, part.sources = 2, (0, 0, 1, 1)
        parts.append(formula(part))
    within = copy.deepcopy(loss)
    within.within = 'level'
    assert within(whole).item() == pytest.approx((4 * parts[0] + 8 * parts[1]) / 12, abs=1e-8)


def test_experts_of_one_level_each():
    """Pooled, they are in balance; within the levels they are not."""
    routing = routing_of(torch.tensor([[9.0, 9, 0, 0]] * 3 + [[0.0, 0, 9, 9]] * 3), 2)
    routing.items_per_level, routing.num_images = (3, 3), 3
    assert ImportanceLoss(1.0)(routing) == 0
    # Importances (1.5, 1.5, 0, 0): variance 0.75, mean 0.75.
    assert ImportanceLoss(1.0, within='level')(routing).item() == pytest.approx(0.75 / 0.75**2)
    with pytest.raises(ConfigError, match="ImportanceLoss: within='image' is unknown"):
        ImportanceLoss(within='image')
