"""What a recipe freezes (`rates: {start: 0}`) stays as it was, its norms' statistics too."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

import torch

from models.classifier.train import freeze
from models.nets.cellnet import CellNet

pytestmark = pytest.mark.train


def test_a_frozen_stem_keeps_its_weights_and_its_statistics_while_the_rest_learns() -> None:
    net = CellNet("shufflenetv2-x0.5", 3, [2])
    net.train()
    freeze(net, ["backbone.stem"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net(torch.rand(4, 3, 64, 64)).classes.square().sum().backward()
    optimiser.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("backbone.stem") for name in before)
    assert not any(name.startswith("backbone.stem") for name in moved)
    assert "classes.weight" in moved
    assert any(name.endswith("running_mean") for name in moved)
