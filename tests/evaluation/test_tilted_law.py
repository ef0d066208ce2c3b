"""The tilted law by weights, Metropolis–Hastings and sequential Monte Carlo, against closed forms and quadrature."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation, evaluate, metropolis, sequential_monte_carlo, tilted_law
from implicit_diffusion.evaluation.sequential import predicted_ends
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.oracles import affine_chain, riccati, table, tilted_bound

BETA = 0.7
STARTS = ("given", "tilted")
REPLICATES = 400


class Tanh(nn.Module):
    """A drift with two wells, so that nothing is Gaussian."""

    def __init__(self, push=0.0):
        super().__init__()
        self.push = nn.Parameter(torch.tensor(push, dtype=torch.float64))

    def forward(self, x, t):
        return 2.0 * torch.tanh(2 * x) - 0.3 * x + self.push * torch.cos(x + t[:, None])


def step_reward(x):
    """A black box: 1 on the right of 0.3, and what it likes less on the left."""
    return (x[:, 0] > 0.3).to(x.dtype) - 0.2 * (x[:, 0] < -1).to(x.dtype)


@dataclass
class Problem:
    """A chain, its reward, and exact E* x, E* x², and E log Z of the first coordinate, by what is tilted."""

    chain: Chain
    reward: object
    exact: dict


def gaussian():
    """The pretrained affine chain under a quadratic reward."""
    chain, reward = affine_chain(5, 2)
    ref, tab = chain.reference, chain.table
    g, h, v = torch.ones(2).double(), torch.zeros(2).double(), torch.zeros(2).double()
    for k in range(len(tab)):
        alpha = tab.a[k] + tab.b[k] * tab.m[k] * ref.gain[k].detach()
        g, h, v = alpha * g, alpha * h + tab.b[k] * ref.shift[k].detach(), alpha**2 * v + tab.s[k] ** 2
    bounds, exact = tilted_bound(chain, reward, BETA), {}
    for start, spread, bound in zip(STARTS, (g * tab.initial_std, 0 * g), bounds, strict=True):
        variance = v if start == "given" else v + (g * tab.initial_std) ** 2
        stretch = 1 + reward.q * variance / BETA
        mean = (h + reward.p * variance / BETA) / stretch
        square = mean**2 + variance / stretch + (spread / stretch) ** 2
        exact[start] = (mean[0].item(), square[0].item(), -bound / BETA)
    return Problem(chain, reward, exact)


def nonlinear():
    """A chain with two wells, by quadrature on a grid."""
    chain = Chain(Tanh(), table(4), (1,))
    x = torch.linspace(-7, 7, 2001, dtype=torch.float64)[:, None]
    dx, tab = (x[1] - x[0]).item(), chain.table
    tilt = (step_reward(x) / BETA).exp()
    kernels = []
    for k in range(len(tab)):
        u = chain.reference(tab.m[k] * x, tab.t[k].expand(len(x))).detach()
        mean = tab.a[k] * x + tab.b[k] * u
        kernels.append((-((x.T - mean) ** 2) / (2 * tab.s[k] ** 2)).exp() * dx / (tab.s[k] * (2 * torch.pi) ** 0.5))
    z = tilt
    for kernel in reversed(kernels):
        z = kernel @ z if z.ndim == 2 else (kernel @ z[:, None])
    z = z[:, 0]
    start = (-(x[:, 0] ** 2) / (2 * tab.initial_std**2)).exp()
    start, exact = start / start.sum(), {}
    for name, law in (("given", start / z), ("tilted", start)):
        for kernel in kernels:
            law = law @ kernel
        law = law * tilt
        law = law / law.sum()
        log_z = (start * z.log()).sum() if name == "given" else (start * z).sum().log()
        moments = ((law * x[:, 0] ** p).sum().item() for p in (1, 2))
        exact[name] = (*moments, log_z.item())
    return Problem(chain, step_reward, exact)


PROBLEMS = {"gaussian": gaussian(), "nonlinear": nonlinear()}


def controlled(problem):
    """The chain under some other control, whose weights vary."""
    chain = problem.chain
    if isinstance(chain.denoiser, Tanh):
        return chain.replace(denoiser=Tanh(0.4), reference=chain.reference)
    _, gain, shift = riccati(chain, problem.reward, 1.4 * BETA)
    return chain.replace(denoiser=type(chain.denoiser)(gain, shift), reference=chain.reference)


def check(values, exact, resolution):
    """Independent replicates agree with the exact value, and would not if it were off by 2 % of `resolution`."""
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact) < 4 * error, (values.mean(), exact, error)
    assert 4 * error < 0.2 * resolution, (error, resolution)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("control", ["pretrained", "controlled"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_weighted_averages_are_those_of_the_tilted_law(name, control, start):
    problem = PROBLEMS[name]
    chain = problem.chain.pretrained() if control == "pretrained" else controlled(problem)
    repeats = 256
    evaluation = evaluate(chain, problem.reward, Noise(3), starts=REPLICATES, repeats=repeats, chunk=40_000)
    law = tilted_law(evaluation, BETA, start=start)
    mean, square, log_z = problem.exact[start]
    x = evaluation.samples[..., 0]
    bias = 4 / repeats if start == "given" else 0  # of a ratio within a start
    for values, exact in ((x, mean), (x.square(), square)):
        estimate = law.average(values)
        assert abs(estimate.mean - exact) < 4 * estimate.error + bias
        assert 4 * estimate.error < 0.25 * values.std()
    assert abs(law.log_normaliser.mean - log_z) < 4 * law.log_normaliser.error + bias
    assert law.reward.mean / BETA - law.path_kl.mean == pytest.approx(law.log_normaliser.mean, abs=1e-9)
    assert law.average(evaluation.reward) == law.reward
    assert law.trusted and 0.2 < law.effective_share < 1


def test_the_bias_of_a_ratio_falls_like_one_over_its_number():
    """With M of 16 trajectories from each x_0, all blocks of M averaged: M to 2M halves the bias."""
    problem = PROBLEMS["nonlinear"]
    evaluation = evaluate(problem.chain, problem.reward, Noise(4), starts=20_000, repeats=16, chunk=80_000)
    exact, estimates = problem.exact["given"][0], {}
    for m in (2, 4, 8, 16):
        parts = (getattr(evaluation, name) for name in ("reward", "path_kl", "log_ratio", "samples"))
        blocks = Evaluation(*(part.flatten(0, 1).unflatten(0, (-1, m)) for part in parts))
        estimates[m] = (tilted_law(blocks, BETA).weights * blocks.samples[..., 0]).mean(1).view(20_000, -1).mean(1)
    falls = [estimates[m] - estimates[2 * m] for m in (2, 4, 8)]
    for fall, more in itertools.pairwise(falls):
        ratio, error = fall.mean() / more.mean(), (fall - 2 * more).std() / 20_000**0.5 / more.mean().abs()
        assert error < 0.25 and abs(ratio - 2) < 4 * error + 0.4, (ratio, error)  # 1/M² is 4 to one, and dies out
    last = estimates[16] - falls[-1].mean()  # with M = ∞, if the bias is c/M
    assert abs(last.mean() - exact) < 4 * last.std() / 20_000**0.5


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_metropolis_draws_have_the_tilted_law(name, start):
    problem = PROBLEMS[name]
    draws = metropolis(
        controlled(problem), problem.reward, BETA, Noise(5), draws=4000, steps=24, start=start, chunk=4000
    )
    mean, square, log_z = problem.exact[start]
    law = tilted_law(draws.proposals, BETA, start=start)  # of all that was offered
    assert abs(law.log_normaliser.mean - log_z) < 4 * law.log_normaliser.error + (2 / 24 if start == "given" else 0)
    x = draws.x[:, 0]
    for values, exact in ((x, mean), (x.square(), square)):
        assert abs(values.mean() - exact) < 4 * values.std() / len(x) ** 0.5
    assert 0.3 < draws.acceptance < 1 and 1 <= draws.autocorrelation_time < 6
    if name == "gaussian":
        law = stats.norm(mean, (square - mean**2) ** 0.5)
        assert stats.kstest(x.numpy(), law.cdf).pvalue > 1e-4


def test_metropolis_is_the_same_in_any_number_of_steps_at_once():
    problem = PROBLEMS["gaussian"]
    a, b = (metropolis(problem.chain, problem.reward, BETA, Noise(5), draws=6, steps=s, chunk=4) for s in (3, 5))
    assert torch.equal(a.reward, b.reward[:3]) and a.x.shape == (6, 2)


@pytest.mark.parametrize("look_ahead", [True, False])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_sequential_monte_carlo_has_the_tilted_law(name, start, look_ahead):
    problem = PROBLEMS[name]
    made = sequential_monte_carlo(
        controlled(problem) if look_ahead else problem.chain,
        problem.reward,
        BETA,
        Noise(6),
        particles=64,
        populations=REPLICATES,
        start=start,
        look_ahead=look_ahead,
        chunk=40_000,
    )
    mean, square, log_z = problem.exact[start]
    x = made.x[..., 0]
    for values, exact in ((x, mean), (x.square(), square)):
        estimate = made.law.average(values)
        assert abs(estimate.mean - exact) < 4 * estimate.error + 6 / 64
    drawn = made.draws(Noise(9))[:, 0]
    assert abs(drawn.mean() - mean) < 4 * drawn.std() / REPLICATES**0.5 + 6 / 64
    if start == "tilted":  # Ẑ is unbiased, exactly
        check(made.log_normaliser.exp(), torch.tensor(log_z).exp(), torch.tensor(log_z).exp())
    assert made.law.log_normaliser.mean == pytest.approx(made.log_normaliser.mean().item(), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["pretrained", "controlled"])
def test_resampled_particles_keep_the_normaliser(control):
    """A smaller β, where populations are resampled on their way: Ẑ stays unbiased."""
    chain, reward = affine_chain(5, 2)
    beta = 0.25
    exact = torch.tensor(-tilted_bound(chain, reward, beta)[1] / beta).exp()
    if control == "controlled":
        shifts = torch.tensor([[0.5], [-0.5], [0.5], [-0.5], [0.5]])
        pushed = type(chain.denoiser)(chain.denoiser.gain - 0.5, chain.denoiser.shift + shifts)
        chain = chain.replace(denoiser=pushed, reference=chain.reference)
    made = sequential_monte_carlo(
        chain, reward, beta, Noise(7), particles=64, populations=2000, start="tilted", chunk=200_000
    )
    assert sum(made.resampled) > 1000
    check(made.log_normaliser.exp(), exact, exact)


def test_a_predicted_end_is_the_mean_given_the_state():
    """On a chain whose row is the same function of the state: x̂_N is E[x_N|x_k] as far as A x + B u can be."""
    problem = PROBLEMS["gaussian"]
    chain = problem.chain
    fit = predicted_ends(chain, Noise(8))
    tab, last = chain.table, chain.num_steps - 1
    assert fit.a[last] == pytest.approx(tab.a[last].item(), abs=0.15)
    assert fit.b[last] == pytest.approx(tab.b[last].item(), abs=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, r: metropolis(c, r, 0.0, Noise(0), draws=2, steps=2), "beta"),
        (lambda c, r: metropolis(c, r, 1.0, Noise(0), draws=0, steps=2), "draws"),
        (lambda c, r: metropolis(c, r, 1.0, Noise(0), draws=2, steps=2, start="free"), "start"),
        (lambda c, r: sequential_monte_carlo(c, r, 1.0, Noise(0), particles=1), "particles"),
        (lambda c, r: sequential_monte_carlo(c, r, -1.0, Noise(0), particles=2), "beta"),
        (lambda c, r: sequential_monte_carlo(c, r, 1e-310, Noise(0), particles=2), "reward / beta must be finite"),
        (lambda c, r: metropolis(c, r, 1e-310, Noise(0), draws=2, steps=2), "reward / beta must be finite"),
        (lambda c, r: tilted_law(evaluate(c, r, Noise(0), starts=3), 1.0), "2 trajectories per start"),
        (
            lambda c, r: tilted_law(
                evaluate(c, r, Noise(0), starts=3, repeats=2), 1.0, condition=torch.zeros(3).long()
            ),
            "start='tilted'",
        ),
        (
            lambda c, r: tilted_law(
                evaluate(c, r, Noise(0), starts=3), 1.0, start="tilted", condition=torch.zeros(2).long()
            ),
            "3 integers",
        ),
    ],
)
def test_what_has_no_tilted_law_is_refused(call, message, as_users_run):
    problem = PROBLEMS["gaussian"]
    with pytest.raises(InvalidInputError, match=message):
        call(problem.chain, problem.reward)


def test_a_trained_row_without_noise_has_no_weights():
    chain, reward = affine_chain(3, 2, noise=False)
    other = chain.replace(denoiser=type(chain.denoiser)(chain.denoiser.gain + 1, chain.denoiser.shift))
    with pytest.raises(InvalidInputError, match="row 2"):
        metropolis(other, reward, 1.0, Noise(0), draws=2, steps=2)
