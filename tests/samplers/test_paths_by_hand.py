"""Plain sampling and replicas step by step: step sizes in their order, momenta kept, potentials at their times."""

import math

import pytest
import torch

from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.samplers import MALA, ULA, Underdamped, power_law
from implicit_diffusion.samplers.replicas import Replicas, annealed
from implicit_diffusion.samplers.simulation import simulate
from tests.helpers.oracles_gibbs import Harmonic, Location

F64 = torch.float64
X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=F64)


def recorded(kernel):
    """The kernel, and a list of (x, momentum, ξ, h) of every step that it makes."""
    seen, move = [], kernel.move

    def watching(step):
        seen.append((step.x.clone(), step.momentum, step.draws[0].clone(), step.h.item()))
        return move(step)

    kernel.move = watching
    return kernel, seen


def test_simulating_overdamped():
    kernel, seen = recorded(ULA(power_law(0.3, 0.5)))
    x = X
    for k, (state, _) in enumerate(simulate(kernel, Harmonic(), X, Noise(0), 5)):
        h = 0.3 * (k + 1) ** -0.5
        x = x - h * x + math.sqrt(2 * h) * seen[k][2]
        assert seen[k][3] == pytest.approx(h, rel=1e-12)
        torch.testing.assert_close(state.x, x, rtol=1e-12, atol=1e-13)
    assert len(seen) == 5


def test_simulating_underdamped_keeps_the_momentum():
    kernel, seen = recorded(Underdamped(power_law(0.4, 0.3), friction=0.7))
    x, p = X, None
    for k, (state, _) in enumerate(simulate(kernel, Harmonic(), X, Noise(0), 5)):
        h = 0.4 * (k + 1) ** -0.3
        p = seen[0][1] if p is None else p
        kept = math.exp(-0.7 * h)
        p = p - h * x
        x = x + h / 2 * p
        p = kept * p + math.sqrt(1 - kept**2) * seen[k][2]
        x = x + h / 2 * p
        torch.testing.assert_close(state.x, x, rtol=1e-12, atol=1e-13)
    assert torch.cat([seen[0][1], *(xi for _, _, xi, _ in seen)]).unique().numel() == 6 * X.numel()


def test_replicas_by_hand():
    """Two groups of six over three potentials: weights, positions and log Z of unit Gaussians that move."""
    potentials = [Location(torch.tensor([t, -t], dtype=F64)) for t in (0.0, 0.1, 0.15, 0.3)]
    kernel, seen = recorded(ULA(power_law(0.2, 0.4)))
    found = Replicas(kernel, potentials[0], X, Noise(0), groups=2, log_z=1.7)
    log_weights, x = torch.zeros(12, dtype=F64), X

    def log_flow(a, b, theta, h):
        return -(a - theta).square().sum(1) / 2 - (b - a + h * (a - theta)).square().sum(1) / (4 * h)

    last = None
    for k, potential in enumerate(potentials[:3]):
        theta, h = potential.theta.detach(), 0.2 * (k + 1) ** -0.4
        if last is not None:
            y, before, h_before = last
            log_weights = log_weights + log_flow(x, y, theta, h_before) - log_flow(y, x, before, h_before)
        found.step(potential)
        last = (x, theta, h)
        x = x - h * (x - theta) + math.sqrt(2 * h) * seen[k][2]
        torch.testing.assert_close(torch.cat([w.x for w in found.groups]), x, rtol=1e-11, atol=1e-12)
    y, before, h = last
    theta = potentials[3].theta.detach()
    log_weights = log_weights + log_flow(x, y, theta, h) - log_flow(y, x, before, h)
    held = found.particles(potentials[3])
    torch.testing.assert_close(held.weights, log_weights.softmax(0), rtol=1e-10, atol=1e-12)
    assert held.log_z.item() == pytest.approx(1.7 + log_weights.logsumexp(0).item() - math.log(12), rel=1e-11)
    z = log_weights.exp().view(2, 6).mean(1)
    estimate, error = found.log_z(potentials[3])
    assert estimate == pytest.approx(1.7 + z.mean().log().item(), rel=1e-11)
    assert error == pytest.approx((z.std() / z.mean() / math.sqrt(2)).item(), rel=1e-9)


def test_annealing_visits_every_time_once_and_ends_at_one(monkeypatch):
    stepped, kernel = [], MALA(0.1)

    def law(t):
        potential = GaussianMixture(torch.full((1, 2), t, dtype=F64), std=1 + t)
        potential.t = t
        return potential

    step = Replicas.step
    monkeypatch.setattr(Replicas, "step", lambda self, potential: stepped.append(potential.t) or step(self, potential))
    found = annealed(law, kernel, 16, Noise(0), steps=5, groups=2)
    assert stepped == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and found.steps == 5
    assert found.log_z0 == pytest.approx(math.log(2 * math.pi))
