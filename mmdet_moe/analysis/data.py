"""A data set as the analysis sees it: objects, images and names, in any of the toolboxes."""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import ClassBalancedDataset, RepeatDataset
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from mmdet_moe.analysis.superclasses import superclasses
from mmdet_moe.cli import image_sets
from mmdet_moe.engine.image_errors import ImageReader, wrap_readers
from mmdet_moe.errors import ConfigError

SPLITS = ('val', 'test', 'train')
_READER = ImageReader(LoadImageFromFile())


@dataclass(frozen=True)
class Objects:
    """The ground truth of one image, n objects."""

    boxes: np.ndarray  #: float32 (n, 4), xyxy in px of the original image
    labels: np.ndarray  #: int64 (n,)
    areas: np.ndarray  #: float32 (n,) in px², what COCO's evaluation calls small or large by
    crowd: np.ndarray  #: bool (n,), regions that count neither as found nor as missed


class AnalysisData:
    """One split of a config's data, seen through the pipeline of its tests.

    Args:
        cfg: The config, in its default scope.
        split: ``'val'``, ``'test'`` or ``'train'``. The training images go through the pipeline of
            the tests, without augmentation, and none is filtered out.
        max_images: Use so many of them, see :func:`drawn`. Images are counted among those.

    Attributes:
        chosen: The place of each in the whole data set, ascending.

    Raises:
        ConfigError: If the config does not describe that split, it repeats images, or it has none,
            as generated patches have none.
    """

    def __init__(self, cfg: Config, split: str, max_images: int | None = None) -> None:
        self.loader_cfg = loader_of(cfg, split)
        self.dataset = DATASETS.build(self.loader_cfg.dataset)
        if not hasattr(self.dataset, 'get_data_info'):
            raise ConfigError(
                f'{split}_dataloader.dataset: {type(self.dataset).__name__} has no images for an '
                'analysis to show; use a data set of images'
            )
        for part in _parts(self.dataset):
            if isinstance(part, RepeatDataset | ClassBalancedDataset):
                raise ConfigError(
                    f'{split}_dataloader.dataset: {type(part).__name__} repeats images, and each '
                    'copy would count as an image of its own; give the data set inside of it'
                )
        if hasattr(self.dataset, 'full_init'):
            self.dataset.full_init()
        wrap_readers(self.dataset, set())
        total = len(self.dataset)
        self.chosen = drawn(total, total if max_images is None else max_images)
        if not self.chosen:
            raise ConfigError(
                f'{split}_dataloader.dataset has no images, so there is nothing to analyse; check '
                'its ann_file and data_prefix, or choose another split with --split'
            )

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def is_whole(self) -> bool:
        """Whether these are all images of the data set."""
        return len(self.chosen) == len(self.dataset)

    @property
    def classes(self) -> list[str]:
        """Their names, all different (ImageNet has one twice); numbers where there are none."""
        classes = self.dataset.metainfo.get('classes')
        if classes is None:
            whole = range(len(self.dataset))
            labels = [self.dataset.get_data_info(i).get('gt_label', 0) for i in whole]
            return [str(i) for i in range(int(max(labels)) + 1)]
        return _distinct(list(classes))

    @property
    def clusters(self) -> list[str] | None:
        """Names of the hidden clusters that the images come from; None where there are none."""
        clusters = self.dataset.metainfo.get('clusters')
        return None if clusters is None else _distinct(list(clusters))

    @cached_property
    def sources(self) -> tuple[list[str], np.ndarray] | None:
        """Names of the data sets that are joined in this one, and int64 (len,), each image's."""
        ends = getattr(self.dataset, 'cumulative_sizes', None)
        if ends is None:
            return None
        names = self.dataset.metainfo.get('sources') or map(str, range(len(ends)))
        return list(names), np.searchsorted(ends, self.chosen, side='right')

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Indices, int64, of the images of each group, by its name: of equal ``group`` in the data
        infos, and of the same one of the joined data sets. Empty where there are neither.
        """
        of_image = [self.info(i).get('group') for i in range(len(self))]
        groups = {
            str(group): np.flatnonzero([other == group for other in of_image])
            for group in dict.fromkeys(of_image)
            if group is not None
        }
        names, sources = self.sources or ((), np.empty(0))
        return groups | {name: np.flatnonzero(sources == i) for i, name in enumerate(names)}

    @cached_property
    def superclasses(self) -> dict[str, list[int]] | None:
        """Groups of classes, see :func:`~mmdet_moe.analysis.superclasses.superclasses`."""
        return superclasses(self.classes, self._coco_file)

    @property
    def _coco_file(self) -> str | None:
        return _coco_file(self.dataset)

    def batches(self, images: Iterable[int] | None = None, **options: Any) -> Iterator[dict]:
        """The batches of these images, in this order.

        Args:
            images: Default: all, in their order.
            options: Of the data loader, in place of the config's.
        """
        order = self.chosen if images is None else [self.chosen[image] for image in images]
        config = {**self.loader_cfg, 'dataset': self.dataset, 'sampler': order, **options}
        if options:
            config['persistent_workers'] = False
        if not config.get('num_workers'):
            config.pop('prefetch_factor', None)  # which PyTorch refuses without workers
        return iter(Runner.build_dataloader(config))

    def info(self, index: int) -> dict[str, Any]:
        """What the data set knows of an image without loading it."""
        return self.dataset.get_data_info(self.chosen[index])

    def path(self, index: int) -> str | None:
        """The image's file, or address; None where all images are one array."""
        return self.info(index).get('img_path')

    def image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3), RGB, as stored.

        Raises:
            ConfigError: The file cannot be read.
        """
        info = self.info(index)
        if 'img' in info:  # data sets that are one array
            image = np.asarray(info['img'])
            if image.ndim == 2:
                image = image[..., None]
            return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
        image = _READER({'img_path': info['img_path']})['img']
        return np.ascontiguousarray(image[..., ::-1])

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width in px."""
        info = self.info(index)
        if 'height' in info and 'width' in info:
            return int(info['height']), int(info['width'])
        height, width = self.image(index).shape[:2]
        return height, width

    def label(self, index: int) -> int:
        """The class of a classifier's image."""
        return int(np.asarray(self.info(index)['gt_label']).item())

    def cluster(self, index: int) -> int:
        """The hidden cluster of a classifier's image, where there are any."""
        return int(self.info(index)['cluster'])

    def digest(self) -> str:
        """Another one if an image of the whole data set is another file, or something else is known
        of it.
        """
        self._annotations  # noqa: B018 - read once for both
        whole, seen = copy.copy(self), hashlib.sha256()
        whole.chosen = range(len(self.dataset))
        for index in whole.chosen:
            info = whole.info(index)
            seen.update(json.dumps([whole.path(index), str(info.get('gt_label'))]).encode())
            if 'instances' in info:
                objects = whole.objects(index)
                for part in (objects.boxes, objects.labels, objects.areas, objects.crowd):
                    seen.update(part.tobytes())
        return seen.hexdigest()[:16]

    @cached_property
    def _annotations(self) -> dict[int, dict[int, list[dict]]]:
        """By the :func:`id` of each data set of COCO's, its own annotations by image id: unlike
        MMDetection's data infos, with their areas.
        """
        return {
            id(part): part.COCOAPI(file).imgToAnns
            for part in _parts(self.dataset)
            if (file := _coco_file(part)) is not None
        }

    def objects(self, index: int) -> Objects:
        """The ground truth of an image, crowds included."""
        info, (part, to_label) = self.info(index), _part_of(self.dataset, self.chosen[index])
        if (annotations := self._annotations.get(id(part))) is not None:
            found = [  # those marked to be ignored, too, as COCO's evaluation does
                (a['bbox'], to_label[a['category_id']], a['area'], a.get('iscrowd', 0))
                for a in annotations.get(info['img_id'], [])
                if a['category_id'] in to_label
            ]
            boxes = np.array([f[0] for f in found], np.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
        else:
            instances = info.get('instances', [])
            boxes = np.array([i['bbox'] for i in instances], np.float32).reshape(-1, 4)
            sides = boxes[:, 2:] - boxes[:, :2]
            found = [
                (None, i['bbox_label'], area, i.get('ignore_flag', 0))
                for i, area in zip(instances, sides.prod(1), strict=True)
            ]
        return Objects(
            boxes,
            np.array([f[1] for f in found], np.int64),
            np.array([f[2] for f in found], np.float32),
            np.array([f[3] for f in found], bool),
        )


def drawn(images: int, wanted: int) -> list[int]:
    """Which of the images are taken: at random, always the same, in their order.

    The first ones could be of the first classes alone, and in even steps they could fall in with
    classes that take turns.
    """
    return sorted(np.random.default_rng(0).permutation(images)[:wanted].tolist())


def hashed(x: np.ndarray) -> np.ndarray:
    """uint32 to uint32, each bit of which hangs on each bit of the other."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def _coco_file(dataset: Any) -> str | None:
    is_coco = hasattr(dataset, 'COCOAPI') and hasattr(dataset, 'cat_ids')
    return dataset.ann_file if is_coco else None


def _parts(dataset: Any) -> Iterator[Any]:
    """A data set; of joined ones, at any depth, each."""
    if hasattr(dataset, 'cumulative_sizes'):
        for part in dataset.datasets:
            yield from _parts(part)
    else:
        yield dataset


def _part_of(dataset: Any, index: int) -> tuple[Any, dict[int, int]]:
    """Of :func:`_parts`, the one that an image comes from, and its labels by COCO's category."""
    joined = None  # by name, by the first that does so
    while (ends := getattr(dataset, 'cumulative_sizes', None)) is not None:
        if joined is None and getattr(dataset, 'joins_classes', False):
            joined = dataset.metainfo['classes']
        number = int(np.searchsorted(ends, index, side='right'))
        index -= ends[number - 1] if number else 0
        dataset = dataset.datasets[number]
    labels = getattr(dataset, 'cat2label', {})
    if joined is not None:
        names = dataset.metainfo['classes']
        labels = {category: joined.index(names[label]) for category, label in labels.items()}
    return dataset, labels


def loader_of(cfg: Config, split: str) -> ConfigDict:
    """The config of the data loader of a split: in order, every image once, as in tests.

    Raises:
        ConfigError: If the config has none.
    """
    field = f'{split}_dataloader'
    if cfg.get(field) is None:
        given = [s for s in SPLITS if cfg.get(f'{s}_dataloader') is not None]
        raise ConfigError(
            f'--split {split}: the config has no {field}; it has '
            f'{" and ".join(given) or "no data loader at all"}'
        )
    loader = ConfigDict({**cfg[field]})
    if split == 'train':
        tested = cfg.get('test_dataloader') or cfg.get('val_dataloader')
        if tested is None or 'pipeline' not in next(image_sets(tested.dataset)):
            raise ConfigError(
                '--split train: the config has no test_dataloader, whose pipeline the training '
                'images would go through'
            )
        loader.dataset = _as_tested(loader.dataset, tested.dataset)
        if cfg.get('default_scope', 'mmdet') == 'mmdet':
            for dataset in image_sets(loader.dataset):
                dataset.test_mode = True  # keeps the images without objects
        for key in ('num_workers', 'persistent_workers', 'collate_fn', 'pin_memory'):
            if key in tested:
                loader[key] = tested[key]
    loader.drop_last = False
    loader.pop('batch_sampler', None)
    loader.sampler = dict(type='DefaultSampler', shuffle=False)
    return loader


def _as_tested(dataset: ConfigDict, tested: ConfigDict) -> ConfigDict:
    """A training set with the pipelines of the tests, and with those wrappers alone that the tests
    have, too: what defines the samples stays, RepeatDataset and the like go.
    """
    if 'datasets' in tested and 'pipeline' not in tested:
        return _as_tested(dataset, tested.datasets[0])
    if 'dataset' not in tested:
        while 'dataset' in dataset:
            dataset = dataset.dataset
        if 'datasets' in dataset and 'pipeline' not in dataset:
            parts = [_as_tested(part, tested) for part in dataset.datasets]
            return ConfigDict({**dataset, 'datasets': parts})
    else:
        while dataset.type != tested.type and 'dataset' in dataset:
            dataset = dataset.dataset
        if dataset.type == tested.type:
            dataset = ConfigDict({**dataset})
            dataset.dataset = _as_tested(dataset.dataset, tested.dataset)
    if 'pipeline' in tested:
        dataset.pipeline = tested.pipeline
    return dataset


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) == len(names):
        return names
    return [f'{i} {name}' for i, name in enumerate(names)]
