"""The headline numbers of an energy-based model from their definitions, and annealings that share no noise."""

import math

import pytest
import torch

from implicit_diffusion.commands.ebm import judging
from implicit_diffusion.commands.ebm.arms import Settings, make_loop, to_model
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.ebm.training import Trained
from implicit_diffusion.models.energy_model import Architecture, Moves
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs.fit import Fit

LOG_Z, ERROR = 1.9, 0.02


def trained():
    x = 2 * Noise(0).normal((120, 2)) + torch.tensor([3.0, -1.0])
    data = Data(x[:80], x[80:], x[:80].mean(0), x[:80].std(0))
    settings = Settings(Architecture("mlp", (2,), 8), Moves("hmc", 0.06, 2), "weighted", 16, 1, 0.05, 4)
    loop = make_loop(settings, data)
    return Trained(settings, Fit(loop, loop.step()), loop, to_model(settings, loop, data), []), data


@pytest.fixture
def asked(monkeypatch):
    """What annealings were asked for, in place of annealings."""
    seen = []

    def log_z(model, noise, steps, *description):
        seen.append((noise, steps))
        return LOG_Z - 0.1 * (len(seen) - 1), ERROR

    monkeypatch.setattr(judging, "log_z_by_annealing", log_z)
    return seen


def test_the_two_annealings_are_independent_and_one_half_as_long(asked):
    summary = judging.judge(*trained(), 50)
    (whole, steps), (half, fewer) = asked
    assert (steps, fewer) == (50, 25) and whole != half and whole.prefix != half.prefix
    assert whole.seed == half.seed == 4
    assert (summary.log_z_estimate, summary.log_z_half) == pytest.approx((LOG_Z, LOG_Z - 0.1))


def test_held_out_likelihood_and_mmd_by_hand(asked):
    """nll = E V((x − shift)/scale) + log Z + Σ log scale over the data that were held out, in the data's units."""
    made, data = trained()
    summary = judging.judge(made, data, 50)
    z = (data.held_out - data.shift) / data.scale
    with torch.no_grad():
        nll = made.model.potential(z).double() + LOG_Z + data.scale.double().log().sum()
    assert summary.nll_held_out == pytest.approx(nll.mean().item(), rel=1e-6)
    assert summary.log_z_particles == pytest.approx(made.loop.particles.log_z.item())
    assert summary.ess == pytest.approx(made.loop.particles.ess.item())
    p, median = made.model.particles, torch.pdist(z).median().item()

    def mean(x, y, same):
        k = (-torch.cdist(x, y).square() / (2 * median**2)).exp().double()
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1)) if same else k.mean()

    expected = mean(p, p, True) - 2 * mean(p, z, False) + mean(z, z, True)
    assert summary.mmd2 == pytest.approx(expected.item(), abs=1e-5)
    assert math.isfinite(summary.nll_held_out_se)
