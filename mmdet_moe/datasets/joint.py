"""Data sets with classes of their own, as one that remembers where its images come from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.registry import DATASETS as ANY_DATASETS
from mmengine.registry import TRANSFORMS
from torch.utils.data import ConcatDataset

from mmdet_moe.errors import ConfigError
from mmdet_moe.registry import DATASETS

_TRIES = 1000


@DATASETS.register_module()
class JointDataset(ConcatDataset):
    """Data sets one after the other, with the classes of all.

    The classes are joined by name, in the order in which they occur; labels are changed to their
    places in that list (``ConcatDataset`` of the toolboxes leaves them, and so confuses them). The
    number of the image's data set stays with it as ``dataset_source``, in the data infos and in
    ``data_samples.metainfo``. ``metainfo`` holds ``classes``, ``sources`` (the names) and
    ``cumulative_sizes``, by which ``mmdet.MultiDatasetsEvaluator`` evaluates each data set alone.

    Args:
        datasets: Configs of the data sets, of MMDetection or of MMPretrain, without a pipeline.
        pipeline: What is done with the images of all of them.
        names: Of the data sets; their numbers by default.
        test_mode: Passed on to every data set: images without objects stay.

    Raises:
        ConfigError: If there are no data sets, one does not name its classes, or there are more or
            fewer names than data sets, or names that repeat.
    """

    #: That labels are places in :func:`joint_classes`, for the checks of a config.
    joins_classes = True

    def __init__(
        self,
        datasets: Sequence[dict],
        pipeline: Sequence[dict] = (),
        names: Sequence[str] | None = None,
        test_mode: bool = False,
    ) -> None:
        names = list(names or map(str, range(len(datasets))))
        if not datasets or len(set(names)) != len(datasets) or len(names) != len(datasets):
            raise ConfigError(
                f'JointDataset: names={names} must be as many different names as there are '
                f'datasets, {len(datasets)}, and at least one'
            )
        more = {'test_mode': True} if test_mode else {}
        built = [ANY_DATASETS.build({**dataset, **more}) for dataset in datasets]
        classes = [dataset.metainfo.get('classes') for dataset in built]
        if None in classes:
            raise ConfigError(
                f'JointDataset: datasets[{classes.index(None)}] does not name its classes; set its '
                'metainfo=dict(classes=...)'
            )
        super().__init__(built)
        joined = joint_classes(classes)
        self._labels = [np.array([joined.index(name) for name in own]) for own in classes]
        self.metainfo = {
            'classes': joined, 'sources': names, 'cumulative_sizes': self.cumulative_sizes
        }  # fmt: skip
        self.pipeline = Compose([TRANSFORMS.build(step) for step in pipeline])

    def get_dataset_source(self, index: int) -> int:
        """The number of an image's data set."""
        return int(np.searchsorted(self.cumulative_sizes, index, side='right'))

    def full_init(self) -> None:
        """As wrappers of data sets ask for: reads what has been left for later."""
        for dataset in self.datasets:
            dataset.full_init()

    def get_cat_ids(self, index: int) -> list[int]:
        """The classes that an image shows, for ``ClassBalancedDataset``."""
        info = self.get_data_info(index)
        if 'gt_label' in info:
            return np.atleast_1d(info['gt_label']).tolist()
        return [instance['bbox_label'] for instance in info['instances']]

    def get_data_info(self, index: int) -> dict[str, Any]:
        """What the data set knows of an image, labels among those of all."""
        source = self.get_dataset_source(index)
        first = ([0, *self.cumulative_sizes])[source]
        info, labels = self.datasets[source].get_data_info(index - first), self._labels[source]
        for instance in info.get('instances', ()):
            instance['bbox_label'] = int(labels[instance['bbox_label']])
        if 'gt_label' in info:
            info['gt_label'] = np.asarray(labels[info['gt_label']])
        return {**info, 'sample_idx': index, 'dataset_source': source}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {len(self)} images')
        index %= len(self)
        for _ in range(_TRIES):
            info = self.get_data_info(index)
            results = self.pipeline(info)
            if results is not None:
                samples = results.get('data_samples', [])
                # Test-time augmentation makes several.
                for sample in samples if isinstance(samples, list) else [samples]:
                    sample.set_metainfo({'dataset_source': info['dataset_source']})
                return results
            # An augmentation left no object: another image, as in the data sets of MMEngine.
            index = int(torch.randint(len(self), ()))
        raise RuntimeError(f'The pipeline left nothing of {_TRIES} images of JointDataset')


def joint_classes(classes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The names of all, each once, in the order in which they occur."""
    return tuple(dict.fromkeys(name for names in classes for name in names))
