"""Statistics of hand-made decisions."""

import json
import math

import pytest
import torch
from scipy.stats import entropy
from torch import nn

from mmdet_moe.moe import GAPRouter, RelativeImportanceConstraint, Routing, Utilization
from mmdet_moe.moe.constraints import BiasBalancing
from mmdet_moe.moe.utilization import sums_of_decisions


def router_of(num_experts, top_k, **kwargs):
    """A router whose logits are the pooled input itself."""
    router = GAPRouter(num_experts, num_experts, top_k, **kwargs)
    nn.init.eye_(router.fc.weight)
    return router.eval()


def report_of(router, *batches):
    """Each batch is a (T, E) table of probabilities, or a tuple of them: the levels."""
    utilization = Utilization(router.num_experts)
    for batch in batches:
        levels = batch if isinstance(batch, tuple) else (batch,)
        maps = [torch.tensor(level).log()[:, :, None, None] for level in levels]
        utilization.update(router(maps), router)
    return utilization.report()


def test_collapse_to_two_experts_is_seen():
    """Half and half looks balanced in the load, but the input decides nothing."""
    report = report_of(router_of(4, 2), [[0.375, 0.375, 0.125, 0.125]] * 8)
    assert report.load == [0.5, 0.5, 0, 0]
    assert report.importance == [0.5, 0.5, 0, 0]
    assert report.mi_input == 0
    assert report.decision_entropy == pytest.approx(math.log(2))
    assert report.usage_entropy == pytest.approx(math.log(2))
    assert report.has_collapsed(0.02)
    assert report.dead_experts(0.01) == [2, 3]


@pytest.mark.parametrize('constant', [[0.6, 0.2, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]])
@pytest.mark.parametrize('top_k', [1, 2, 4])
def test_constant_decisions_have_no_information(constant, top_k):
    report = report_of(router_of(4, top_k), [constant] * 7, [constant] * 3)
    assert report.num_items == 10
    assert report.mi_input == pytest.approx(0, abs=1e-6)
    assert report.has_collapsed(0.001)


def test_two_groups_with_their_own_experts():
    groups = [[0.7, 0.1, 0.1, 0.1]] * 3 + [[0.1, 0.1, 0.7, 0.1]] * 3
    report = report_of(router_of(4, 1), groups)
    assert report.mi_input == pytest.approx(math.log(2))
    assert report.decision_entropy == 0
    assert report.load == [0.5, 0, 0.5, 0]
    assert not report.has_collapsed(0.02)
    assert report.has_collapsed(0.51)  # log 2 is half of log 4
    # Two of four experts with load 1/2: mean 1/4, unbiased variance 4 · (1/4)² / 3.
    assert report.load_cv2 == pytest.approx(4 / 3, rel=1e-6)


def test_numbers_written_out():
    """Kept weights (3/4, 1/4, 0) and (0, 1/2, 1/2); mean (3/8, 3/8, 1/4)."""
    report = report_of(router_of(3, 2), [[0.6, 0.2, 0.1], [0.1, 0.4, 0.4]])
    decision = (entropy([0.75, 0.25]) + math.log(2)) / 2
    usage = entropy([0.375, 0.375, 0.25])
    assert report.num_items == 2
    assert report.num_experts == 3
    assert report.load == [0.25, 0.5, 0.25]
    assert report.importance == pytest.approx([0.375, 0.375, 0.25])
    assert report.decision_entropy == pytest.approx(decision)
    assert report.usage_entropy == pytest.approx(usage)
    assert report.mi_input == pytest.approx(usage - decision)
    assert report.mi_level == pytest.approx(0, abs=1e-6)


def test_switch_weights_are_normalised():
    """The probability of the one chosen expert is no uncertainty about the choice."""
    report = report_of(router_of(3, 1), [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    assert report.mi_input == pytest.approx(math.log(2))
    assert report.importance == pytest.approx([0.5 / 1.1, 0, 0.6 / 1.1])


def test_information_on_the_level():
    first, second = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    by_level = report_of(router_of(3, 1), ([first] * 4, [second] * 4))
    assert by_level.mi_level == pytest.approx(math.log(2))
    by_image = report_of(router_of(3, 1), ([first, second], [first, second]))
    assert by_image.mi_level == pytest.approx(0, abs=1e-6)
    assert by_image.mi_input == pytest.approx(math.log(2))


@pytest.mark.parametrize('top_k', [1, 2])
def test_batches_add_up(top_k):
    router, table = router_of(4, top_k), torch.rand(12, 4).tolist()
    together = report_of(router, table)
    in_parts = report_of(router, table[:1], table[1:5], table[5:])
    assert in_parts.num_items == together.num_items == 12
    assert in_parts.scalars() == pytest.approx(together.scalars(), abs=1e-6)


def test_dead_experts():
    """A share of the fair 1 / E: of 8 items expert 1 gets 1, a quarter of the fair half."""
    report = report_of(router_of(2, 1), [[0.9, 0.1]] * 7 + [[0.1, 0.9]])
    assert report.load == [0.875, 0.125]
    assert report.dead_experts(0.24) == []
    assert report.dead_experts(0.26) == [1]


@pytest.mark.parametrize(('num_experts', 'items'), [(1, 5), (3, 1)])
def test_one_expert_or_one_item_cannot_say(num_experts, items):
    report = report_of(router_of(num_experts, 1), [[0.5] * num_experts] * items)
    assert not report.has_collapsed(1.0)
    assert all(math.isfinite(x) for x in report.scalars().values())


def test_information_is_that_of_inference():
    """A mask of training hides a collapse no more than noise does."""
    router = router_of(3, 1, constraint=RelativeImportanceConstraint(3)).train()
    utilization = Utilization(3)
    x = torch.tensor([[0.5, 0.3, 0.2]] * 4).log()[:, :, None, None]
    for masked in (0, 1):
        router.constraint.relative_importance.copy_(torch.eye(3)[masked])
        utilization.update(router(x), router)
    report = utilization.report()
    assert report.load == [0.5, 0.5, 0]  # what training did
    assert report.mi_input == 0


def test_sums_over_many_items():
    """In float32, added one after the other, the share of a level would be 0.4 % off."""
    weights = torch.tensor([[0.7, 0.3]]).expand(400_000, 2)
    sums = sums_of_decisions(weights, torch.zeros(len(weights), dtype=torch.int64), 1)
    expected = torch.tensor([[280_000.0, 120_000.0]]).double()
    torch.testing.assert_close(sums['levels'], expected, rtol=1e-6, atol=0)


def test_weights_that_are_next_to_nothing():
    """A bias chose an expert 120 logits below the best, whose weight is 0 in float32."""
    router = router_of(2, 1, constraint=BiasBalancing(2), softmax='over_all')
    router.constraint.bias.copy_(torch.tensor([0.0, 1.5]))
    utilization = Utilization(2)
    logits = torch.tensor([[120.0, 0.0], [1.0, 0.0]])
    utilization.update(router(logits[:, :, None, None]), router)
    report = utilization.report()
    # Weights 0, and 1 / (1 + e): the second item alone has any.
    assert report.num_items == 2
    assert report.load == [0, 1]
    assert (report.decision_entropy, report.mi_input) == (0, 0)


def test_disagreement_of_training_and_inference():
    """Eight items that noise, or a mask, spread evenly; the logits want two experts."""
    router = router_of(4, 1)
    logits = torch.tensor([[3.0, 1, 1, 1]] * 6 + [[1.0, 3, 1, 1]] * 2)
    ids = torch.arange(4).repeat(2)[:, None]
    routing = Routing(ids, torch.ones(8, 1), logits, (8,), 8, torch.ones(8))
    utilization = Utilization(4)
    utilization.update(routing, router)
    report = utilization.report()
    assert report.load == [0.25] * 4
    assert report.inference_load == [0.75, 0.25, 0, 0]
    assert report.disagreement() == 0.5
    assert '(at inference 0.75 0.25 0.00 0.00)' in str(report)


def train_on(router, *batches):
    """The report of a training on (T, E) tables of logits, the constraint being told of each."""
    utilization = Utilization(router.num_experts)
    for logits in batches:
        routing = router(torch.tensor(logits)[:, :, None, None])
        router.constraint.update(routing)
        utilization.update(routing, router)
    return utilization.report()


FIRST, SECOND = [[3.0, 0.0]] * 4, [[0.0, 3.0]] * 4


def test_how_often_an_expert_was_masked():
    constraint = RelativeImportanceConstraint(2, threshold=0.5)
    router = router_of(2, 1, constraint=constraint).train()
    # r = (1, -1): expert 0 is masked. The next four go to expert 1, r = (0, 0): nobody is. After
    # four more for expert 1 it is masked.
    report = train_on(router, FIRST, FIRST, SECOND, FIRST)
    assert report.constraint == {'masked': [0.25, 0.25]}
    scalars = report.scalars()
    assert (scalars['masked_0'], scalars['inference_load_0']) == (0.25, 0.75)
    assert json.loads(json.dumps(report.as_dict()))['constraint'] == {'masked': [0.25, 0.25]}
    utilization = Utilization(2)
    router.eval()
    utilization.update(router(torch.tensor(FIRST)[:, :, None, None]), router)
    assert utilization.report().constraint == {}  # masks act in training alone


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_mean_bias(dtype):
    router = router_of(2, 1, constraint=BiasBalancing(2, update_rate=0.25)).to(dtype).train()
    report = train_on(router, FIRST, FIRST)  # ∓0.25, then ∓0.5
    assert report.constraint == {'bias': [-0.375, 0.375]}
    assert report.scalars()['bias_1'] == 0.375


def test_report_as_scalars_and_json():
    report = report_of(router_of(2, 1), [[0.9, 0.1], [0.2, 0.8]])
    scalars = report.scalars()
    assert scalars['load_0'] == scalars['load_1'] == 0.5
    assert scalars['mi_input'] == pytest.approx(math.log(2))
    assert {type(x) for x in scalars.values()} == {float}
    assert json.loads(json.dumps(report.as_dict()))['load'] == [0.5, 0.5]
    assert 'load 0.50 0.50' in str(report)


def test_shares_of_each_level():
    first, second = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    report = report_of(router_of(3, 1), ([first] * 4, [first, second, second, second]))
    assert report.level_shares == [[1, 0, 0], [0.25, 0.75, 0]]


def test_data_sets():
    """Three images of two data sets on two levels; the level of one image goes elsewhere."""
    router = router_of(2, 1)
    first, second = [0.9, 0.1], [0.1, 0.9]
    levels = [[first, first, second], [first, second, second]]
    routing = router([torch.tensor(level).log()[:, :, None, None] for level in levels])
    utilization, silent = Utilization(2, num_sources=2), Utilization(2, num_sources=2)
    silent.update(routing, router)
    routing.sources = (0, 0, 1)
    utilization.update(routing, router)
    report = utilization.report()
    assert report.source_shares == [[0.75, 0.25], [0, 1]]
    expected = entropy([1 / 2, 1 / 2]) - 2 / 3 * entropy([3 / 4, 1 / 4])
    assert report.mi_source == pytest.approx(expected)
    assert report.scalars()['mi_source'] == report.mi_source
    assert f'on data set {expected:.3f} nats' in str(report)
    assert silent.report().mi_source is None
    assert 'mi_source' not in silent.report().scalars()


def test_level_without_items_has_no_shares():
    """An empty level, or no item at all, gives zeros and not NaN."""
    router = GAPRouter(2, 3, 2, noise=False)
    utilization = Utilization(3)
    utilization.update(router([torch.randn(0, 2, 4, 4)]), router)
    report = utilization.report()
    assert report.num_items == 0
    assert report.load == report.level_shares[0] == [0, 0, 0]
    assert not report.has_collapsed(0.02)


def test_numbers_of_levels_that_vary():
    """As of a layer that is called more often in one pass than in another."""
    first, second = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
    batches = ([first] * 4,), ([first, second, second, second], [second] * 4)
    for order in (batches, batches[::-1]):
        report = report_of(router_of(3, 1), *order)
        assert report.level_shares == [[0.625, 0.375, 0], [0, 1, 0]]
