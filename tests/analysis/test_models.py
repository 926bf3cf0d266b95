"""Models as the analysis builds them."""

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from running import CONFIGS

from mmdet_moe.analysis.models import build_model


def test_preprocessor_outside_the_model():
    """MMPretrain's configs have it at the top level; predictions need it all the same."""
    cfg = Config.fromfile(CONFIGS / 'resnet18_moe_dense_fashion_mnist.py')
    init_default_scope(cfg.default_scope)
    model = build_model(cfg)
    image = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    (normalised,) = model.data_preprocessor({'inputs': image[None]})['inputs']
    torch.testing.assert_close(normalised, torch.full((1, 28, 28), (255 - 72.94) / 90.02))
    assert 'data_preprocessor' not in cfg.model
