"""Models with experts and random weights."""

import copy

import pytest
from mmcv.cnn import Scale
from torch import nn
from traced_models import MODELS


@pytest.fixture
def filled(randomise):
    """Random weights everywhere, with which boxes and scores differ, but not by factors."""

    def fill(model):
        randomise(model)
        for layer in model.bbox_head.modules() if hasattr(model, 'bbox_head') else ():
            if isinstance(layer, nn.Conv2d) and layer.out_channels % 4 == 0:
                layer.weight.data *= 0.3
            if isinstance(layer, Scale):
                layer.scale.data.abs_()  # distances are positive
        return model.eval()

    return fill


@pytest.fixture
def make(filled):
    """The model of a name, see :data:`traced_models.MODELS`, with other options of the test."""

    def build(name, **test_cfg):
        model = filled(MODELS[name]())
        if hasattr(model, 'bbox_head'):
            model.bbox_head.test_cfg.update(copy.deepcopy(test_cfg))
        return model

    return build
