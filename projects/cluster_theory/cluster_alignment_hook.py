"""Records what the filters and the router of a mixture turn to while it is trained."""

import io
import math
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmdet_moe.analysis.files import write_file
from mmdet_moe.checks import check_integer
from mmdet_moe.engine.hooks.layers import moe_layers_of
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer
from mmdet_moe.moe.distributed import global_sum_
from mmdet_moe.moe.metrics import conditional_entropy
from mmdet_moe.registry import HOOKS
from projects.cluster_theory.filter_experts import FilterExperts

#: Written to the work directory.
RECORD_FILE = 'alignment.npz'


@HOOKS.register_module()
class ClusterAlignmentHook(Hook):
    """Writes inner products with the features and centres of the clusters to ``alignment.npz``.

    For training data with ``features`` v and ``centres`` c, each (K, d), and ``cluster`` in its
    batches (:class:`ClusterPatches`), and a model with :class:`FilterExperts`. The file holds, for
    S steps (0 is the model before the training), E experts and K clusters: ``steps`` (S,), ``loss``
    (S,), ``dispatch_entropy`` (S,) of the training batch in nats, ``load`` (S, E) as shares of the
    batch, ``expert_features`` and ``expert_centres`` (S, E, K), the largest ``|⟨w, v_k⟩|`` of an
    expert's filters, and ``router_features`` and ``router_centres`` (S, E, K), ``⟨θ_e, v_k⟩`` with
    its sign. Where the training has not begun the loss, the entropy and the load are NaN. A resumed
    run goes on with the record in its work directory; without one its first row is the step that it
    resumes from, with these three NaN, too. Under distributed training they are those of the
    batches of all ranks, the loss as the mean over the ranks.

    Args:
        interval: Training iterations between two steps, at least 1.

    Raises:
        ConfigError: For another interval, and if the data or the model is of another kind, or they
            do not fit each other.
    """

    # After what may make this iteration the last one.
    priority = 'BELOW_NORMAL'

    def __init__(self, interval: int = 10) -> None:
        check_integer(type(self).__name__, 'interval', interval, least=1)
        self.interval = interval
        self._rows: list[dict[str, np.ndarray]] = []

    def before_train(self, runner: Runner) -> None:
        """Find the directions and the layer; start, or go on with, the record."""
        data = runner.train_dataloader.dataset
        if not (hasattr(data, 'features') and hasattr(data, 'centres')):
            raise ConfigError(
                f'ClusterAlignmentHook needs data with features and centres, which '
                f'{type(data).__name__} has not; use mmdet_moe.ClusterPatches or remove the hook'
            )
        layers = [
            layer
            for layer in moe_layers_of(runner, self).values()
            if isinstance(layer.experts, FilterExperts)
        ]
        if len(layers) != 1:
            raise ConfigError(
                f'ClusterAlignmentHook needs one MoE layer of FilterExperts, the model has '
                f'{len(layers)}; use mmdet_moe.PatchMixture or remove the hook'
            )
        self._layer: MoELayer = layers[0]
        patch_dim, in_channels = data.features.shape[1], self._layer.experts.weight.shape[2]
        if patch_dim != in_channels:
            raise ConfigError(
                f'ClusterAlignmentHook: the data has patch_dim={patch_dim}, the model '
                f'in_channels={in_channels}; give train_dataloader.dataset.patch_dim and '
                'model.in_channels the same value'
            )
        self._directions = {'features': data.features, 'centres': data.centres}
        self._path = Path(runner.work_dir) / RECORD_FILE
        self._rows = self._past(runner.iter) if runner.iter else []
        if not self._rows:
            self._record(runner.iter, math.nan, None)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Record at the interval, and the last iteration."""
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            loss: Tensor = outputs['loss'].detach().clone()
            all_reduce(loss, 'mean')
            self._record(runner.iter + 1, loss.item(), data_batch['cluster'])

    def _past(self, step: int) -> list[dict[str, np.ndarray]]:
        """The rows of an earlier part of this training, up to a step."""
        if not self._path.exists():
            return []
        with np.load(self._path) as record:
            columns = dict(record)
        kept = [i for i, found in enumerate(columns['steps']) if found <= step]
        return [{key: column[i] for key, column in columns.items()} for i in kept]

    @torch.no_grad()
    def _record(self, step: int, loss: float, clusters: Tensor | None) -> None:
        experts = self._layer.num_experts
        entropy, load = math.nan, np.full(experts, math.nan)
        if clusters is not None:
            counts = self._dispatch(clusters)
            entropy = float(conditional_entropy(counts))
            load = (counts.sum(0) / counts.sum()).cpu().numpy()
        row = {'steps': step, 'loss': loss, 'dispatch_entropy': entropy, 'load': load}
        filters, router = self._layer.experts.weight, self._layer.router.fc.weight
        for name, directions in self._directions.items():
            vectors = directions.to(filters)
            row[f'expert_{name}'] = (filters @ vectors.T).abs().amax(1).cpu().numpy()
            row[f'router_{name}'] = (router @ vectors.T).cpu().numpy()
        self._rows.append(row)
        if is_main_process():
            buffer = io.BytesIO()
            np.savez(buffer, **{key: np.stack([row[key] for row in self._rows]) for key in row})
            write_file(self._path, buffer.getvalue())

    def _dispatch(self, clusters: Tensor) -> Tensor:
        """(K, E): how many samples of each cluster each expert got in the latest batch."""
        ids = self._layer.routing.expert_ids
        counts = torch.zeros(
            len(self._directions['centres']), self._layer.num_experts, device=ids.device
        )
        rows = clusters.to(ids.device)[:, None].expand_as(ids)
        counts.index_put_((rows, ids), counts.new_ones(()), accumulate=True)
        global_sum_([counts])
        return counts
