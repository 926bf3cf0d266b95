"""How well the experts divide the clusters of a data set among them."""

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric

from mmdet_moe.errors import ConfigError
from mmdet_moe.moe.metrics import conditional_entropy
from mmdet_moe.registry import METRICS


@METRICS.register_module()
class DispatchEntropy(BaseMetric):
    """Entropy of the clusters inside an expert, averaged over the experts by load, in nats.

    ``H(cluster | expert)`` (arXiv 2208.02813): 0 when every expert works on one cluster alone, the
    entropy of the clusters themselves, log K at most, when the choice says nothing on them. Of
    several chosen experts each counts.

    Args:
        label: Field of the data samples that tells the cluster, a scalar; ``'gt_label'`` asks how
            the experts divide the classes.
        collect_device: As of MMEngine's ``BaseMetric``.
        prefix: As of MMEngine's ``BaseMetric``.

    Raises:
        ConfigError: If the data samples do not tell the cluster, or a negative one, or
            ``expert_ids``.
    """

    default_prefix = 'moe'

    def __init__(
        self, label: str = 'cluster', collect_device: str = 'cpu', prefix: str | None = None
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.label = label

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Remember the cluster and the experts of every sample."""
        for sample in data_samples:
            for field in (self.label, 'expert_ids'):
                if field not in sample:
                    raise ConfigError(
                        f'DispatchEntropy needs data samples with `{field}`, as those of '
                        'mmdet_moe.ClassifierMixture; remove it from the evaluators'
                    )
            cluster = int(sample[self.label])
            # It is counted by its number, from the end of the table if that is negative.
            if cluster < 0:
                raise ConfigError(
                    f'DispatchEntropy: `{self.label}` is {cluster}, which is no number of a '
                    'cluster; number them from 0'
                )
            self.results.append((cluster, sample['expert_ids'].tolist()))

    def compute_metrics(self, results: list[tuple[int, list[int]]]) -> dict[str, float]:
        """``dispatch_entropy`` over all samples."""
        pairs = torch.tensor([(cluster, e) for cluster, experts in results for e in experts])
        counts = torch.zeros(tuple(pairs.max(0).values + 1), dtype=torch.float64)
        counts.index_put_(tuple(pairs.T), counts.new_ones(()), accumulate=True)
        return {'dispatch_entropy': float(conditional_entropy(counts))}
