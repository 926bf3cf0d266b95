"""Watches how the experts are used, and shouts when they are not."""

import json
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.hooks import RemovableHandle

from mmdet_moe.checks import check_flag, check_integer, check_number
from mmdet_moe.engine.hooks.balancing_loss_hook import BalancingLossHook
from mmdet_moe.engine.hooks.layers import expert_layers_of, sources_of
from mmdet_moe.moe import ExpertLayer, MoELayer, Routing
from mmdet_moe.moe.kmeans_start import ITEMS_PER_EXPERT, KMeansStart
from mmdet_moe.moe.utilization import (
    COLLAPSE_SHARE,
    DEAD_SHARE,
    DISAGREEMENT,
    FEW_EXPERTS,
    Utilization,
    UtilizationReport,
)
from mmdet_moe.registry import HOOKS

#: Written to the work directory after every validation (mode ``val``) or test (``test``).
REPORT_FILE = 'expert_utilization_{mode}.json'

# Key in MMEngine's message hub, whose content is saved in checkpoints.
_PAST = 'moe_utilization'
_MAX_POINTS = 256


@HOOKS.register_module()
class ExpertUtilizationHook(Hook):
    """Logs load, importance, entropy and mutual information of every layer of experts.

    Of images that :class:`~mmdet_moe.datasets.JointDataset` brings from several data sets it also
    says what the choice of the expert has to do with the data set.

    In training every ``interval`` iterations over the iterations since the last report, in
    validation and test over the whole data set; to the log and as scalars
    (``train/moe/<layer>/load_0``, …) to every visualisation backend, in training also the load that
    inference would give and what a constraint masks or adds, by expert, from which
    ``tools/plot_balancing.py`` draws. After a validation or a test
    the report is written to ``expert_utilization_val.json`` or ``expert_utilization_test.json`` in
    the work directory, too. The coefficients of μMoE layers are looked at in validation and test
    alone: in training that would cost more than the layer. Under distributed training everything is
    summed over the ranks. With test-time augmentation only the last variant of each image is
    counted, of sparse layers.

    It warns when MoE layers are trained without any balancing, when experts are dead, when noise or
    masks spread a load in training that inference would not spread, and when the routing has
    collapsed, i.e. when the decision does not depend on the input. The last cannot be seen in the
    load: a router that sends everything half to one expert and half to another looks well balanced
    between the two.

    At every validation, and at the end of a training, a picture of each layer goes to every
    visualisation backend as ``experts_<layer>``: which expert works on which pyramid level, and the
    load and the importance over the training so far. What is needed for it, a few hundred points
    of the past, is also in the checkpoints, so that the picture of a resumed run goes on.

    Args:
        interval: Training iterations between two reports.
        warmup_iters: Training iterations before the first warning; routers start undecided.
        dead_share: An expert is dead when its load is below this fraction of the fair share.
        collapse_share: The routing has collapsed when the mutual information between input and
            expert is below this fraction of log E.
        draw: Whether to draw the pictures.

    Raises:
        ConfigError: For an option of another type, or out of range.
    """

    priority = 'BELOW_NORMAL'

    def __init__(
        self,
        interval: int = 50,
        warmup_iters: int = 200,
        dead_share: float = DEAD_SHARE,
        collapse_share: float = COLLAPSE_SHARE,
        draw: bool = True,
    ) -> None:
        self.interval = check_integer(type(self).__name__, 'interval', interval, 1)
        self.warmup_iters = check_integer(type(self).__name__, 'warmup_iters', warmup_iters, 0)
        shares = {'dead_share': dead_share, 'collapse_share': collapse_share}
        for field, share in shares.items():
            check_number(type(self).__name__, field, share, least=0)
        check_flag(type(self).__name__, 'draw', draw)
        self.dead_share = dead_share
        self.collapse_share = collapse_share
        self.draw = draw
        self._layers: dict[str, MoELayer] = {}
        self._dense: dict[str, ExpertLayer] = {}  # μMoE layers
        self._handles: list[RemovableHandle] = []
        self._windows: dict[str, dict[str, Utilization]] = {}
        self._trains = False
        self._past: dict[str, _Past] = {}
        self._level_shares: dict[str, list[list[float]]] = {}
        self._drawn_at: int | None = None

    def before_run(self, runner: Runner) -> None:
        """Find the layers before anything is loaded or trained."""
        for name, layer in expert_layers_of(runner, self).items():
            (self._layers if isinstance(layer, MoELayer) else self._dense)[name] = layer

    def before_train(self, runner: Runner) -> None:
        """Warn about layers that nothing balances; recall the past of a resumed run."""
        self._trains = True
        self._recall(runner)
        losses = [hook for hook in runner.hooks if isinstance(hook, BalancingLossHook)]
        free = [
            name
            for name, layer in self._layers.items()
            if layer.num_experts > 1
            and layer.router.constraint is None
            and not any(hook.balances(name) for hook in losses)
        ]
        if free:
            runner.logger.warning(
                'NO BALANCING: nothing keeps the experts of %s in use, they will probably collapse '
                'to a few; inherit one of configs/_base_/balancing/*.py, add a BalancingLossHook, '
                'or give the router a constraint.',
                ', '.join(free),
            )

    def _before_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, mode: str = 'train'
    ) -> None:
        """What an iteration does not run, as a mask head without detections, is not counted."""
        for layer in self._layers.values():
            layer.forget()

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None, mode: str = 'train'
    ) -> None:
        """Of every loop: accumulate; in training report at the interval."""
        self._accumulate(runner, mode, data_batch)
        if mode == 'train' and self.every_n_train_iters(runner, self.interval):
            self._report(runner, mode, warn=runner.iter + 1 > self.warmup_iters)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Nothing is saved that a router made NaN of, also if a GPU has not told so yet."""
        for layer in self._layers.values():
            layer.check_finite()

    def after_train(self, runner: Runner) -> None:
        """Warn of routers whose start never came, and draw the whole training."""
        for name, layer in self._layers.items():
            start = getattr(layer.router, 'start', None)
            if isinstance(start, KMeansStart) and not start.done:
                runner.logger.warning(
                    f"NO K-MEANS START in {name}: the training ended before init='kmeans' had the "
                    f'{ITEMS_PER_EXPERT * layer.num_experts} items that it clusters, so the router '
                    "started by chance; train longer or in larger batches, or set init='normal'."
                )
        if self._drawn_at != runner.iter:
            self._draw(runner)

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        """A validation and a test start anew."""
        if mode == 'train':
            return
        self._end()
        window = self._windows[mode] = {}
        for name, layer in self._dense.items():

            def add(routing: Routing, _: list, name: str = name) -> None:
                window.setdefault(name, Utilization(routing.num_experts)).update(routing)

            self._handles.append(layer.observe(add))

    def _after_epoch(self, runner: Runner, mode: str = 'train') -> None:
        """A validation and a test report on the whole data set."""
        if mode == 'train':
            return
        # Outside of a training nothing is warming up.
        warn = mode == 'test' or not self._trains or runner.iter >= self.warmup_iters
        self._report(runner, mode, warn)
        if mode == 'val':
            self._draw(runner)

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _accumulate(self, runner: Runner, mode: str, batch: object) -> None:
        window = self._windows.setdefault(mode, {})
        samples = batch.get('data_samples') if isinstance(batch, dict) else None
        sources = sources_of(samples)
        for name, layer in self._layers.items():
            if name not in window:
                num_sources = _num_sources(runner, mode) if sources else 0
                window[name] = Utilization(layer.num_experts, num_sources)
            if not layer.has_run:
                continue
            if sources:
                layer.routing.sources = sources
            window[name].update(layer.routing, layer.router)

    def _report(self, runner: Runner, mode: str, warn: bool) -> None:
        self._end()
        window = self._windows.pop(mode, {})
        if mode != 'train':  # on all ranks alike, also on one that has run none of them
            empty = Utilization(0)
            window = {name: window.get(name, empty) for name in (*self._layers, *self._dense)}
        found = {name: u.report() for name, u in window.items()}
        if not is_main_process():
            return
        reports = {name: report for name, report in found.items() if report is not None}
        for name in found.keys() - reports.keys():
            runner.logger.info('MoE (%s) %s: was not run', mode, name)
        for name, report in reports.items():
            runner.logger.info('MoE (%s) %s: %s', mode, name, report)
            runner.visualizer.add_scalars(
                {f'{mode}/moe/{name}/{k}': v for k, v in report.scalars().items()},
                step=runner.iter + (mode == 'train'),
            )
            if warn:
                self._warn(runner, name, report)
            self._level_shares[name] = report.level_shares
            if mode == 'train' and name in self._past:
                self._past[name].add(runner.iter + 1, report)
        if mode != 'train':
            self._write(runner, mode, reports)

    def _recall(self, runner: Runner) -> None:
        """Go on with the past that the checkpoint holds; MMEngine restores it when resuming."""
        self._past, self._drawn_at = {}, None
        if not self.draw:
            return
        stored = runner.message_hub.runtime_info.get(_PAST)
        stored = stored if isinstance(stored, dict) else {}
        for name, layer in self._layers.items():
            self._past[name] = _Past(layer.num_experts, runner.iter, stored.get(name))
        # The lists themselves: every checkpoint saves them as they are then.
        content = {name: past.content for name, past in self._past.items()}
        runner.message_hub.update_info(_PAST, content)

    def _draw(self, runner: Runner) -> None:
        if not self.draw or not is_main_process():
            return
        try:
            # Importing Matplotlib takes a second, and not every run draws.
            from mmdet_moe.drawing import draw_utilization

            for name, level_shares in self._level_shares.items():
                past = self._past[name].series() if name in self._past else {}
                picture = draw_utilization(name, level_shares, **past)
                # No slashes: to the local backend the name is that of a file.
                title = f'experts_{name}'.replace('/', '_')
                runner.visualizer.add_image(title, picture, step=runner.iter)
            self._drawn_at = runner.iter
        except Exception as error:
            # Hours of training are worth more than a picture.
            self.draw = False
            runner.logger.warning(
                f'ExpertUtilizationHook draws no more pictures: {type(error).__name__}: {error}'
            )

    def _warn(self, runner: Runner, name: str, report: UtilizationReport) -> None:
        # Formatted here: MMEngine's logger drops a warning whose unformatted text it has seen, so
        # the second layer would be silent.
        if dead := report.dead_experts(self.dead_share):
            named = dead if len(dead) <= FEW_EXPERTS else len(dead)
            advice = (
                'use fewer experts'
                if name in self._dense
                else 'balance more strongly or use fewer experts'
            )
            runner.logger.warning(
                f'DEAD EXPERTS in {name}: {named} of {report.num_experts} get less than '
                f'{100 * self.dead_share:g} % of their fair share of the items; {advice}.'
            )
        if report.disagreement() >= DISAGREEMENT:
            in_training, at_inference = (
                [round(x, 3) for x in load[:FEW_EXPERTS]]
                for load in (report.load, report.inference_load)
            )
            runner.logger.warning(
                f'TRAINING AND INFERENCE DISAGREE in {name}: the load is {in_training} in training '
                f'and would be {at_inference} at inference, without noise and masks; experts learn '
                'from items that they will not get. A router without noise that starts as clusters '
                'gives them their own: _base_/balancing/clustered.py.'
            )
        if report.has_collapsed(self.collapse_share):
            load = [round(x, 3) for x in report.load[:FEW_EXPERTS]]
            runner.logger.warning(
                f'COLLAPSED ROUTING in {name}: the choice of the expert does not depend on the '
                f'input (mutual information {report.mi_input:.4f} nats, load {load}); the layer '
                'works as a dense one.'
            )

    def _write(self, runner: Runner, mode: str, reports: dict[str, UtilizationReport]) -> None:
        content = {
            'mode': mode,
            'iteration': runner.iter,
            'layers': {name: report.as_dict() for name, report in reports.items()},
        }
        path = Path(runner.work_dir) / REPORT_FILE.format(mode=mode)
        path.write_text(json.dumps(content, indent=2) + '\n')


def _num_sources(runner: Runner, mode: str) -> int:
    """How many data sets the images of a loop come from."""
    metainfo = getattr(getattr(runner, f'{mode}_dataloader').dataset, 'metainfo', None) or {}
    return len(metainfo.get('sources', ()))


class _Past:
    """Load and importance over the training, thinned out evenly to at most :data:`_MAX_POINTS`.

    Args:
        num_experts: E.
        step: Training iterations so far.
        content: What an earlier one left in a checkpoint; anything else is ignored.
    """

    def __init__(self, num_experts: int, step: int = 0, content: dict | None = None) -> None:
        empty = {'every': 1, 'seen': 0, 'step': [], 'load': [], 'importance': [], 'latest': None}
        self.content = empty
        if isinstance(content, dict) and content.keys() == empty.keys():
            latest = content['latest']
            # Another number of experts is another layer, and the future is another training.
            if latest is not None and latest[0] <= step and len(latest[1]) == num_experts:
                self.content = content

    def add(self, step: int, report: UtilizationReport) -> None:
        """Add a report after ``step`` iterations."""
        c = self.content
        c['latest'] = [step, report.load, report.importance]
        if c['seen'] % c['every'] == 0:
            for key, value in zip(('step', 'load', 'importance'), c['latest'], strict=True):
                c[key].append(value)
        c['seen'] += 1
        if len(c['step']) >= _MAX_POINTS:
            c['every'] *= 2
            for key in ('step', 'load', 'importance'):
                del c[key][1::2]

    def series(self) -> dict[str, list]:
        """``steps`` (S), ``load`` (S, E) and ``importance`` (S, E); the latest point always."""
        c = self.content
        names = {'steps': 'step', 'load': 'load', 'importance': 'importance'}
        if c['latest'] is None or c['latest'][0] == c['step'][-1]:
            return {name: list(c[key]) for name, key in names.items()}
        return {
            name: [*c[key], value]
            for (name, key), value in zip(names.items(), c['latest'], strict=True)
        }
