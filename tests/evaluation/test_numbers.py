"""What an evaluation, a bound and a diagnostic say, number by number, on trajectories written down."""

import math

import pytest
import torch

from implicit_diffusion.evaluation.bounds import bound
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.loops import Single
from implicit_diffusion.loops.diagnostics import ess_in_time, signal_to_noise
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.samplers import ULA
from tests.helpers.oracles_gibbs import Location

F64 = torch.float64


def evaluation(starts=6, repeats=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    reward, kl, ratio = torch.randn(3, starts, repeats, generator=g, dtype=F64)
    return Evaluation(reward, kl.abs(), ratio, torch.zeros(starts, repeats, 1))


def test_the_objective_is_what_its_path_kl_and_its_reward_make_of_it():
    """β·KL − R, trajectory by trajectory; with the log-ratio for the path KL where that is asked for."""
    made = evaluation()
    torch.testing.assert_close(made.objective(0.7), 0.7 * made.path_kl - made.reward)
    torch.testing.assert_close(made.objective(0.7, control_variate=True), 0.7 * made.log_ratio - made.reward)


@pytest.mark.parametrize("conditional", [True, False])
def test_effective_samples_by_hand(conditional):
    """Within a start, on average over the starts; or of all trajectories together."""
    wild, beta = evaluation(starts=24), 0.7
    held = Evaluation(0.2 * wild.reward, wild.path_kl, 0.2 * wild.log_ratio, wild.samples)
    w = (held.reward / beta - held.log_ratio).exp()
    own = (w.sum(1).square() / w.square().sum(1)).mean() if conditional else w.sum() ** 2 / w.square().sum()
    assert bound(held, beta, conditional=conditional).effective_samples == pytest.approx(own.item(), rel=1e-9)


@pytest.mark.parametrize("batch", [4, None])
def test_signal_to_noise_by_hand(batch):
    """Γ of every group from the closed form, each with the data that the loop would draw in an iteration of its own."""
    theta, data = torch.tensor([0.4, -0.2], dtype=F64), torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    term, potential = ForwardKL(3 * data.double() + 1, batch=batch), Location(theta, 1.5)
    drawn, draw = [], term.draw
    term.draw = lambda generator: drawn.append(draw(generator)) or drawn[-1]
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    loop = Single(potential, ULA(0.1), term, sgd, particles=x, noise=Noise(0))
    drawn.clear()
    ratio_of_loop = signal_to_noise(loop, groups=8)
    gammas = torch.stack([1.5 * (part.mean(0) - y.mean(0)) for part, y in zip(x.chunk(8), drawn, strict=True)])
    ratio = gammas.mean(0).square().sum() / (gammas.var(0).sum() / 8) - 1
    assert ratio_of_loop == pytest.approx(math.sqrt(max(0.0, ratio.item())), rel=1e-9)
    assert batch is None or len({tuple(y.flatten().tolist()) for y in drawn}) == 8


@pytest.mark.parametrize("time", [8, 21, 100])
def test_effective_draws_by_hand(time):
    """Geyer's sums over pairs of autocorrelations, which are sums over lags and do not wrap round."""
    g = torch.Generator().manual_seed(time)
    values = torch.randn(time, 3, generator=g, dtype=F64).cumsum(0) * 0.3 + torch.randn(time, 3, generator=g, dtype=F64)
    centred = values - values.mean()
    covariance = [(centred[: time - k] * centred[k:]).sum(0).mean().item() / time for k in range(time)]
    rho = [c / covariance[0] for c in covariance]
    total = 0.0
    for k in range(0, time - 1, 2):
        pair = rho[k] + rho[k + 1]
        if pair <= 0:
            break
        total += pair
    assert ess_in_time(values) == pytest.approx(time / (2 * total - 1), rel=1e-9)


def test_an_objective_without_terms_that_draw_is_told_alike():
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    potential = Location(torch.zeros(2, dtype=F64))
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    loop = Single(potential, ULA(0.1), Reward(lambda x: x.sum(1)), sgd, particles=x, noise=Noise(0))
    gammas = []
    for part in x.chunk(8):
        reward, slopes = part.sum(1), -part
        gammas.append(((reward - reward.mean())[:, None] * slopes).sum(0) / 4)
    gammas = torch.stack(gammas)
    ratio = gammas.mean(0).square().sum() / (gammas.var(0).sum() / 8) - 1
    assert signal_to_noise(loop) == pytest.approx(math.sqrt(max(0.0, ratio.item())), rel=1e-9)


@pytest.mark.parametrize(("leading", "trusted"), [(4, False), (10, True)])
def test_a_bound_is_trusted_where_half_the_repeats_count(leading, trusted):
    """Of ten trajectories of each start four carry all the weight, or all carry the same."""
    reward = torch.linspace(0, 1, 8, dtype=F64)[:, None].repeat(1, 10)
    reward[:, leading:] -= 200.0
    best = bound(Evaluation(reward, 0 * reward, 0 * reward, reward[..., None]), 1.0)
    assert best.effective_samples == pytest.approx(leading) and best.trusted == trusted
