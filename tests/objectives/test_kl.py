"""The two KL divergences: measures by hand, values by quadrature, and no place on chains."""

import math

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint, Gibbs
from implicit_diffusion.loops import Nested
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Density, ForwardKL, PathKL, ReverseKL, Reward
from implicit_diffusion.particles import Particles
from tests.helpers.oracles import affine_chain
from tests.helpers.oracles_gibbs import Quartic, line

F64 = torch.float64
DATA = torch.linspace(-1, 2, 7, dtype=F64)[:, None]


def weighted(n=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Particles(torch.randn(n, 1, generator=g, dtype=F64), torch.randn(n, generator=g, dtype=F64))


def charged(term, particles, energy):
    """F′·p and the charges on the particles."""
    variation = term.first_variation(particles, Density(energy))
    return variation, Gibbs()(variation, particles).on_particles


def test_forward_charges_are_those_of_maximum_likelihood():
    p, term = weighted(), ForwardKL(DATA)
    variation = term.first_variation(p, Density(Quartic()(p.x).detach(), term.draw(torch.Generator())))
    measure = Gibbs()(variation, p)
    torch.testing.assert_close(variation.on_points, torch.full((7,), -1 / 7, dtype=F64))
    assert variation.value is None and variation.function is None and (variation.on_particles(p) == 0).all()
    assert torch.equal(measure.on_particles, -p.weights) and torch.equal(measure.on_points, -variation.on_points)
    assert (measure.on_particles.sum() + measure.on_points.sum()).abs() < 1e-15
    assert Gibbs().same_charges([(1.0, term)])


def test_cross_entropy_needs_log_z():
    potential, p, term = Quartic(), weighted(), ForwardKL(DATA)
    log_z = torch.tensor(line().law(potential)[1], dtype=F64)
    at_data = potential(DATA).detach()
    density = Density(potential(p.x).detach(), DATA, at_data)
    assert term.first_variation(p, density).value is None
    log_density = -at_data - log_z
    known = Particles(p.x, p.log_weights, log_z)
    torch.testing.assert_close(term.first_variation(known, density).value, -log_density.mean())


def test_batches_are_drawn_from_the_data_and_replayed():
    term = ForwardKL(DATA, batch=5)
    one, two, three = (term.draw(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert one.shape == (5, 1) and torch.equal(one, two) and not torch.equal(one, three)
    assert torch.isin(one, DATA).all()
    many = ForwardKL(DATA, batch=70_000).draw(torch.Generator().manual_seed(2))
    counts = torch.bincount(torch.searchsorted(DATA[:, 0], many[:, 0]), minlength=7)
    assert ((counts - 10_000).abs() < 4 * math.sqrt(10_000)).all()


def test_reverse_charges_and_value_by_hand():
    p, here = weighted(), Quartic()
    term = ReverseKL(Quartic((-0.5, 0.8)))
    energy, other, w = here(p.x).detach(), term.potential(p.x).detach(), p.weights
    excess = energy - other
    variation, charges = charged(term, p, energy)
    expected = w * (excess - (w * excess).sum()) / (1 - (w**2).sum())
    torch.testing.assert_close(charges, expected, rtol=1e-12, atol=1e-14)
    assert charges.sum().abs() < 1e-14
    value = variation.value
    torch.testing.assert_close(value, (w * excess.exp()).sum().log() - (w * excess).sum())
    shifted, same = charged(ReverseKL(lambda x: term.potential(x) + 3.7), p, energy)
    torch.testing.assert_close(same, charges, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(shifted.value, value, rtol=1e-11, atol=1e-13)  # and of the normaliser of e^{−U}


@pytest.mark.parametrize("weights", [False, True])
def test_reverse_value_is_the_kl_by_quadrature(weights):
    here, other, n = Quartic(), Quartic((-0.2, 0.1)), 200_000
    p, log_z = line().law(here)
    q, other_log_z = line().law(other)
    exact = (p * (p / q).log()).sum().item()
    base = Quartic((0.0, 0.0)) if weights else here
    x = base.draw(n, torch.Generator().manual_seed(0))
    energy = here(x).detach()
    particles = Particles(x, base(x).detach() - energy if weights else None)
    value = charged(ReverseKL(other), particles, energy)[0].value.item()
    w, excess = particles.weights, energy - other(x).detach()
    ratio = (excess + log_z - other_log_z).exp()  # dq/dp; the estimate is a smooth function of two weighted means
    influence = w * (ratio - excess + (w * excess).sum() - 1)
    error = influence.square().sum().sqrt().item()
    assert error < 0.02 * exact
    assert abs(value - exact) < 4 * error


def test_reverse_value_uses_log_z_where_particles_carry_it():
    """KL(N(6, 1)‖N(0, 1)) = 18, where importance weights, whose particles never reach the bulk of N(0, 1), fail."""
    n, log_z = 40_000, 0.5 * math.log(2 * math.pi)
    x = 6 + torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    energy, term = (x - 6).square().sum(1) / 2, ReverseKL(lambda y: y.square().sum(1) / 2 - 3, log_z=log_z + 3)
    held = Particles(x, torch.zeros(n, dtype=F64), torch.tensor(log_z, dtype=F64))
    known = charged(term, held, energy)[0].value
    assert abs(known - 18) < 4 * 6 / n**0.5  # V − U varies by 6
    assert charged(term, Particles(x), energy)[0].value < 16


def test_kl_to_the_initial_potential_is_zero_and_then_not():
    potential, p = Quartic(), weighted()
    term = ReverseKL.to_initial(potential)
    start, charges = charged(term, p, potential(p.x).detach())
    assert start.value.abs() < 1e-14 and charges.abs().max() < 1e-14
    potential.theta.data += 0.3
    assert charged(term, p, potential(p.x).detach())[0].value > 1e-3
    assert not any(parameter.requires_grad for parameter in term.potential.parameters())


@pytest.mark.parametrize("term", [ForwardKL(torch.zeros(3, 2, dtype=F64)), ReverseKL(lambda x: x.sum(1))])
def test_chains_refuse_what_needs_a_density(term):
    """Either alone or beside a reward: a chain has no e^{−V}."""
    chain, reward = affine_chain(4, 2)
    for objective in (Reward(reward) + term, Reward(reward) + 0.1 * PathKL() + 2.0 * term, 1.0 * term):
        with pytest.raises(InvalidInputError, match=type(term).__name__):
            Nested(chain, objective, torch.optim.SGD(chain.denoiser.parameters(), lr=0.1), batch=2, noise=Noise(0))
    assert Adjoint  # estimators are reached through the loops, which check


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("data must be finite and at least one", lambda: ForwardKL(DATA[:0])),
        ("data must be finite", lambda: ForwardKL(DATA * float("nan"))),
        ("batch must be an integer ≥ 1", lambda: ForwardKL(DATA, batch=0)),
        ("data have event shape", lambda: check(ForwardKL(torch.zeros(3, 2, dtype=F64)))),
        ("data are torch.float32", lambda: check(ForwardKL(DATA.float()))),
        ("ReverseKL: its potential must return finite", lambda: check(ReverseKL(lambda x: x.sum()))),
        ("ReverseKL: its potential must return finite", lambda: check(ReverseKL(lambda x: (x[:, 0] - 99).log()))),
    ],
)
def test_refusals(message, build):
    with pytest.raises(InvalidInputError, match=message):
        build()


def check(term):
    p = weighted()
    term.check_stationary(p, Quartic()(p.x).detach())
