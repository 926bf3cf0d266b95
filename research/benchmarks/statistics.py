"""The statistics pass of the expert analysis against a plain test of the same images."""

import itertools
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from mmdet_moe.analysis.data import AnalysisData
from mmdet_moe.analysis.statistics.summary import metrics_of, summarise
from mmdet_moe.analysis.study import Study
from mmdet_moe.cli import apply_data_root
from mmdet_moe.datasets import digit_scenes
from research.benchmarks.harness import Alternative, Benchmark
from research.runs import REPOSITORY

TEST, STATISTICS, SUMMARY = 'plain test', 'statistics pass', 'statistics pass and summary'


def run_statistics(bench: Benchmark, num_images: int) -> None:
    """The demo's MoE RetinaNet on digit scenes, loading, prediction and AP included.

    Every image gives 100 detections (no score threshold), more work than a trained model gives.
    """
    cfg = Config.fromfile(REPOSITORY / 'configs' / 'demo' / 'retinanet_moe_soft_digits.py')
    cfg.model.test_cfg.score_thr = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        DefaultScope.overwrite_default_scope('mmdet'),
    ):
        root = Path(folder) / 'data'
        digit_scenes.generate(root, num_train=1, num_val=num_images, size=256, seed=0)
        apply_data_root(cfg, str(root))
        model = MODELS.build(cfg.model).to(bench.device).eval()
        data = AnalysisData(cfg, 'val')
        numbers = itertools.count()

        def study() -> Study:
            return Study(model, data, Path(folder) / str(next(numbers)), {}, score_thr=0.3)

        def test() -> None:
            loader = Runner.build_dataloader({**data.loader_cfg, 'dataset': data.dataset})
            evaluator = Evaluator(cfg.val_evaluator)
            evaluator.dataset_meta = data.dataset.metainfo
            with torch.no_grad():
                for batch in loader:
                    evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
            evaluator.evaluate(num_images)

        def statistics() -> None:
            made = study()
            made.record()
            metrics_of(made)

        def summary() -> None:
            made = study()
            made.record()
            summarise(made, {})

        times = bench.compare(
            f'{num_images} images',
            [Alternative(TEST, test), Alternative(STATISTICS, statistics),
             Alternative(SUMMARY, summary)],
            baseline=TEST,
            watch=[(STATISTICS, TEST), (SUMMARY, TEST)],
        )  # fmt: skip
        bench.target(
            'the statistics pass takes at most 1.15 x a plain test',
            times.ratio(STATISTICS, TEST),
            at_most=1.15,
        )
