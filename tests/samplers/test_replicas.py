"""Replicas: E Ẑ = Z along any path of θ, an honest standard error, weighted averages; and that a mutation shows."""

import copy
import math

import pytest
import scipy.stats
import torch

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.noise import Noise
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import GaussianMixture, Tilted, mlp
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped, replicas
from implicit_diffusion.samplers.replicas import Replicas, annealed
from implicit_diffusion.samplers.weighted_state import log_mean_exp
from tests.helpers.gibbs_loops import path, wave
from tests.helpers.oracles_gibbs import Grid, Harmonic, Quartic, line, z_scores
from tests.helpers.shared_particles import annealing
from tests.helpers.together import together

F64 = torch.float64
KERNELS = {
    "ula": ULA(0.09),
    "mala": MALA(0.4),
    "hmc": HMC(0.6, 2),
    "ula, falling": ULA(lambda k: 0.12 / (k + 1) ** 0.3),
}
FAST, MILD = (12, 13), (16, 5)  # paths: θ moves so fast that groups are resampled on the way, or not


def followed(kernel, way=FAST, groups=40, size=150, seed=0):
    """Replicas along a path of θ, fixed in advance, from exact draws with the exact log Z_0."""
    steps, made = way
    potentials = [Quartic(tuple(theta.tolist())) for theta in path(steps)[:made]]
    generator = torch.Generator().manual_seed(seed)
    x, log_z = potentials[0].draw(groups * size, generator), line().law(potentials[0])[1]
    found = Replicas(kernel, potentials[0], x, Noise(seed), groups=groups, log_z=log_z)
    for potential in potentials:
        found.step(potential)
    return found, potentials[-1]


def parts(whole, groups):
    """The same replicas as many of `groups` groups: replicates, since groups share nothing."""
    for i in range(0, len(whole.groups), groups):
        part = copy.copy(whole)
        part.groups = whole.groups[i : i + groups]
        yield part


def four_deviations(degrees):
    """The quantile of Student's t that is as rare as four deviations of a normal number."""
    return scipy.stats.t(degrees).isf(scipy.stats.norm.sf(4))


def z_of_log_z(found, potential):
    """(Ẑ − Z)/standard error, and that error relative to Z."""
    estimate, error = found.log_z(potential)
    return (math.exp(estimate - line().law(potential)[1]) - 1) / error, error


@pytest.mark.parametrize("name", KERNELS)
def test_the_mean_of_z_is_unbiased_while_theta_moves(name):
    """At coarse h and far from equilibrium, with resampling on the way."""
    found, potential = followed(KERNELS[name])
    z, error = z_of_log_z(found, potential)
    assert abs(z) < four_deviations(39) and error < 0.05
    assert sum(w.log_z != 0 for w in found.groups) > (5 if name == "hmc" else 35)
    assert found.steps == 13 and found.gradient_evaluations == 13 * KERNELS[name].evaluations_per_step


@pytest.mark.parametrize("name", ["ula", "mala"])
def test_a_resampling_that_forgets_log_z_is_seen(name, monkeypatch):
    def forgetful(weighted_state, here, uniform):
        taken, there = replicas_resample(weighted_state, here, uniform)
        return taken._replace(log_z=weighted_state.log_z), there

    replicas_resample = replicas.resample
    monkeypatch.setattr(replicas, "resample", forgetful)
    assert abs(z_of_log_z(*followed(KERNELS[name]))[0]) > 8


MUTATIONS = [(k, m) for k in (ULA, MALA) for m in ("signs", "a step late")] + [(ULA, "α without its last term")]


@pytest.mark.parametrize(("kernel", "mutation"), MUTATIONS)
def test_a_wrong_increment_is_seen(kernel, mutation, monkeypatch):
    forward, backward = kernel.forward_part, kernel.backward_part
    if mutation == "signs":
        monkeypatch.setattr(kernel, "forward_part", lambda *a: -forward(*a))
        monkeypatch.setattr(kernel, "backward_part", lambda *a: -backward(*a))
    elif mutation == "α without its last term":
        shortened = lambda self, step, after: forward(self, step._replace(h=0 * step.h), after)  # noqa: E731
        monkeypatch.setattr(kernel, "forward_part", shortened)
    else:  # V at the particles before the move
        monkeypatch.setattr(kernel, "forward_part", lambda self, step, after: step.here.value)
    assert abs(z_of_log_z(*followed(kernel(0.2), MILD, size=400))[0]) > 8


@pytest.mark.slow
def test_the_standard_error_is_honest():
    """240 replicates of 8 groups each: their z-scores are Student's t with 7 degrees of freedom."""
    scores = []
    for seed, name in enumerate(("ula", "mala", "hmc")):
        found, potential = followed(KERNELS[name], MILD, groups=640, size=40, seed=seed)
        scores += [z_of_log_z(part, potential) for part in parts(found, 8)]
    z, errors = torch.tensor(scores, dtype=F64).T
    n, t = len(z), scipy.stats.t(7)
    assert errors.max() < 0.1  # log Z is all but linear in Z there
    assert abs(z.mean()) < 4 * t.std() / math.sqrt(n)
    spread = t.var() * math.sqrt((float(t.stats("k")) + 2) / n)
    assert abs(z.var() - t.var()) < 4 * spread < 0.55 * t.var()  # an error 1.5 times as large or small would show
    assert scipy.stats.kstest(z.numpy(), t.cdf).pvalue > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ula", "mala", "hmc"])
def test_weighted_averages_are_exact_while_theta_moves(name):
    found, potential = followed(KERNELS[name], groups=60, size=150)
    means = [held.mean(wave(held.x)) for held in (part.particles(potential) for part in parts(found, 4))]
    truth = torch.tensor([line().mean(potential, wave)], dtype=F64)
    assert z_scores(torch.stack(means)[:, None], truth).abs() < four_deviations(14)
    x = torch.cat([w.x for w in found.groups])
    unweighted = wave(x).view(15, -1).mean(1, keepdim=True)
    assert z_scores(unweighted, truth).abs() > 6


def test_groups_count_by_their_own_z():
    """Weights of all particles, and log Z, by hand from the groups'."""
    found, potential = followed(ULA(0.09), groups=6, size=40)
    groups = found._under(potential)
    z = torch.stack([(w.log_z + w.log_weights).exp() for w in groups])  # (groups, size)
    held = found.particles(potential)
    assert isinstance(held, Particles) and len(held) == 240
    torch.testing.assert_close(held.weights, (z / z.sum()).flatten(), rtol=1e-10, atol=1e-14)
    assert held.log_z.item() == pytest.approx(found.log_z0 + z.mean().log().item(), abs=1e-12)
    estimate, error = found.log_z(potential)
    of_groups = z.mean(1)
    assert estimate == pytest.approx(held.log_z.item(), abs=1e-12)
    assert error == pytest.approx((of_groups.std() / of_groups.mean()).item() / math.sqrt(6), rel=1e-10)
    assert log_mean_exp(torch.tensor([800.0, 800.0])).item() == pytest.approx(800)


def tilted(seed=0):
    """A law on the plane that is no Gaussian, and its expectations."""
    network = mlp(2, Noise(seed), width=16, depth=2).double()
    network[-1].weight.data = Noise(seed).normal((1, 16), 1, dtype=F64)
    return Tilted(network, (2,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", [ULA(0.1), MALA(0.2), pytest.param(HMC(0.4, 2), marks=pytest.mark.slow)], ids=["ula", "mala", "hmc"]
)
def test_annealing_finds_log_z_and_averages_on_the_plane(kernel):
    potential = tilted()
    coarse, fine = (Grid(((-8.0, 8.0), (-8.0, 8.0)), spacing) for spacing in (0.2, 0.1))
    log_z = fine.law(potential)[1]
    assert abs(coarse.law(potential)[1] - log_z) < 1e-8
    assert abs(log_z - math.log(2 * math.pi)) > 0.05  # away from where it began
    found = annealed(potential.tempered, kernel, 8000, Noise(1), steps=25, groups=32)
    estimate, error = found.log_z(potential)
    assert abs(math.exp(estimate - log_z) - 1) < four_deviations(31) * error < 0.1
    means = torch.stack(
        [torch.stack([held.mean(held.x[:, 0]), held.mean(held.x.square().sum(1))]) for held in
         (part.particles(potential) for part in parts(found, 4))]
    )  # fmt: skip
    functions = (lambda x: x[:, 0], lambda x: x.square().sum(1))
    truth = torch.tensor([fine.mean(potential, f) for f in functions], dtype=F64)
    assert (z_scores(means, truth).abs() < four_deviations(7)).all()
    assert found.steps == 25 and found.gradient_evaluations == 25 * kernel.evaluations_per_step


def test_annealing_along_mixtures_replays_and_leaves_the_model_as_it_was():
    def law(t):
        means = torch.tensor([[0.0, 0.0], [2 * t, -t]], dtype=F64)
        return GaussianMixture(means, torch.tensor([0.0, t], dtype=F64), std=1 + t)

    first, again = (annealed(law, MALA(0.3), 320, Noise(3), steps=10, groups=4) for _ in range(2))
    a, b = first.particles(law(1.0)), again.particles(law(1.0))
    assert torch.equal(a.x, b.x) and torch.equal(a.log_weights, b.log_weights)
    estimate, error = first.log_z(law(1.0))
    assert abs(estimate - law(1.0).log_z) < four_deviations(3) * error
    potential = law(1.0).train()
    acceptance = first.step(potential)
    assert 0 < acceptance <= 1 and potential.training
    assert all(p.grad is None for p in potential.parameters())


def test_what_is_refused():
    x = torch.zeros(16, 1, dtype=F64)
    with pytest.raises(InvalidInputError, match="Underdamped has no increment of weights; use ULA, MALA or HMC"):
        Replicas(Underdamped(0.1), Harmonic(), x, Noise(0))
    for groups in (1, 3, 16, 0):
        with pytest.raises(
            InvalidInputError, match=rf"16 particles do not split into {groups} groups of equal size ≥ 2"
        ):
            Replicas(ULA(0.1), Harmonic(), x, Noise(0), groups=groups)
    with pytest.raises(InvalidInputError, match=r"path\(0\) must have sample\(n, noise\) and log_z"):
        annealed(lambda t: Harmonic(), ULA(0.1), 16, Noise(0), steps=2)
    potential = tilted()
    with pytest.raises(InvalidInputError, match="path"):  # a path that begins at a tilted law
        annealed(lambda t: potential.tempered((1 + t) / 2), ULA(0.1), 16, Noise(0), steps=2)


class Flawed(Harmonic):
    """NaN beyond 1."""

    def forward(self, x):
        return super().forward(x) + 0 * (1 - x[:, 0]).sqrt()


def test_potentials_that_are_none_and_weights_that_turn_nan():
    x = torch.linspace(-2, 0, 16, dtype=F64)[:, None]
    gauss = GaussianMixture(torch.zeros(1, 1, dtype=F64))
    for call in (
        lambda: Replicas(ULA(0.1), Flawed(), -x, Noise(0)),
        lambda: annealed(lambda t: Flawed() if t == 1 else gauss, ULA(0.1), 64, Noise(0), steps=2),
    ):
        with pytest.raises(InvalidInputError, match="NaN or infinite on the initial particles"):
            call()
    found = Replicas(ULA(0.5), Flawed(), x, Noise(0))
    for _ in range(5):
        found.step(Flawed())
    for ask in (found.log_z, found.particles):
        with pytest.raises(NonFiniteError, match="weights of replicas are NaN or infinite after 5 steps"):
            ask(Flawed())


@pytest.mark.parametrize(("groups", "each"), [(4, 2), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_processes_share_the_groups(groups, each):
    """Two processes have two of four groups each, and all three where they cannot be divided; both read the same."""
    one, shown, resampled, _ = annealing(groups)
    assert resampled
    found = together(2, "tests.helpers.shared_particles:annealing", groups)
    for read, text, _, number in found:
        assert (text, number) == (shown, each)
        torch.testing.assert_close(read, one, rtol=1e-11, atol=1e-12)
        assert all(torch.equal(value, found[0][0][name]) for name, value in read.items())
    assert any(some for _, _, some, _ in found)
