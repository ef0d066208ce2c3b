"""Frozen copies do not move, and eval mode is given back part by part."""

import inspect

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.frozen import eval_mode, frozen_copy


def test_frozen_copy_stays_while_the_original_trains():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    frozen = frozen_copy(module)
    x = torch.randn(4, 3)
    before = frozen(x)
    with torch.no_grad():
        module[0].weight.add_(1)
    assert torch.equal(frozen(x), before)
    assert not frozen.training
    assert module.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in module.parameters())


def test_functions_cannot_be_frozen():
    with pytest.raises(InvalidInputError, match=r"must be a torch\.nn\.Module, got function"):
        inspect.unwrap(frozen_copy)(lambda x, t: x)  # beneath the run-time type checks of the tests


def test_eval_mode_restores_each_part_even_after_an_error():
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout()))
    module[1].eval()
    modes = [part.training for part in module.modules()]
    with pytest.raises(RuntimeError, match="inside"), eval_mode(module, torch.relu, None):
        assert not any(part.training for part in module.modules())
        raise RuntimeError("inside")
    assert [part.training for part in module.modules()] == modes
