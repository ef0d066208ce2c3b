"""Loops over particles that interact: their drift, Γ at their law, what is refused, and runs that continue."""

import pytest
import torch

from implicit_diffusion import ULA, Noise, processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.loops import NestedParticles, Single, Unrolled
from implicit_diffusion.loops.diagnostics import advice, signal_to_noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.potentials import MeanField
from implicit_diffusion.samplers import MALA, Underdamped
from tests.gradients.test_conjugate_gradients import OBJECTIVES, gamma
from tests.helpers import mean_field
from tests.helpers.together import together

F64 = torch.float64
X = torch.randn(24, 1, generator=torch.Generator().manual_seed(2), dtype=F64)


def loop(kind=Single, x=X, lr=0.1, kernel=None, objective=OBJECTIVES["reward"], strength=0.8, **options):
    problem = mean_field.problem(strength)
    sgd = torch.optim.SGD(problem.parameters(), lr=lr)
    return kind(problem, kernel or ULA(0.05), objective, sgd, particles=x, noise=Noise(3), **options)


def test_particles_drift_by_what_all_of_them_exert():
    """x⁺ = x − h(∇V + mean ∇W)/τ + √(2h) ξ, with the gradients by hand."""
    made = loop(lr=0.0)
    well, attraction, tau = made.model.potential, made.model.interaction, made.model.temperature
    (xi, *_), h = made._draws(0), 0.05
    made.step()
    d = X - X.mT
    force = well.a * (X**2 - 1) * X + well.b
    force = force + (attraction.strength * d * torch.exp(-(d**2) / 2)).mean(1, keepdim=True)
    torch.testing.assert_close(made.particles.x, X - h * force.detach() / tau + (2 * h) ** 0.5 * xi, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_gamma_at_draws_from_the_law_is_that_of_the_law():
    """Its bias is O(1/n) and drops out of 2 Γ(2n) − Γ(n)."""
    exact, _ = gamma(OBJECTIVES["reward"], mean_field.problem())
    masses, n, replicates = mean_field.law(mean_field.problem()), 60, 150
    generator, estimates = torch.Generator().manual_seed(4), []
    for _ in range(replicates):
        index = torch.multinomial(masses, 2 * n, replacement=True, generator=generator)
        x = mean_field.GRID[index]
        found = []
        for part in (x, x[:n], x[n:]):
            made = loop(x=part, lr=0.0)
            made.step()
            found.append(torch.stack([p.grad for p in made.model.parameters()]))
        estimates.append(2 * found[0] - (found[1] + found[2]) / 2)
    estimates = torch.stack(estimates)
    error = estimates.std(0) / replicates**0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all(), (estimates.mean(0), exact, error)
    assert (4 * error < 0.25 * exact.abs().max()).all()


@pytest.mark.parametrize("kind", [Single, NestedParticles])
def test_it_continues_bit_for_bit(kind, tmp_path):
    """With the solution that the next solve starts from."""
    options = {"inner_steps": 2} if kind is NestedParticles else {}
    whole, half, resumed = (loop(kind, **options) for _ in range(3))
    rows = [whole.step() for _ in range(6)]
    for _ in range(3):
        half.step()
    save_state(tmp_path / "state", half.state_dict())
    resumed.load_state_dict(load_state(tmp_path / "state"))
    assert [resumed.step() for _ in range(3)] == rows[3:]
    assert torch.equal(resumed.particles.x, whole.particles.x)
    assert rows[-1]["solve_residual"] < 1e-7 and rows[-1]["negative_curvature"] == 0


def shared(updates):
    made = loop()
    rows = [made.step() for _ in range(updates)]
    return rows, made.particles.x, [p.detach() for p in made.model.parameters()], processes.world_size()


def test_several_processes_are_one():
    rows, x, parameters, _ = shared(4)
    for other, y, theirs, W in together(2, "tests.loops.test_mean_field:shared", 4):
        assert W == 2
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(theirs, parameters, rtol=1e-12, atol=1e-14)
        assert other[-1]["reward"] == pytest.approx(rows[-1]["reward"].item(), rel=1e-12)


def test_training_raises_the_reward_to_what_quadrature_says():
    """Both parameters of V and the attraction move; the law at the end has the reward that the particles report."""
    made = loop(x=X.repeat(10, 1), lr=0.1, objective=OBJECTIVES["reward"])
    before = mean_field.law(made.model) @ torch.tanh(2 * mean_field.GRID[:, 0])
    rows = [made.step() for _ in range(150)]
    after = (mean_field.law(made.model) @ torch.tanh(2 * mean_field.GRID[:, 0])).item()
    assert after > before + 0.3
    assert rows[-1]["reward"] == pytest.approx(after, abs=4 / 240**0.5)
    assert made.step()["solve_steps"] <= 12


def asymmetric(x, y):
    return x[:, None, 0] * torch.ones_like(y[None, :, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loop(weighted=True), "weighted=False"),
        (lambda: loop(lag=True), "lag=False"),
        (lambda: loop(kernel=MALA(0.1)), "one by one"),
        (lambda: loop(objective=ForwardKL(X)), "measure on points"),
        (lambda: loop(Unrolled, unrolled_steps=2), "use Single"),
        (lambda: loop(solver=print), "solver"),
        (lambda: MeanField(mean_field.Well(), asymmetric, 0.0), "temperature"),
        (lambda: MeanField(mean_field.Well(), lambda x: x), "interaction"),
        (lambda: on(lambda x, y: torch.zeros(len(x))), "one number per pair"),
        (lambda: on(asymmetric), "symmetric"),
    ],
)
def test_what_does_not_fit_is_refused(make, message, as_users_run):
    with pytest.raises(InvalidInputError, match=message):
        make()


def on(interaction):
    problem = MeanField(mean_field.Well(), interaction)
    sgd = torch.optim.SGD(problem.parameters(), lr=0.1)
    return Single(problem, ULA(0.1), Reward(lambda x: x[:, 0]), sgd, particles=X, noise=Noise(0))


def test_underdamped_particles_interact_too():
    made = loop(kernel=Underdamped(0.05))
    assert made.step()["reward"].isfinite()


def test_it_is_not_compiled_and_says_why():
    with pytest.warns(UserWarning, match="residual"):
        made = loop(compiled=True)
    made.step()


def test_advice_on_solves_and_none_where_they_are_sound():
    x = mean_field.GRID[
        torch.multinomial(mean_field.law(mean_field.problem()), 64, generator=torch.Generator().manual_seed(0))
    ]
    sound, short, torn = loop(x=x), loop(x=x, strength=-8.0), loop(x=x, strength=8.0)
    short.solver.steps = 1
    said = [[s for s in advice(made, made.step()) if "solve" in s or "minimum" in s] for made in (sound, short, torn)]
    assert said[0] == []
    assert "did not converge" in said[1][0] and "Use a solver with more steps" in said[1][0]
    assert "attraction outweighs noise" in said[2][0]


def test_looking_leaves_the_next_solve_alone():
    """The noise of Γ is that of the problem's own charges: it falls with n, and nothing of the loop changes."""
    looked, left = loop(x=X.repeat(4, 1)), loop(x=X.repeat(4, 1))
    for made in (looked, left):
        made.step()
    assert signal_to_noise(looked, groups=4) > 0
    assert looked.step() == left.step()
