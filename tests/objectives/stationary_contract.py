"""What every objective owes under a stationary law; the tests of each objective inherit it.

A test class says how its objective is made and what F is in plain arithmetic; the suite compares the rest with that.
Laws are discrete here: on the points x_i with weights w_i, π ∝ e^{−V} means V_i = −log w_i + const, so that the first
variations of the KL divergences, which hold under π only, are compared in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from implicit_diffusion.gradients import Gibbs, fused_pass
from implicit_diffusion.loops import Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Density, FirstVariation, GibbsObjective, Objective, Term, TerminalObjective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers import ULA
from tests.helpers.oracles_gibbs import Banana, estimate
from tests.helpers.shared_particles import one_term
from tests.helpers.together import together
from tests.objectives.contract import F64, OTHER, TermContract, check

N = 8
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
LOG_WEIGHTS = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=F64)
WEIGHTS = pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])


class StationaryContract(TermContract):
    """What an objective owes under a stationary law, given F in plain arithmetic by `functional`."""

    tolerance = 1e-7  # of F′ against differences of F

    def functional(self, x: Tensor, w: Tensor) -> float:
        """F(Σ_i w_i δ_{x_i})."""
        raise NotImplementedError

    def rude(self, function: Callable[[Tensor], Tensor]) -> GibbsObjective | None:
        """The objective around a function of particles; None where it calls none on them."""
        return None

    def law(self, term: GibbsObjective, weighted: bool, dtype: torch.dtype = F64) -> tuple[Particles, Density]:
        """The law on X as particles with weights and log Z, and its density; −log w = V + log Z."""
        x = X.to(dtype)
        energy = (1.5 - LOG_WEIGHTS if weighted else torch.full((N,), 1.5, dtype=F64)).to(dtype)
        log_z = (-energy).logsumexp(0)
        particles = Particles(x, -energy if weighted else None, log_z)
        points = term.draw(torch.Generator().manual_seed(0))
        if points is None:
            return particles, Density(energy)
        same = (points[:, None] == x).all(2).to(dtype)
        return particles, Density(energy, points, same @ energy / same.sum(1))

    def variation(self, term: GibbsObjective, particles: Particles, density: Density) -> FirstVariation:
        return term.first_variation(particles, density)

    def use(self, term: Term) -> None:
        assert isinstance(term, GibbsObjective)
        particles, density = self.law(term, weighted=True)
        term.check_stationary(particles, density.energy)
        term.starting_at(particles, density.energy)
        term.first_variation(particles, density)
        for settings in ({}, {"weighted": True}):
            self.loop(term, **settings).step()

    def loop(
        self, objective: Objective, theta: tuple[float, ...] = (0.3, -0.4, 0.4), seed: int = 0, **settings: bool
    ) -> Single:
        potential = Banana(theta)
        x = potential.draw(40, torch.Generator().manual_seed(seed))
        sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
        return Single(potential, ULA(0.1), objective, sgd, particles=x, noise=Noise(seed), **settings)

    def compare(self, term: GibbsObjective, weighted: bool) -> None:
        """d/dε F((1−ε)p + εq) = ∫F′ d(q − p) for q another law on the same points, and the value."""
        particles, density = self.law(term, weighted)
        variation = self.variation(term, particles, density)
        w, q = particles.weights, torch.rand(N, generator=torch.Generator().manual_seed(5), dtype=F64)
        q, step = q / q.sum(), 1e-3
        up, up2, down, down2 = (
            self.functional(particles.x, (1 - e) * w + e * q) for e in (step, 2 * step, -step, -2 * step)
        )
        slope = (8 * (up - down) - (up2 - down2)) / (12 * step)
        function = as_function(variation, particles, density)
        assert abs(slope) > 0.02  # that a factor would show
        assert ((q - w) @ function).item() == pytest.approx(slope, rel=self.tolerance, abs=self.tolerance)
        assert variation.value is not None
        value = self.functional(particles.x, w)
        assert variation.value.item() == pytest.approx(value, rel=self.tolerance, abs=self.tolerance)

    @WEIGHTS
    def test_first_variation_against_differences_of_the_value(self, weighted):
        self.compare(self.make(), weighted)

    @pytest.mark.parametrize("factor", [-1.0, 2.0, 1.02], ids=["sign", "factor two", "two percent"])
    def test_wrong_signs_and_factors_are_seen_by_the_differences(self, factor, monkeypatch):
        term = self.make()
        right = type(term).first_variation

        def mutant(self, particles, density=None):
            variation = right(self, particles, density)
            scaled = {k: v if v is None else factor * v for k, v in vars(variation).items() if k != "value"}
            return replace(variation, **scaled)

        monkeypatch.setattr(type(term), "first_variation", mutant)
        with pytest.raises(AssertionError):
            self.compare(term, weighted=True)

    @WEIGHTS
    def test_the_adjoint_measure(self, weighted):
        """−(μ − (∫dμ) p), of total zero, where the part on n particles is divided by 1 − Σw²."""
        term = self.make()
        particles, density = self.law(term, weighted)
        variation = term.first_variation(particles, density)
        w, measure = particles.weights, Gibbs()(variation, particles)
        on_particles = variation.on_particles(particles)
        expected = -(on_particles - on_particles.sum() * w) / (1 - w.square().sum())
        total = measure.on_particles.sum()
        if variation.on_points is not None:
            expected = expected + variation.on_points.sum() * w
            torch.testing.assert_close(measure.on_points, -variation.on_points)
            total = total + measure.on_points.sum()
        torch.testing.assert_close(measure.on_particles, expected, rtol=1e-10, atol=1e-12)
        assert abs(total) < 1e-12
        assert (variation.function is None) == (term.support == "points")
        assert (variation.on_points is None) == (term.support == "particles")

    @WEIGHTS
    def test_a_constant_in_the_first_variation_changes_nothing(self, weighted):
        """F′ + c adds c·p to the measure."""
        term = self.make()
        particles, density = self.law(term, weighted)
        variation = term.first_variation(particles, density)
        function = torch.zeros(N, dtype=F64) if variation.function is None else variation.function
        one, other = (Gibbs()(each, particles) for each in (variation, replace(variation, function=function + 11.0)))
        torch.testing.assert_close(other.on_particles, one.on_particles, rtol=1e-10, atol=1e-12)

    def test_equal_weights_are_uniform_weights(self):
        term = self.make()
        particles, density = self.law(term, weighted=False)
        equal = replace(particles, log_weights=torch.full((N,), 3.0, dtype=F64))
        one, other = (Gibbs()(term.first_variation(p, density), p) for p in (particles, equal))
        torch.testing.assert_close(other.on_particles, one.on_particles, rtol=1e-7, atol=1e-9)

    def test_particles_without_weight_do_not_count(self):
        """Weights may underflow to zero; such particles carry no charge, and the others those of a law without them."""
        term = self.make()
        particles, density = self.law(term, weighted=True)
        added = Particles(
            torch.cat([particles.x, particles.x[:1] + 3]),
            torch.cat([particles.log_weights, particles.log_weights[:1] - 2000]),
            particles.log_z,
        )
        energy = torch.cat([density.energy, density.energy[:1] + 2000])
        more, fewer = (
            (Gibbs()(variation, p).on_particles, variation.value)
            for p, d in ((added, replace(density, energy=energy)), (particles, density))
            for variation in [term.first_variation(p, d)]
        )
        assert more[0][N] == 0
        torch.testing.assert_close(more[0][:N], fewer[0], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(more[1], fewer[1], rtol=1e-7, atol=1e-9)

    @WEIGHTS
    def test_single_precision(self, weighted):
        one, other = (
            Gibbs()(term.first_variation(particles, density), particles)
            for dtype in (torch.float32, F64)
            for term in [self.make(dtype)]
            for particles, density in [self.law(term, weighted, dtype)]
        )
        assert one.on_particles.dtype == torch.float32
        torch.testing.assert_close(one.on_particles.double(), other.on_particles, rtol=2e-4, atol=2e-5)

    @WEIGHTS
    def test_gradients_are_linear_in_the_objective(self, weighted):
        term, logs = self.make(), LOG_WEIGHTS if weighted else None
        potential = Banana()
        sums, parts = (
            estimate(potential, 2.0 * term - 0.5 * OTHER, X, logs),
            2.0 * estimate(potential, term, X, logs) - 0.5 * estimate(potential, OTHER, X, logs),
        )
        torch.testing.assert_close(sums, parts, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("settings", [{}, {"weighted": True}], ids=["uniform", "weighted"])
    def test_loops_that_share_it_do_not_notice_each_other(self, settings):
        shared = 0.7 * self.make()
        alone, one, other = self.loop(0.7 * self.make(), **settings), self.loop(shared, **settings), None
        for _ in range(4):
            expected, metrics = alone.step(), one.step()
            other = other or self.loop(shared, (0.9, 0.1, -0.2), seed=3, weighted=True)  # later, and elsewhere
            other.step()
            assert metrics.keys() == expected.keys()
            assert all(torch.equal(torch.as_tensor(metrics[name]), torch.as_tensor(expected[name])) for name in metrics)
        assert torch.equal(one.model.theta, alone.model.theta)

    def test_processes_that_share_the_particles_find_what_one_finds(self):
        """F, F′, charges on particles and on points, and Γ, of uniform and of weighted particles."""
        place = type(self).__module__, type(self).__name__
        whole = one_term(*place)
        for shares in together(2, "tests.helpers.shared_particles:one_term", *place):
            assert {name: value is None for name, value in shares.items()} == {k: v is None for k, v in whole.items()}
            for name, value in whole.items():
                if value is not None:
                    torch.testing.assert_close(shares[name], value, rtol=1e-11, atol=1e-13)

    @WEIGHTS
    def test_functions_that_write_into_the_particles(self, weighted):
        def wave(x):
            return x.sin().sum(1)

        def rude(x):
            value = wave(x)
            x.detach().fill_(7.0)
            return value

        terms = [self.rude(wave), self.rude(rude)]
        if terms[0] is None:
            return
        potential, passes = Banana(), []
        for term in terms:
            x = X.clone()
            weigh = (lambda here: Particles(X.clone(), LOG_WEIGHTS)) if weighted else None
            objective = (term + OTHER).stationary
            passes.append(fused_pass(potential, [potential.theta], objective, x, [None, None], weigh))
            if isinstance(term, TerminalObjective):
                term.check_value(Particles(x))
            assert torch.equal(x, X)
        assert torch.equal(passes[0].charges, passes[1].charges)
        assert torch.equal(passes[0].gradients[0], passes[1].gradients[0])


class TerminalContract(StationaryContract):
    """What a functional of points alone owes besides: it serves chains as well."""

    def use(self, term: Term) -> None:
        assert isinstance(term, TerminalObjective)
        super().use(term)
        check(term, Particles(X))
        term.value(Particles(X))

    @WEIGHTS
    def test_the_value_is_that_of_the_first_variation(self, weighted):
        term = self.make()
        particles, _ = self.law(term, weighted)
        torch.testing.assert_close(term.value(particles).detach(), term.first_variation(particles).value)

    @WEIGHTS
    def test_gradients_in_positions(self, weighted):
        term, logs = self.make(), LOG_WEIGHTS[:5] if weighted else None
        step = 1e-4 if term.name == "sinkhorn" else 1e-6  # its solver stops at 1e−9
        x = X[:5].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: term.value(Particles(x, logs)), x, eps=step, atol=2e-5)


def as_function(variation: FirstVariation, particles: Particles, density: Density) -> Tensor:
    """F′ at the particles, where the outside points lie on some of them: there F′ = μ/p."""
    x, w = particles.x, particles.weights
    function = torch.zeros_like(w) if variation.function is None else variation.function
    if variation.on_points is None:
        return function
    same = (density.points[:, None] == x).all(2).to(w.dtype)
    assert (same.sum(1) == 1).all()
    return function + same.mT @ variation.on_points / w
