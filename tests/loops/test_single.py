"""The loops over particles: exact weights though θ moves, the two orders by hand, states that continue bit for bit."""

import copy
import math

import numpy as np
import pytest
import torch

from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.loops import Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Functional, ReverseKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import energy_of
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped, draws
from implicit_diffusion.samplers.weighted_state import WeightedState, log_mean_exp, resample
from tests.helpers.gibbs_loops import BUILDS, F64, along_path, build, path, wave
from tests.helpers.oracles_gibbs import Banana, Harmonic, Location, Quartic, estimate, line, z_scores

KERNELS = {"ula": ULA(0.12), "mala": MALA(0.4), "hmc": HMC(0.6, 2)}
STEPS = 12


def replicates(kernel, count=40, n=1000, **settings):
    """E φ and Ẑ/Z_0 at the last θ of the path, and whether particles were resampled on the way."""
    thetas, rows, resampled = path(STEPS), [], False
    start = line().law(Quartic(tuple(thetas[0].tolist())))[1]
    for seed in range(count):
        loop = along_path(kernel, thetas, n, seed, **settings)
        for _ in range(STEPS + 1):
            metrics = loop.step()
            resampled |= loop.weighted_state.log_z != 0
        growth = metrics.get("log_z_growth", torch.zeros(()))
        rows.append(torch.stack([metrics["reward"], growth.exp()]))
    return torch.stack(rows), line().law(Quartic(tuple(thetas[-1].tolist())))[1] - start, bool(resampled)


def expected(spacing=0.1):
    return line(spacing).mean(Quartic(tuple(path(STEPS)[-1].tolist())), wave)


@pytest.mark.parametrize("order", ["paper", pytest.param("x-first", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ula", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mala", "hmc"))])
def test_weighted_averages_are_exact_though_theta_moves(name, order):
    """At coarse h and far from equilibrium; E Ẑ = Z even with resampling. Without weights the mean is visibly off."""
    rows, log_ratio, resampled = replicates(KERNELS[name], weighted=True, order=order)
    truth = torch.tensor([expected(), math.exp(log_ratio)], dtype=F64)
    assert abs(expected(0.05) - expected()) < 1e-9  # the quadrature's own error
    assert (rows.std(0) / math.sqrt(len(rows)) < torch.tensor([0.005, 0.02]) * truth).all()
    assert (z_scores(rows, truth).abs() < 4).all()
    assert resampled or name == "hmc"  # which mixes faster than θ moves


@pytest.mark.parametrize("name", ["ula", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mala", "hmc"))])
def test_unweighted_particles_lag(name):
    rows, _, _ = replicates(KERNELS[name], count=10)
    assert z_scores(rows[:, :1], torch.tensor([expected()])).abs() > 10


def test_resampling_keeps_the_weighted_law_and_log_z():
    """E over the uniform of the resampled mean is the weighted mean, exactly; what is left carries log Z."""
    n, generator = 50, torch.Generator().manual_seed(0)
    x, a = torch.randn(n, 1, generator=generator, dtype=F64), 2 * torch.randn(n, generator=generator, dtype=F64)
    zero = torch.zeros((), dtype=F64)
    weighted_state = WeightedState(x, None, a, zero + 0.7, x, a, zero, zero)
    here, means = Energy(x[:, 0] ** 2, 2 * x), []
    for u in (torch.arange(1000, dtype=F64) + 0.5) / 1000:
        taken, there = resample(weighted_state, here, u)
        assert torch.equal(there.value, taken.x[:, 0] ** 2) and torch.equal(there.grad, 2 * taken.x)
        assert (taken.log_weights == 0).all()
        means.append(taken.x.mean())
    assert torch.stack(means).mean().item() == pytest.approx((a.softmax(0) @ x[:, 0]).item(), abs=2e-3)
    assert taken.log_z.item() == pytest.approx(0.7 + log_mean_exp(a).item())
    even = weighted_state._replace(log_weights=a / 100)  # nothing is due
    taken, there = resample(even, here, zero)
    assert torch.equal(taken.x, x) and torch.equal(taken.log_weights, a / 100) and taken.log_z == 0.7


@pytest.mark.parametrize("order", ["paper", "x-first"])
def test_one_iteration_by_hand(order):
    """F = −E sin x, V = (x − θ)²/2: Γ = Cov(−sin x, x − θ), at the old particles or at the new ones."""
    x, theta = torch.randn(30, 1, generator=torch.Generator().manual_seed(3), dtype=F64), torch.tensor([0.4], dtype=F64)
    potential = Location(theta)
    loop = Single(
        potential, ULA(0.2), Reward(lambda x: x.sin().sum(1)), torch.optim.SGD(potential.parameters(), lr=0.1),
        particles=x, noise=Noise(3), order=order,
    )  # fmt: skip
    xi = loop._draws(0)[0]
    metrics = loop.step()
    moved = x - 0.2 * (x - theta) + math.sqrt(0.4) * xi
    at = x if order == "paper" else moved
    sine, n = at.sin(), len(at)
    gamma = -((at - at.mean()) * (sine - sine.mean())).sum(0) / (n - 1)
    torch.testing.assert_close(loop.weighted_state.x, moved, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(potential.theta.data, theta - 0.1 * gamma, rtol=1e-12, atol=1e-13)
    assert metrics["reward"].item() == pytest.approx(sine.mean().item())
    assert metrics["gradient_evaluations"] == (2 if order == "paper" else 3)
    assert metrics["updates"] == 1 and metrics["lr"] == 0.1


def test_gamma_of_the_loop_is_that_of_the_estimator():
    loop = build("weighted ula", optimizer=torch.optim.SGD, lr=1e-3)
    for _ in range(5):
        loop.step()
    theta = torch.cat([p.detach().flatten().clone() for p in loop.parameters])
    w = loop.weighted_state
    logs = w.log_weights + w.forward_part - loop.kernel.backward_part(w.previous, w.x, energy_of(loop.model, w.x), w.h)
    seed_points = loop._points(5)
    loop._points = lambda k: seed_points
    fixed = 1.0 * loop.objective
    for (_, term), y in zip(fixed.terms, seed_points, strict=True):
        term.draw = lambda generator, y=y: y
    gamma = estimate(loop.model, fixed, w.x, logs)
    loop.step()
    after = torch.cat([p.detach().flatten() for p in loop.parameters])
    torch.testing.assert_close(after, theta - 1e-3 * gamma, rtol=1e-10, atol=1e-12)


def test_exact_start_and_log_z_of_a_mixture():
    from implicit_diffusion.potentials import GaussianMixture

    mixture = GaussianMixture(torch.tensor([[-1.0], [2.0]], dtype=F64), std=0.5)
    data = torch.randn(20, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    sgd = torch.optim.SGD(mixture.parameters(), lr=0.0)
    loop = Single(mixture, ULA(0.05), ForwardKL(data), sgd, particles=400, noise=Noise(0), weighted=True)
    torch.testing.assert_close(loop.particles.x, mixture.sample(400, Noise(0), 2, 0))
    metrics = loop.step()
    assert metrics["log_z"].item() == pytest.approx(mixture.log_z) and metrics["ess"].item() == pytest.approx(400)
    assert metrics["nll"].item() == pytest.approx(mixture(data).mean().item() + mixture.log_z)
    assert metrics["objective"] == metrics["nll"]


def test_metrics_report_terms_and_leave_out_what_is_unknown():
    metrics = build("ula").step()
    assert {"reward", "kl_to_initial", "grad_norm", "lr", "updates", "gradient_evaluations"} <= metrics.keys()
    assert "nll" not in metrics and "objective" not in metrics  # log Z is not known without weights
    loop = build("weighted mala")
    metrics = loop.step()
    assert {"ess", "log_z_growth", "acceptance"} <= metrics.keys() and not {
        "nll",
        "objective",
        "log_z",
    } & metrics.keys()
    loop.refresh(Particles(loop.particles.x, log_z=torch.tensor(0.7, dtype=F64)))
    metrics = loop.step()
    assert {"nll", "objective", "log_z"} <= metrics.keys()
    total = -metrics["reward"] + 0.3 * metrics["nll"] + 0.1 * metrics["kl_to_initial"]
    torch.testing.assert_close(metrics["objective"], total)


def trained(loop):
    return torch.cat([p.detach().flatten().clone() for p in loop.model.parameters()])


@pytest.mark.parametrize("name", BUILDS)
def test_state_continues_bit_for_bit_through_a_file(name, tmp_path):
    whole = build(name)
    for k in range(17):
        if k == 8:
            save_state(tmp_path, whole.state_dict())
        expected = whole.step()
    second = build(name)
    second.load_state_dict(load_state(tmp_path))
    for _ in range(9):
        metrics = second.step()
    assert torch.equal(trained(whole), trained(second))
    for a, b in zip(whole.weighted_state, second.weighted_state, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert metrics.keys() == expected.keys() and all(metrics[k] == expected[k] for k in metrics)
    assert second.gradient_evaluations == whole.gradient_evaluations and second.iteration == 17


@pytest.mark.parametrize("name", ["weighted mala", "weighted ula", "nested, persistent", "underdamped", "unrolled"])
def test_blocks_of_noise_do_not_change_with_where_a_run_resumes(name, monkeypatch):
    monkeypatch.setattr(draws, "BLOCK", 5 * 64 * 2)  # five iterations to a block
    whole, second = build(name), build(name)
    for _ in range(7):
        whole.step()
    second.load_state_dict(copy.deepcopy(whole.state_dict()))  # torch's optimizers share what they load
    for loop in (whole, second):
        for _ in range(6):
            loop.step()
    assert torch.equal(whole.weighted_state.x, second.weighted_state.x) and torch.equal(trained(whole), trained(second))


def test_a_loop_that_loads_a_state_under_other_noise_forgets_what_it_drew():
    loop, other = build("ula"), build("ula", seed=1)
    loop.step()
    loop.noise = other.noise
    loop.load_state_dict(other.state_dict())
    assert torch.equal(loop._draws(0)[0], other._draws(0)[0])


@pytest.mark.parametrize("name", ["ula", "weighted ula", "x-first", "underdamped", "nested", "unrolled"])
def test_an_explosion_stops_before_the_update(name):
    loop = build(name, optimizer=torch.optim.SGD, lr=1e-3)
    loop.step()
    loop.kernel.step_size = 1e160
    with pytest.raises(NonFiniteError, match=r"(NaN or infinit|overflow).*θ was left"):
        for _ in range(6):
            before, weighted_state = trained(loop), loop.weighted_state
            loop.step()
    assert torch.equal(trained(loop), before) and trained(loop).isfinite().all()
    assert loop.weighted_state is weighted_state


def test_kernels_that_reject_stay_where_they_are():
    loop = build("weighted mala")
    loop.step()
    loop.kernel.step_size = 1e160
    x = loop.weighted_state.x
    assert loop.step()["acceptance"] == 0 and torch.equal(loop.weighted_state.x, x)


@pytest.mark.parametrize("order", ["paper", "x-first"])
def test_several_iterations_to_a_step_are_the_same_iterations(order):
    """Where an update is the optimizer's step and nothing else."""

    def fresh(**settings):
        potential = Banana()
        x = potential.draw(64, torch.Generator().manual_seed(0))
        sgd = torch.optim.SGD(potential.parameters(), lr=0.05)
        return Single(
            potential, ULA(0.1), Reward(wave), sgd, particles=x, noise=Noise(0), weighted=True, order=order, **settings
        )

    one, many = fresh(), fresh(iterations=4)
    for _ in range(12):
        a = one.step()
    for _ in range(3):
        b = many.step()
    torch.testing.assert_close(trained(many), trained(one), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(many.weighted_state.x, one.weighted_state.x, rtol=1e-10, atol=1e-11)
    assert a["updates"] == b["updates"] == 12 and a["gradient_evaluations"] == b["gradient_evaluations"]
    torch.testing.assert_close(b["log_z_growth"], a["log_z_growth"])
    many.kernel.step_size = 1e160
    before = trained(many)
    with pytest.raises(NonFiniteError):
        for _ in range(3):
            many.step()
    assert trained(many).isfinite().all() and many.update.updates >= 12 and before.isfinite().all()


def test_a_reward_that_turns_nan_is_named():
    loop = build("ula")
    loop.step()
    loop.objective = Reward(lambda x: wave(x) * float("nan")) + 0.1 * ReverseKL(Harmonic())
    before = trained(loop)
    with pytest.raises(NonFiniteError, match="iteration 2: the value of reward is NaN"):
        loop.step()
    assert torch.equal(trained(loop), before)


def test_functionals_and_frozen_parts():
    """Frozen parameters stay; the others move by the functional's Γ."""
    potential = Banana()
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    potential.register_parameter("frozen", frozen)
    x = potential.draw(50, torch.Generator().manual_seed(0))
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    objective = Functional(lambda x, w: (w @ x - 1).square().sum())
    loop = Single(potential, Underdamped(0.1), objective, sgd, particles=x, noise=Noise(0))
    before = potential.theta.detach().clone()
    gamma = estimate(Banana(), objective, x)
    loop.step()
    torch.testing.assert_close(potential.theta.detach(), before - 0.1 * gamma)
    assert (frozen == 1).all()


def test_black_box_rewards_are_allowed():
    loop = build("weighted ula", reward=lambda x: torch.from_numpy(np.sign(x.numpy()[:, 0])))
    assert loop.step()["reward"].abs() <= 1
