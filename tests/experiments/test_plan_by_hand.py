"""The plan and the judgement of a run, number by number, on trajectories written down."""

import math

import pytest
import torch

from implicit_diffusion.experiments.judging import judge
from implicit_diffusion.experiments.plan import GAINS, make_plan
from implicit_diffusion.loops import Evaluation
from implicit_diffusion.loops.bound import bound, captured
from implicit_diffusion.loops.evaluation import mean_and_error

F64 = torch.float64
BETA = 1.3


def evaluation(reward, shift=0.0, seed=0):
    """Rewards, and the likelihood ratio of a drift that shifts a normal number by as much; a single pixel as sample."""
    z = torch.randn(reward.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    kl = torch.full_like(reward, shift**2 / 2)
    return Evaluation(reward, kl, kl + shift * z, torch.zeros(*reward.shape, 1))


def rewards(starts=64, repeats=8, memory=0.5, seed=0):
    """Of variance one within a start, and `memory`² between them."""
    g = torch.Generator().manual_seed(seed)
    own, between = torch.randn(starts, repeats, generator=g, dtype=F64), torch.randn(starts, 1, generator=g, dtype=F64)
    return 3.0 + own + memory * between


@pytest.mark.parametrize("conditional", [False, True])
def test_a_plan(conditional):
    reward = rewards()
    held = evaluation(reward)
    plan = make_plan(held, asked=0.9, conditional=conditional)
    std = (reward.var(1).mean() if conditional else reward.var()).sqrt().item()
    assert plan.reward_std == pytest.approx(std, rel=1e-12) and plan.reward == pytest.approx(reward.mean().item())
    expected = sorted([0.9, *(std / gain for gain in GAINS)], reverse=True)
    assert [b.beta for b in plan.bounds] == pytest.approx(expected)
    for row, b, beta in zip(plan.rows(), plan.bounds, expected, strict=True):
        best = bound(held, beta, conditional=conditional)
        assert (b.j, b.reward, b.path_kl) == pytest.approx((best.j, best.reward, best.path_kl), rel=1e-9)
        assert row["kl_weight"] == pytest.approx(beta) and row["reward_gain"] == pytest.approx(b.reward - plan.reward)
        assert row["reward_gain_in_std"] == pytest.approx((b.reward - plan.reward) / std)
        assert row["j_gain"] == pytest.approx(-plan.reward - b.j) and row["j_gain"] > 0
        assert row["j_gain"] == pytest.approx(row["reward_gain"] - beta * row["path_kl"], rel=1e-6)


def test_a_judgement():
    before = evaluation(rewards())
    after = evaluation(rewards() + 0.7, shift=0.6)
    exported = evaluation(rewards() + 0.4)
    found = judge(before, after, exported, BETA)
    numbers, best = found.summary, bound(after, BETA)
    pairs = {
        "reward_before": before.reward,
        "reward_after": after.reward,
        "reward_gain": after.reward - before.reward,
        "reward_exported": exported.reward,
        "exported_less_after": exported.reward - after.reward,
        "path_kl": after.path_kl,
        "j_before": -before.reward,
        "j_after": BETA * after.log_ratio - after.reward,
    }
    for name, values in pairs.items():
        mean, error = mean_and_error(values)
        assert (numbers[name], numbers[f"{name}_se"]) == pytest.approx((mean, error), rel=1e-12, abs=1e-15)
    assert numbers["reward_std_before"] == pytest.approx(before.reward.std().item())
    if best.effective_samples > bound(before, BETA).effective_samples:
        assert (numbers["j_bound"], numbers["j_bound_se"]) == pytest.approx((best.j, best.j_se))
        assert found.bound == best
    assert (numbers["captured"], numbers["captured_se"]) == pytest.approx(captured(before, after, BETA))


def test_the_bound_is_told_by_a_chain_that_has_learnt():
    """A trained chain whose weights are all but alike: e^w is constant, and J* is its own J."""
    before = evaluation(rewards(memory=0.0))
    reward = rewards(memory=0.0) + 0.5
    after = Evaluation(reward, torch.full_like(reward, 0.2), reward / BETA - 3.0, before.samples)
    numbers = judge(before, after, after, BETA).summary
    assert numbers["j_bound"] == pytest.approx(-3.0 * BETA) == numbers["j_after"]
    assert numbers["captured"] == pytest.approx(1.0)


@pytest.mark.parametrize(("varying", "known"), [(2, False), (4, True)])
def test_a_share_of_what_may_be_nothing_is_not_told(varying, known):
    """Where rewards vary within two of four starts the possible gain is √3 of its standard errors: too few."""
    reward = torch.zeros(4, 6, dtype=F64)
    reward[:varying] = torch.linspace(-1, 1, 6, dtype=F64)
    same = evaluation(reward)
    numbers = judge(same, same, same, BETA).summary
    assert (numbers["captured"] is None) != known and (numbers["captured_unknown"] is None) == known
    if known:
        assert numbers["captured"] == 0.0


def test_without_a_path_kl_there_is_no_j():
    held = evaluation(rewards())
    numbers = judge(held, held, held, None).summary
    assert numbers["j_before"] is numbers["j_after"] is numbers["j_bound"] is numbers["captured"] is None
    ruined = Evaluation(held.reward, held.path_kl + math.inf, held.log_ratio + math.nan, held.samples)
    numbers = judge(held, ruined, ruined, BETA).summary
    assert numbers["j_bound"] is numbers["path_kl"] is numbers["captured"] is None
