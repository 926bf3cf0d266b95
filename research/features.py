"""What a config's frozen backbone makes of its images: computed once, kept on the disk."""

import copy
import json
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope
from torch import Tensor

from mmdet_moe.analysis.files import write_file
from mmdet_moe.analysis.models import build_model
from mmdet_moe.compat.malloc import keep_large_blocks
from mmdet_moe.datasets.download import md5_of
from mmdet_moe.engine.preflight import check_config
from mmdet_moe.errors import ConfigError
from mmdet_moe.progress import progress_bar
from research.runs import quiet

#: Images in one file, and in one batch, which stays in a core's cache.
CHUNK, BATCH = 1000, 25
SPLITS = ('train', 'test')
#: Changes an image, (H, W, 3) uint8 as the data set holds it, into another one of that size.
Change = Callable[[np.ndarray], np.ndarray]


class FeatureCache:
    """Features of the images of a classification config, in files of :data:`CHUNK` images.

    Args:
        cfg: Config of an ``ImageClassifier``, whose neck pools (without one the features are maps);
            the images of both splits go through the pipeline of its test data, so without
            augmentation.
        folder: For the files; what is there already is not computed again.

    Raises:
        ConfigError: For a folder with features of other images or of another backbone.
    """

    def __init__(self, cfg: Config, folder: Path) -> None:
        self.cfg, self.folder = cfg, folder
        self._model: torch.nn.Module | None = None
        self._check_same_settings()

    def _check_same_settings(self) -> None:
        wanted = {
            'backbone': self.cfg.model.backbone.to_dict(),
            'neck': dict(self.cfg.model.neck or {}),
            'pipeline': [dict(step) for step in self.cfg.test_dataloader.dataset.pipeline],
            'preprocessor': self.cfg.data_preprocessor.to_dict(),
        }
        text = json.dumps(_without_places(wanted), indent=2, sort_keys=True)
        note = self.folder / 'settings.json'
        if note.exists() and note.read_text() != text:
            raise ConfigError(
                f'{self.folder} holds features of other settings; move it away, or choose another '
                '--work-dir'
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(note, text.encode())

    def load(
        self,
        split: str,
        name: str | None = None,
        indices: Sequence[int] | None = None,
        change: Change | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of a split, computed where they are missing.

        Args:
            split: 'train' or 'test'.
            name: Of the folder of the files; the split's by default.
            indices: Of the images; all by default.
            change: Applied to every image first. The name stands for it, as for the indices.

        Returns:
            (N, F) or (N, F, H, W) float32, and (N,) int64.
        """
        dataset = self._dataset(split)
        indices = range(len(dataset)) if indices is None else indices
        folder = self.folder / (name or split)
        folder.mkdir(parents=True, exist_ok=True)
        chunks, labels = [], _labels(dataset, indices)
        starts = range(0, len(indices), CHUNK)
        for start in progress_bar(starts, desc=f'features {folder.name}', unit='chunk'):
            path = folder / f'{start:06d}.npy'
            if not path.exists():
                content = BytesIO()
                np.save(content, self._compute(dataset, indices[start : start + CHUNK], change))
                write_file(path, content.getvalue())
            chunks.append(np.load(path))
        features = torch.from_numpy(np.concatenate(chunks))
        if len(features) != len(labels):
            raise ConfigError(f'{folder} holds features of other images: delete it')
        return features, torch.tensor(labels)

    def labels(self, split: str) -> Tensor:
        """(N,) int64 of all images of a split."""
        dataset = self._dataset(split)
        return torch.tensor(_labels(dataset, range(len(dataset))))

    def _dataset(self, split: str) -> BaseDataset:
        init_default_scope(self.cfg.default_scope)
        config = {**self.cfg.test_dataloader.dataset, 'split': split, 'test_mode': split == 'test'}
        return DATASETS.build(config)

    @torch.inference_mode()
    def _compute(
        self, dataset: BaseDataset, indices: Sequence[int], change: Change | None
    ) -> np.ndarray:
        model = self._model or self._build()
        parts = []
        for start in range(0, len(indices), BATCH):
            samples = []
            for index in indices[start : start + BATCH]:
                info = dataset.get_data_info(index)
                if change is not None:
                    info['img'] = change(info['img'])
                samples.append(dataset.pipeline(info))
            batch = {key: [sample[key] for sample in samples] for key in samples[0]}
            images = model.data_preprocessor(batch)['inputs']
            images = images.contiguous(memory_format=torch.channels_last)
            parts.append(model.extract_feat(images)[-1].float().numpy())
        return np.concatenate(parts)

    def _build(self) -> torch.nn.Module:
        keep_large_blocks()
        check_config(self.cfg)
        with quiet():  # where each weight comes from
            model = build_model(copy.deepcopy(self.cfg))  # building writes defaults into it
            model.init_weights()
        self._model = model.eval().to(memory_format=torch.channels_last)
        return self._model


def _labels(dataset: BaseDataset, indices: Sequence[int]) -> list[int]:
    # Some data sets have arrays of no dimension.
    return [int(dataset.get_data_info(i)['gt_label']) for i in indices]


def _without_places(value: Any) -> Any:
    """A config with the content of its files in place of their paths."""
    if isinstance(value, dict):
        return {key: _without_places(of_key) for key, of_key in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and Path(value).is_file():
        return md5_of(value, progress=False)
    return value
