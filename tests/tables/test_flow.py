"""The memoryless flow: its rows against diffusers' SDE-DPM-Solver++ and the SDE, its law and its memory exactly."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import memory_of_start
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.flow import is_flow, memoryless_flow
from implicit_diffusion.tables.scheduler import read_table

F64 = torch.float64
MEAN, VARIANCE = 1.3, 0.4
SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
]


def gaussian(scheduler, mean=MEAN, variance=VARIANCE):
    return GaussianDenoiser.from_scheduler(torch.tensor([mean], dtype=F64), variance, scheduler)


def law(table, denoiser):
    """Mean and variance of x_N, and Cov(x_0, x_N), for x_0 ~ N(0, σ_0²): u = p x + q is affine, and so is every row."""
    q = denoiser(torch.zeros(len(table), 1, dtype=F64), table.t).flatten()
    p = denoiser(table.m[:, None], table.t).flatten() - q
    factors, shifts = (table.a + table.b * p).tolist(), (table.b * q).tolist()
    mean, variance, covariance = 0.0, table.initial_std**2, table.initial_std**2
    for factor, shift, s in zip(factors, shifts, table.s.tolist()):
        mean, variance, covariance = factor * mean + shift, factor**2 * variance + s**2, factor * covariance
    return mean, variance, covariance


def slope(x, y):
    x, y = (torch.tensor(v, dtype=F64).log() for v in (x, y))
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


def test_the_flow_prediction_is_the_expected_noise_minus_data():
    """E[ε − X | x] by regression on 10⁶ draws; standard error below 2e−3."""
    draws = torch.Generator().manual_seed(0)
    data = MEAN + VARIANCE**0.5 * torch.randn(10**6, generator=draws, dtype=F64)
    noise = torch.randn(10**6, generator=draws, dtype=F64)
    x = 0.3 * data + 0.7 * noise
    covariance = torch.cov(torch.stack([noise - data, x]))
    for at in (-1.0, 2.0):
        expected = (noise - data).mean() + covariance[0, 1] / covariance[1, 1] * (at - x.mean())
        found = gaussian(SCHEDULERS[0])(torch.tensor([[at]], dtype=F64), torch.tensor([700.0]))
        assert found.item() == pytest.approx(expected.item(), abs=8e-3)


def test_the_rows_are_those_of_sde_dpm_solver():
    """`DPMSolverMultistepScheduler`, first order, flow prediction, made to stand on the same noise levels."""
    flow = FlowMatchEulerDiscreteScheduler(shift=2.0)
    table = memoryless_flow(flow, 12)
    solver = DPMSolverMultistepScheduler(
        solver_order=1,
        algorithm_type="sde-dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    flow.set_timesteps(12, sigmas=[1 - k / 12 for k in range(12)])
    solver.set_timesteps(12)
    solver.sigmas = flow.sigmas.double()
    draws = torch.Generator().manual_seed(1)
    for k in range(1, 12):  # at σ = 1 the solver divides by α = 0
        x, u, xi = (torch.randn(2, 3, 4, 4, generator=draws).double() for _ in range(3))
        solver._step_index = k
        y = solver.step(u, solver.timesteps[k], x, variance_noise=xi, return_dict=False)[0]
        torch.testing.assert_close(y, table.a[k] * x + table.b[k] * u + table.s[k] * xi, rtol=0, atol=2e-6)


def test_small_rows_are_euler_maruyama_of_the_memoryless_sde():
    """x' − x = (2v − x/τ) h + √(2(1 − τ)/τ · h) ξ with v = −u, up to O(h) in each rate."""
    errors = []
    for n in (200, 400, 800):
        table = memoryless_flow(SCHEDULERS[0], n)
        k = n // 3
        tau, h = 1 - table.t[k] / 1000, table.h[k]
        drift_x, drift_u = (table.a[k] - 1) / h, table.b[k] / h
        noise = table.s[k] ** 2 / h
        errors.append([drift_x + 1 / tau, drift_u + 2, noise - 2 * (1 - tau) / tau])
    errors = torch.stack([torch.stack(e) for e in errors]).abs()
    torch.testing.assert_close(errors[:-1] / errors[1:], torch.full((2, 3), 2.0, dtype=F64), rtol=0.03, atol=0)
    assert errors[-1].max() < 0.05


def test_the_first_row_forgets_and_the_last_returns_the_predicted_data():
    for scheduler in SCHEDULERS:
        table = memoryless_flow(scheduler, 8)
        assert table.t[0] == 1000 and table.a[0] == -table.b[0]
        assert table.s[-1] == 0 and table.a[-1] == 1
        assert table.b[-1].item() == pytest.approx(-table.t[-1].item() / 1000, rel=1e-6)
        assert table.noiseless() == (7,)
        assert table.h.sum().item() == pytest.approx(1.0)
        assert table.initial_std == 1.0 and (table.m == 1).all()


def test_levels_are_even_before_the_schedulers_shift():
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    table = memoryless_flow(flow, 9)
    even = 1 - torch.arange(9, dtype=F64) / 9
    torch.testing.assert_close(table.t / 1000, 3 * even / (1 + 2 * even), rtol=1e-6, atol=0)
    assert table.name == "memoryless flow, 9 steps, shift=3"
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    shift = torch.tensor(1.15, dtype=F64).exp()
    torch.testing.assert_close(
        memoryless_flow(dynamic, 9, mu=1.15).t / 1000, shift * even / (1 + (shift - 1) * even), rtol=1e-6, atol=0
    )
    before = flow.sigmas.clone()
    memoryless_flow(flow, 4)
    assert torch.equal(flow.sigmas, before)


def test_every_row_but_the_last_has_noise_to_steer_by():
    """s/|b| of the weakest row; diffusers' own levels (the last but one at 1/T) would leave some thousandths."""
    for n in (4, 10, 50):
        table = memoryless_flow(FlowMatchEulerDiscreteScheduler(), n)
        assert (table.s / table.b.abs())[:-1].min() > 0.5


@pytest.mark.parametrize("scheduler", SCHEDULERS[:2], ids=["uniform", "shifted"])
def test_the_law_converges_at_first_order(scheduler):
    steps = [100, 200, 400, 800]
    laws = [law(memoryless_flow(scheduler, n), gaussian(scheduler)) for n in steps]
    variance_error = [abs(variance - VARIANCE) for _, variance, _ in laws]
    assert slope(steps, variance_error) == pytest.approx(-1, abs=0.1)
    assert variance_error[-1] < 0.02 * VARIANCE
    assert max(abs(mean - MEAN) for mean, _, _ in laws) < 1e-6  # posterior steps keep the mean at every N


def test_memory_vanishes_and_the_deterministic_flows_does_not():
    """With the exact network the first row forgets x_0 entirely; the ODE maps x_0 to μ + √v x_0."""
    scheduler = SCHEDULERS[0]
    for n in (1, 5, 50):
        assert abs(law(memoryless_flow(scheduler, n), gaussian(scheduler))[2]) < 1e-12
    for n in (50, 400):
        assert law(read_table(scheduler, n), gaussian(scheduler))[2] == pytest.approx(VARIANCE**0.5, rel=0.1)


class Leaky(nn.Module):
    """A network that predicts data correlated with pure noise, as no exact one does: x̂ + ε x."""

    def __init__(self, exact, leak):
        super().__init__()
        self.exact, self.leak = exact, leak

    def forward(self, x, t):
        return self.exact(x, t) - self.leak * x


def test_memory_of_an_inexact_network_vanishes_with_n():
    scheduler = SCHEDULERS[0]
    steps = [20, 40, 80, 160]
    covariances = [abs(law(memoryless_flow(scheduler, n), Leaky(gaussian(scheduler), 0.3))[2]) for n in steps]
    assert slope(steps, covariances) < -0.9
    assert covariances[-1] < 0.01


def test_memory_as_a_run_measures_it():
    scheduler = SCHEDULERS[0]
    denoiser = gaussian(scheduler)
    rewards = []
    for table in (memoryless_flow(scheduler, 10), read_table(scheduler, 10)):
        chain, noise = Chain(denoiser, table, (1,)), Noise(0)
        x = chain.initial(noise, 400).repeat_interleave(8, 0)
        with torch.no_grad():
            for _, _, state in chain.walk(x, noise):
                x = state[0]
        rewards.append(x.unflatten(0, (400, 8))[..., 0])
    (forgetful, error), (remembering, _) = (memory_of_start(r) for r in rewards)
    assert abs(forgetful) < 4 * error < 0.2
    assert remembering > 0.99


@pytest.mark.parametrize(
    ("scheduler", "num_steps", "message"),
    [
        (DDPMScheduler(), 5, "got DDPMScheduler; the memoryless chain of a diffusion model is DDPM"),
        (FlowMatchEulerDiscreteScheduler(), 0, "num_steps"),
        (FlowMatchEulerDiscreteScheduler(), 1001, "at most the 1000 timesteps"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 5, "invert_sigmas=False"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 5, "mu="),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), 1, "must fall from at most 1 to 0"),
    ],
)
def test_what_is_refused(scheduler, num_steps, message):
    with pytest.raises(InvalidInputError, match=message):
        memoryless_flow(scheduler, num_steps)


def test_which_schedulers_are_a_flows():
    assert is_flow(FlowMatchEulerDiscreteScheduler())
    assert is_flow(DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    assert not is_flow(DPMSolverMultistepScheduler())
    assert not is_flow(DDPMScheduler())


def test_the_tilted_law_is_the_optimum():
    """Data N(μ, v), reward R = x: the tilted law is N(μ + v/β, v), J falls by v/2β, and the chain gets there.

    Its network is the one of data N(μ + δ, v), which differs from u by a constant on every row, so that reward and path
    KL are G δ and K δ²/2 in closed form. (The last row has no noise and keeps u.) The optimum over δ has δ = G/Kβ and
    gains G²/2Kβ; memorylessness is G → 1 and K → 1/v.
    """
    scheduler, steps, errors = SCHEDULERS[0], [50, 100, 200, 400], []
    shifted = gaussian(scheduler, mean=MEAN + 1)
    for n in steps:
        table, x = memoryless_flow(scheduler, n), torch.zeros(n, 1, dtype=F64)
        u, slope_of_u = (gaussian(scheduler)(y, table.t).flatten() for y in (x, x + 1))
        change = (table.b * (shifted(x, table.t).flatten() - u)).detach()[:-1]
        factors = (table.a + table.b * (slope_of_u - u)).detach()
        onward = factors.flip(0).cumprod(0).flip(0)[1:]
        G, K = (onward * change).sum(), (change / table.s[:-1]).square().sum()
        errors.append([abs(G / K - VARIANCE).item(), abs(G**2 / K - VARIANCE).item()])
    for column in zip(*errors):
        assert slope(steps, column) == pytest.approx(-1, abs=0.15)
        assert column[-1] < 0.03 * VARIANCE
