"""Where a reverse KL knows log Z_U − log Z_V from: numbers, the growth since the start (where that is U), particles."""

import math

import pytest
import torch

from implicit_diffusion.objectives import Density, ReverseKL
from implicit_diffusion.particles import Particles
from tests.helpers.oracles_gibbs import Location

F64 = torch.float64
X = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
LOGS = 0.3 * torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("known", [False, True], ids=["", "log Z known"])
@pytest.mark.parametrize("is_start", [False, True], ids=["another U", "U is where the loop started"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_ratio(weighted, is_start, known):
    start, other, now = (Location(torch.tensor([t, 0.0], dtype=F64)).requires_grad_(False) for t in (0.0, 0.5, 0.8))
    u = start if is_start else other
    term = ReverseKL(u, log_z=1.2 if known else None)
    term = term.starting_at(Particles(X), start(X))
    logs, growth = (LOGS, torch.tensor(0.4, dtype=F64)) if weighted else (None, None)
    held = Particles(X, logs, torch.tensor(0.9, dtype=F64) if known and weighted else None, growth)
    w, excess = held.weights, now(X) - u(X)
    if known and weighted:
        ratio = 1.2 - 0.9
    elif is_start and weighted:
        ratio = -0.4
    else:
        ratio = math.log(w @ excess.exp())
    assert term.first_variation(held, Density(now(X))).value.item() == pytest.approx(
        ratio - (w @ excess).item(), rel=1e-10
    )
