"""Steps that watch the weights: shares in closed form, the ESS that is kept, what is left as it was, exact averages."""

import copy
import math

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.loops.step_rules.watched_weights import MARGIN, Segment, shorten
from implicit_diffusion.samplers import HMC, MALA, ULA
from tests.helpers.gibbs_loops import F64, along_path, build, path, wave
from tests.helpers.oracles_gibbs import Quartic, line, z_scores

LEAST, N = 0.3, 4000
QUANTILES = torch.special.ndtri((torch.arange(N, dtype=F64) + 0.5) / N)  # of N(0, 1)


def ess(log_weights):
    return (1 / log_weights.softmax(0).square().sum()).item()


def thrown(start, end, log_weights, least=LEAST * N):
    """θ after its step from `start` to `end` was shortened, and what `shorten` returned."""
    theta = nn.Parameter(torch.tensor(end, dtype=F64))
    segment = Segment([theta], [torch.tensor(start, dtype=F64)])
    made = shorten(segment, lambda: log_weights(theta.detach()), least)
    return theta.item(), *made


@pytest.mark.parametrize("size", [2.0, 9.0])
def test_the_share_of_a_gaussian_is_a_closed_form(size):
    """V = (x − θ)²/2 gives weights e^{θ x} and ESS/n = e^{−θ²}."""
    theta, share, evaluations = thrown(0.5, 0.5 + size, lambda theta: (theta - 0.5) * QUANTILES, 0.6 * N)
    aim = 0.6 + MARGIN * (1 - 0.6)
    assert share * size == pytest.approx(math.sqrt(-math.log(aim)), rel=0.01)
    assert theta == 0.5 + share * size and evaluations == 3
    assert thrown(0.5, 1.4, lambda theta: (theta - 0.5) * QUANTILES) == (1.4, 1.0, 1)  # ESS/n is 0.44


def test_what_is_kept_is_the_ess_itself_where_the_weights_are_not_linear():
    """The first prediction, on a straight line to the end, is not enough for √θ x."""
    theta, share, evaluations = thrown(0.0, 9.0, lambda theta: 2 * theta.sqrt() * QUANTILES)
    assert evaluations > 3 and theta == 9 * share
    assert LEAST * N <= ess(2 * math.sqrt(theta) * QUANTILES) < (LEAST + 0.1) * N


def test_weights_that_are_not_finite_halve_the_step():
    theta, share, _ = thrown(0.0, 4.0, lambda theta: theta * QUANTILES * (1.0 if theta < 1.5 else math.nan))
    assert share <= 0.25 and ess(theta * QUANTILES) >= LEAST * N


def test_theta_stays_where_it_is_not_the_step_that_leaves_too_few():
    assert thrown(0.25, 4.0, lambda theta: (theta + 3) * QUANTILES)[:2] == (0.25, 0.0)
    theta, share, evaluations = thrown(0.25, 4.0, lambda theta: (theta != 0.25) * 5 * QUANTILES)  # a jump
    assert (theta, share, evaluations) == (0.25, 0.0, 12)


CASES = {"ula": (ULA(0.02), "paper"), "mala": (MALA(0.1), "paper"), "x-first": (ULA(0.02), "x-first")}


def strides(case, **settings):
    kernel, order = CASES[case]
    loop = build("weighted ula", optimizer=torch.optim.Adam, lr=1.0, order=order, **settings)
    loop.kernel = copy.copy(kernel)
    return loop


def theta_of(loop):
    return torch.cat([p.detach().flatten().clone() for p in loop.parameters])


@pytest.mark.parametrize("case", CASES)
def test_the_optimizers_step_is_made_up_to_the_share_and_no_particles_are_lost(case):
    """From one state: θ_0 + s Δ, the same particles, moments and random numbers as without the rule."""
    watched, free, shares, least = strides(case, min_ess=0.4), strides(case), [], []
    for _ in range(8):
        free.load_state_dict(copy.deepcopy(watched.state_dict()))
        start, before = theta_of(watched), watched.gradient_evaluations
        metrics, other = watched.step(), free.step()
        share = metrics["step_share"]
        torch.testing.assert_close(theta_of(watched), start + share * (theta_of(free) - start), rtol=1e-12, atol=1e-13)
        for a, b in zip(watched.weighted_state, free.weighted_state, strict=True):
            assert a is b is None or case == "x-first" or torch.equal(a, b)
        moments, others = (loop.update.optimizer.state_dict()["state"] for loop in (watched, free))
        assert all(torch.equal(moments[i][k], others[i][k]) for i in moments for k in moments[i])
        assert watched.particles.ess >= 0.4 * watched.n and "step_share" not in other
        shares.append(share)
        least.append(free.particles.ess.item())
        checks = watched.gradient_evaluations - before - (other["gradient_evaluations"] - before)
        assert checks == 0 if case == "mala" else checks >= 1 + 2 * (share < 1)
    assert min(shares) < 1 and min(least) < 0.4 * free.n


def test_steps_that_need_no_shortening_are_the_same_to_the_bit():
    loops = build("weighted ula", min_ess=0.05), build("weighted ula")
    for _ in range(5):
        metrics, _ = (loop.step() for loop in loops)
        assert metrics["step_share"] == 1
    assert torch.equal(theta_of(loops[0]), theta_of(loops[1]))
    assert all(torch.equal(*pair) for pair in zip(*(loop.update.ema.parameters() for loop in loops), strict=True))


def test_a_shortened_run_continues_bit_for_bit(tmp_path):
    whole, second, shares = strides("mala", min_ess=0.4), strides("mala", min_ess=0.4), []
    for k in range(8):
        if k == 4:
            save_state(tmp_path, whole.state_dict())
        shares.append(whole.step()["step_share"])
    second.load_state_dict(load_state(tmp_path))
    assert [second.step()["step_share"] for _ in range(4)] == shares[4:] and min(shares[4:]) < 1
    assert torch.equal(theta_of(whole), theta_of(second))
    assert all(torch.equal(*pair) for pair in zip(*(loop.update.ema.parameters() for loop in (whole, second))))


def test_the_average_is_that_of_shortened_steps():
    loop = strides("mala", min_ess=0.4)  # ema_decay=0.9
    for k in range(6):
        metrics = loop.step()
        average = theta_of(loop) if k == 0 else 0.9 * average + 0.1 * theta_of(loop)
    assert metrics["updates"] == 6
    mean = torch.cat([p.flatten() for p in loop.update.ema.module.parameters()])
    torch.testing.assert_close(mean, average, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [MALA(0.4), pytest.param(HMC(0.6, 2), marks=pytest.mark.slow)], ids=["mala", "hmc"])
def test_averages_are_exact_after_a_leap_that_is_made_in_parts(kernel):
    """The optimizer proposes to be at the end of the path at once, again and again until it arrives."""
    ends = path(1)
    leap = torch.cat([ends, ends[1:].expand(40, -1)])
    truth, start = (line().law(Quartic(tuple(end.tolist())))[1] for end in ends.flip(0))
    rows, alone = [], along_path(kernel, leap, 2000, 0, weighted=True)
    for seed in range(10):
        loop, shares = along_path(kernel, leap, 2000, seed, weighted=True, min_ess=0.4), []
        while shares.count(1.0) < 2 and len(shares) < 20:
            metrics = loop.step()
            shares.append(metrics["step_share"])
        assert 2 <= shares.index(1.0) < 15 and shares.count(1.0) == 2
        metrics = loop.step()
        rows.append(torch.stack([metrics["reward"], metrics["log_z_growth"].exp()]))
    rows, truth = torch.stack(rows), torch.tensor([mean_at_the_end(), math.exp(truth - start)], dtype=F64)
    assert (rows.std(0) / math.sqrt(len(rows)) < torch.tensor([0.02, 0.05]) * truth).all()
    assert (z_scores(rows, truth).abs() < 4).all()
    alone.step()
    assert alone.particles.ess < 0.1 * alone.n


def mean_at_the_end():
    return line().mean(Quartic(tuple(path(1)[-1].tolist())), wave)


def test_an_interrupt_during_the_check_leaves_theta_as_it_was():
    loop = strides("mala", min_ess=0.4)
    loop.step()
    before, moments = theta_of(loop), copy.deepcopy(loop.update.optimizer.state_dict()["state"])

    def stop(module, inputs):
        if not torch.equal(theta_of(loop), before):
            raise KeyboardInterrupt

    loop.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        loop.step()
    assert torch.equal(theta_of(loop), before) and loop.update.updates == 1
    after = loop.update.optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][k], moments[i][k]) for i in moments for k in moments[i])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_ess": 0.5}, r"min_ess must lie in \(0, 0.5\), or None, got 0.5"),
        ({"min_ess": 0.0}, "min_ess must lie in"),
        ({"min_ess": 0.3, "weighted": False}, "min_ess is a share of weighted particles; use weighted=True"),
        ({"min_ess": 0.3, "iterations": 2}, "iterations must be 1, got 2.*min_ess"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        along_path(MALA(0.4), path(2), 20, 0, **{"weighted": True} | settings)
