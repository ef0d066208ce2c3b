"""Rewards: value, sign, and what is refused before any work."""

import numpy as np
import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.objectives import Reward
from implicit_diffusion.particles import Particles

X = torch.linspace(-1, 1, 12).view(3, 4)


def test_is_minus_the_expected_reward():
    r = Reward(lambda x: x.sum(1))
    weights = torch.tensor([0.2, 0.3, 0.5])
    assert r.value(Particles(X)).item() == pytest.approx(-X.sum(1).mean().item())
    value = r.value(Particles(X, weights.log()))
    assert value.item() == pytest.approx(-(weights * X.sum(1)).sum().item())
    assert r.report(value) == ("reward", -value)


BAD = {
    "one number per sample": lambda x: x.mean(),
    "got float": lambda x: 1.0,
    "dtype": lambda x: x.double().sum(1),
    "not differentiable": lambda x: x.detach().sum(1),
    "does not depend": lambda x: torch.ones(len(x), requires_grad=True) * 2,
    "remove .detach": lambda x: torch.from_numpy(np.asarray(x.detach()).sum(1)),
    "NaN or infinite": lambda x: (x.sum(1) - 1e3).log(),
    "a gradient that": lambda x: (0 * x.sum(1)).sqrt(),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rewards_are_refused(message):
    with pytest.raises(InvalidInputError, match=message):
        Reward(BAD[message]).check(Particles(X))
