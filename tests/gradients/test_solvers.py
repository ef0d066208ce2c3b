"""A second solver for ν beside the closed form: a dense linear solve on the particles, which no objective knows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import AdjointMeasure, AdjointSolver, Gibbs
from implicit_diffusion.gradients.fused import fused_pass, one_pull
from implicit_diffusion.objectives import FirstVariation, ForwardKL
from implicit_diffusion.particles import Particles
from tests.gradients.gibbs_cases import CASES, POTENTIALS, THETA
from tests.helpers.together import together

F64 = torch.float64


class Dense(AdjointSolver):
    """(∇²_w G) ν = −F′ on weights of total zero for G(w) = Σ w_i V_i + Σ w_i log w_i + ½ Σ w_i w_j W_ij.

    With the multiplier λ of the constraint: H ν + λ = −F′ and Σ ν = 0, where H = diag(1/w) + W.
    """

    supports = ("particles",)

    def __init__(self, interaction: Tensor | None = None) -> None:
        self.interaction = interaction

    def hessian(self, particles: Particles) -> Tensor:
        diagonal = torch.diag(1 / particles.weights)
        return diagonal if self.interaction is None else diagonal + self.interaction

    def __call__(self, variation: FirstVariation, particles: Particles) -> AdjointMeasure:
        n, zero = len(particles), torch.zeros(1, dtype=F64)
        system = torch.ones(n + 1, n + 1, dtype=F64)
        system[:n, :n], system[n, n] = self.hessian(particles), 0
        assert variation.function is not None
        return AdjointMeasure(torch.linalg.solve(system, torch.cat([-variation.function, zero]))[:n])


def drawn(n=9):
    potential, generator = POTENTIALS[2](THETA[2]), torch.Generator().manual_seed(0)
    return potential, potential.draw(n, generator), torch.randn(n, generator=generator, dtype=F64)


@pytest.mark.parametrize("name", ["reward", "reverse_kl", "functional", "mmd", "sinkhorn"])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_interaction_it_is_the_closed_form(name, weighted):
    """Up to the factor that makes the closed form unbiased: a solve for the empirical distribution has none."""
    potential, x, logs = drawn()
    terms = CASES[2][name].objective.stationary
    weigh = (lambda here: Particles(x, logs)) if weighted else None
    closed, dense = (
        fused_pass(potential, [potential.theta], terms, x, [None], weigh, solver) for solver in (Gibbs(), Dense())
    )
    factor = 1 - Particles(x, logs if weighted else None).weights.square().sum()
    torch.testing.assert_close(dense.charges, factor * closed.charges, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dense.gradients[0], factor * closed.gradients[0], rtol=1e-9, atol=1e-12)
    assert dense.values == closed.values


def test_with_interaction_it_solves_another_equation():
    _, x, logs = drawn()
    particles, gram = Particles(x, logs), torch.exp(-(x[:, None] - x).square().sum(2) / 2)
    solver, term = Dense(gram), CASES[2]["functional"].objective
    variation = term.first_variation(particles)
    charges = solver(variation, particles).on_particles
    residual = solver.hessian(particles) @ charges + variation.function
    assert charges.sum().abs() < 1e-12 and (residual - residual.mean()).abs().max() < 1e-10
    assert (charges - Dense()(variation, particles).on_particles).abs().max() > 1e-3


def solved(name):
    """Charges and Γ of a solver that needs all particles together, by processes that share them."""
    potential, x, logs = drawn(10)
    with processes.sharing():
        own = Particles(processes.share(x), logs)
        terms = CASES[2][name].objective.stationary
        fused = fused_pass(potential, [potential.theta], terms, own.x, [None], lambda here: own, Dense())
        processes.sum_gradients(fused.gradients)
        return processes.gathered(fused.charges), fused.gradients[0]


@pytest.mark.parametrize("name", ["reward", "mmd"])
def test_processes_that_share_the_particles_solve_for_all_of_them(name):
    for found in together(2, "tests.gradients.test_solvers:solved", name):
        torch.testing.assert_close(found, solved(name), rtol=1e-10, atol=1e-13)


def test_it_refuses_measures_on_outside_points_before_anything_is_evaluated():
    potential, x, _ = drawn()
    data = ForwardKL(x[:3])
    terms = (CASES[2]["reward"].objective + data).stationary
    message = "Dense needs F′ as a function on the particles, but nll is a measure on points outside of them"
    with pytest.raises(InvalidInputError, match=message):
        Dense().check(terms)

    def never(x):
        raise AssertionError

    with pytest.raises(InvalidInputError, match=message):
        fused_pass(never, [potential.theta], terms, x, [None, data.data], solver=Dense())
    Gibbs().check(terms)


def test_one_pull_is_a_matter_of_the_solver():
    terms = [(1.0, ForwardKL(drawn()[1]))]
    assert one_pull(terms) and not one_pull(terms, Dense())
    assert not one_pull(CASES[2]["sum"].objective.stationary)
