"""MMDetection's SSDHead lacks what heads ask for before they predict; the zoo has it predict."""

from types import SimpleNamespace

import pytest
from torch import nn

from mmdet_moe import compat


@pytest.mark.parametrize('has_one', [True, False])
def test_a_loss_of_ones_own_is_kept(has_one):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            if has_one:
                self.loss_cls = nn.Identity()

    class Heir(Head):
        def __init__(self):
            super().__init__()
            self.loss_cls = nn.Identity()

    compat._add_loss(SimpleNamespace(SSDHead=Head))
    assert isinstance(Heir().loss_cls, nn.Identity)
    assert (Head().loss_cls is None) is not has_one
