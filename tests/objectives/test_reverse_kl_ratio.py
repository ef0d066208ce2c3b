"""Where a reverse KL takes log Z_U − log Z_V from: known numbers, the growth since U itself, or the particles."""

import math

import pytest
import torch

from implicit_diffusion.objectives import ReverseKL
from implicit_diffusion.particles import Particles
from tests.helpers.oracles_gibbs import Location

F64 = torch.float64
X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
LOGS = 0.3 * torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("known", [False, True], ids=["", "log Z known"])
@pytest.mark.parametrize("begins", [False, True], ids=["another U", "U is where the loop began"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_ratio(weighted, begins, known):
    start, other, now = (Location(torch.tensor([t, 0.0], dtype=F64)).requires_grad_(False) for t in (0.0, 0.5, 0.8))
    u = start if begins else other
    term = ReverseKL(u, log_z=1.2 if known else None)
    term.check_stationary(Particles(X), start(X))
    logs, growth = (LOGS, torch.tensor(0.4, dtype=F64)) if weighted else (None, None)
    held = Particles(X, logs, torch.tensor(0.9, dtype=F64) if known and weighted else None, growth)
    w, excess = held.weights, now(X) - u(X)
    if known and weighted:
        ratio = 1.2 - 0.9
    elif begins and weighted:
        ratio = -0.4
    else:
        ratio = math.log(w @ excess.exp())
    assert term.charges(held, now(X), None).value.item() == pytest.approx(ratio - (w @ excess).item(), rel=1e-10)
