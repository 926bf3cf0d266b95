"""Models with experts and random weights."""

import copy

import pytest
from mmcv.cnn import Scale
from models import MODELS
from torch import nn


@pytest.fixture
def make(randomise):
    """A model with random weights everywhere; its scores are neither all 0 nor all 1."""

    def build(name, **test_cfg):
        model = MODELS[name]()
        randomise(model)
        if hasattr(model, 'bbox_head'):
            model.bbox_head.test_cfg.update(copy.deepcopy(test_cfg))
            for layer in model.bbox_head.modules():
                # Boxes that differ, but not by factors.
                if isinstance(layer, nn.Conv2d) and layer.out_channels % 4 == 0:
                    layer.weight.data *= 0.3
                if isinstance(layer, Scale):
                    layer.scale.data.abs_()  # distances are positive
        return model.eval()

    return build
