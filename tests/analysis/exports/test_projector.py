"""What TensorBoard's projector is given, read back and pooled again by hand."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import MOE_NECK, build_single, make_batch
from torch import nn

from mmdet_moe.analysis.exports import check_projector, projector, write_projector
from mmdet_moe.errors import ConfigError
from mmdet_moe.moe import MoELayer, find_expert_layers
from mmdet_moe.moe.mumoe import CPMuMoE
from mmdet_moe.moe.patches import PatchGrid

pytest.importorskip('tensorboard')


class Data:
    """The tiny batch, image by image."""

    classes = ('a', 'b', 'c')
    chosen = (4, 7, 9)

    def __len__(self):
        return 3

    def batches(self, images, batch_size, num_workers):
        batch = make_batch()
        for first in images:
            yield {key: value[first : first + 1] for key, value in batch.items()}

    def label(self, index):
        return index


def read(folder, layer):
    (place,) = folder.glob(f'*/{layer}')
    with (place / 'metadata.tsv').open() as file:
        told = list(csv.DictReader(file, delimiter='\t'))
    assert (place / 'sprite.png').exists()
    return np.loadtxt(place / 'tensors.tsv', ndmin=2), told


def test_detector(randomise, tmp_path):
    """The head's router sees the mean of each level, the neck's that of each patch of its map."""
    model = randomise(build_single('moe retina', neck=MOE_NECK)).eval()
    layers = find_expert_layers(model)
    study = SimpleNamespace(model=model, layers=layers, data=Data(), is_detector=True)
    write_projector(study, tmp_path)
    vectors, told = read(tmp_path, 'bbox_head.cls_moe')
    expected, experts = [], []
    for index in range(3):
        batch = next(Data().batches([index], 1, 0))
        with torch.no_grad():
            features = model.extract_feat(model.data_preprocessor(batch, False)['inputs'])
            model.bbox_head(features)
        expected += [level.mean((2, 3))[0].numpy() for level in features]
        experts += model.bbox_head.cls_moe.routing.dense_weights().argmax(1).tolist()
    np.testing.assert_allclose(vectors, np.stack(expected), rtol=1e-4, atol=1e-5)
    assert [row['map'] for row in told] == ['0', '1', '2'] * 3
    assert [row['image'] for row in told] == [str(i) for i in (4, 7, 9) for _ in range(3)]
    assert [row['expert'] for row in told] == [f'e{e}' for e in experts]
    assert 'class' not in told[0]
    neck = next(name for name in layers if name.startswith('neck'))
    vectors, told = read(tmp_path, neck)
    assert len(vectors) == len(told) > 9  # several patches of an image


class Model(nn.Module):
    """One layer, for 2 x 2 pixels."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.eval()

    def data_preprocessor(self, batch, training):
        inputs = torch.stack(batch['inputs']).float()
        return {'inputs': inputs, 'data_samples': batch['data_samples']}

    def forward(self, inputs, data_samples, mode):
        return self.layer(inputs[..., :2, :2].mean(1).flatten(1))


@pytest.mark.parametrize('kind', ['sparse', 'factorised'])
def test_classifier(tmp_path, monkeypatch, kind):
    """Vectors of a classifier's head, with the true class; no more points than are wanted."""
    monkeypatch.setattr(projector, 'MAX_POINTS', 2)
    layer = MoELayer(nn.Linear(4, 3), 2, 1, in_channels=4, granularity='token')
    if kind == 'factorised':
        layer = CPMuMoE(4, 3, num_experts=2, rank=2)
    study = SimpleNamespace(
        model=Model(layer), layers={'fc': layer}, data=Data(), is_detector=False
    )
    write_projector(study, tmp_path)
    check_projector(tmp_path)  # the same command once more replaces it
    write_projector(study, tmp_path)
    assert (tmp_path / 'projector_config.pbtxt').read_text().count('embeddings {') == 1
    assert len(list(tmp_path.glob('events*'))) == 1
    vectors, told = read(tmp_path, 'fc')
    images = make_batch()['inputs']
    expected = [images[i].float()[:, :2, :2].mean(0).flatten().numpy() for i in range(3)]
    np.testing.assert_allclose(vectors, np.stack(expected), rtol=1e-4)
    assert [row['class'] for row in told] == ['a', 'b', 'c']


def test_an_interrupted_write_goes_on(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    layer = MoELayer(nn.Linear(4, 3), 2, 1, in_channels=4, granularity='token')
    study = SimpleNamespace(model=Model(layer), layers={'fc': layer}, data=Data(), is_detector=True)
    folder = tmp_path / 'new' / 'points'
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, 'add_embedding', interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_projector(study, folder)
    check_projector(folder)
    write_projector(study, folder)
    assert len(list(folder.glob('events*'))) == 1
    read(folder, 'fc')
    logs = tmp_path / 'logs'  # a training's
    logs.mkdir()
    (logs / 'events.out.tfevents.1').touch()
    with pytest.raises(ConfigError, match='holds something else than points'):
        check_projector(logs)


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_what_would_fail_is_refused_before_the_work(tmp_path, monkeypatch):
    check_projector(tmp_path / 'new')
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='holds something else than points'):
        check_projector(tmp_path)
    monkeypatch.setattr(projector, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='pip install tensorboard'):
        check_projector(tmp_path / 'new')


def test_cells_of_a_padded_picture():
    """A third of the map is padding: its lowest row of cells shows the end of the picture alone."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[20:] = 200
    cells = projector._cells(PatchGrid((6, 6), 3, 1, 0), 9, picture, (60, 60))
    means = np.array([cell.mean() for cell in cells]).reshape(3, 3)
    assert means.tolist() == [[0, 0, 0], [200, 200, 200], [0, 0, 0]]
