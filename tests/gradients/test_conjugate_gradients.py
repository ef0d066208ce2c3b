"""ν by conjugate gradients: against the closed form, a dense solve, and finite differences of a fixed point."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import ConjugateGradients, Gibbs
from implicit_diffusion.gradients.fused import fused_pass
from implicit_diffusion.objectives import ForwardKL, Functional, Reward
from implicit_diffusion.objectives.variation import FirstVariation
from implicit_diffusion.particles import Particles
from tests.helpers import mean_field

F64 = torch.float64
OBJECTIVES = {
    "reward": Reward(lambda x: torch.tanh(2 * x[:, 0])),
    "black box": Reward(lambda x: (x[:, 0] > 0.4).to(x.dtype)),
    "functional": Functional(lambda x, w: (w @ x[:, 0].square()) - (w @ x[:, 0]) ** 2),
    "sum": 2 * Reward(lambda x: x[:, 0]) + Functional(lambda x, w: (w @ x[:, 0] - 1) ** 2),
}


def value(objective, problem):
    particles = Particles(mean_field.GRID, mean_field.law(problem).log())
    return sum(c * term.first_variation(particles).value for c, term in objective.terms)


def gamma(objective, problem, solver=None):
    """Γ with the exact law as weighted particles, without the factor that makes it unbiased on independent ones."""
    parameters, logs = list(problem.parameters()), mean_field.law(problem).log()
    exact = Particles(mean_field.GRID, logs)
    solver = ConjugateGradients(problem.coupling, tolerance=1e-12) if solver is None else solver
    fused = fused_pass(
        problem.field(exact),
        parameters,
        objective.terms,
        mean_field.GRID,
        [None] * len(objective.terms),
        lambda here: exact,
        solver,
    )
    factor = 1 - exact.weights.square().sum()
    return torch.stack([factor * g for g in fused.gradients]), solver.take_info()


@pytest.mark.parametrize("strength", [0.8, -1.5])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gamma_is_the_derivative_of_a_fixed_point(name, strength):
    """Attraction and repulsion; θ in V and in W; five digits, by differences of fourth order."""
    objective, problem, d = OBJECTIVES[name], mean_field.problem(strength), 1e-3
    found, info = gamma(objective, problem)
    assert info["solve_residual"] < 1e-10 and not info["negative_curvature"]
    for parameter, slope in zip(problem.parameters(), found, strict=True):
        start, values = parameter.item(), {}
        for k in (-2, -1, 1, 2):
            parameter.data.fill_(start + k * d)
            values[k] = value(objective, problem)
        parameter.data.fill_(start)
        exact = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * d)
        assert slope.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-7)


def test_the_coupling_matters():
    """The closed form, which ignores it, is far off."""
    problem = mean_field.problem()
    found, _ = gamma(OBJECTIVES["reward"], problem)
    closed, _ = gamma(OBJECTIVES["reward"], problem, Gibbs())
    assert ((found - closed).abs() > 0.1 * found.abs()).any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_without_a_coupling_it_is_the_closed_form(weighted, dtype):
    generator = torch.Generator().manual_seed(0)
    x, logs, function = (torch.randn(50, generator=generator, dtype=dtype) for _ in range(3))
    particles = Particles(x[:, None], logs if weighted else None)
    solver = ConjugateGradients(lambda particles, charges: torch.zeros_like(charges))
    solved = solver(FirstVariation(function), particles).on_particles
    closed = Gibbs()(FirstVariation(function), particles).on_particles
    rounding = 1e-12 if dtype == F64 else 1e-6
    torch.testing.assert_close(solved, closed, rtol=rounding, atol=rounding * float(closed.abs().max()))
    assert solver.take_info()["solve_steps"] == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_a_dense_solve(weighted):
    """With a random coupling, whose complement of 1 is solved for with a multiplier."""
    n, generator = 30, torch.Generator().manual_seed(1)
    x, logs, function = (torch.randn(n, generator=generator, dtype=F64) for _ in range(3))
    factor = torch.randn(n, 5, generator=generator, dtype=F64)
    matrix = factor @ factor.mT
    particles = Particles(x[:, None], logs if weighted else None)
    solver = ConjugateGradients(lambda particles, charges: matrix @ charges, tolerance=1e-13)
    found = solver(FirstVariation(function), particles).on_particles
    w = particles.weights
    system = torch.ones(n + 1, n + 1, dtype=F64)
    system[:n, :n], system[n, n] = torch.diag(1 / w) + matrix, 0
    right = torch.cat([-function, torch.zeros(1, dtype=F64)])
    exact = torch.linalg.solve(system, right)[:n] / (1 - w.square().sum())
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    assert abs(found.sum()) < 1e-12 and solver.take_info()["solve_steps"] <= 8  # five directions matter


def test_it_starts_from_its_last_solution():
    problem, objective = mean_field.problem(), OBJECTIVES["reward"]
    solver = ConjugateGradients(problem.coupling)
    first, cold = gamma(objective, problem, solver)
    again, warm = gamma(objective, problem, solver)
    assert warm["solve_steps"] == 0 < cold["solve_steps"]
    torch.testing.assert_close(first, again, rtol=1e-6, atol=1e-9)
    other = ConjugateGradients(problem.coupling)
    other.load_state_dict(solver.state_dict())
    assert gamma(objective, problem, other)[1]["solve_steps"] == 0


def test_negative_curvature_is_noticed():
    """Attraction that outweighs the noise: uniform particles on a small disc are at no minimum."""
    n = 20
    solver = ConjugateGradients(lambda particles, charges: -3 * n * charges)
    x = torch.linspace(0, 1, n, dtype=F64)
    solver(FirstVariation(x), Particles(x[:, None]))
    assert solver.take_info()["negative_curvature"] == 1.0
    assert solver.take_info() == {}


def test_too_few_steps_show_in_the_residual():
    problem = mean_field.problem(-1.5)
    _, info = gamma(OBJECTIVES["reward"], problem, ConjugateGradients(problem.coupling, steps=1))
    assert info["solve_residual"] > 1e-3 and info["solve_steps"] == 1


def test_measures_outside_of_the_particles_are_refused():
    solver = ConjugateGradients(lambda particles, charges: charges)
    with pytest.raises(InvalidInputError, match="measure on points"):
        solver.check([(1.0, ForwardKL(torch.zeros(3, 1)))])
    for arguments in ({"tolerance": 0.0}, {"steps": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(arguments))):
            ConjugateGradients(lambda particles, charges: charges, **arguments)
