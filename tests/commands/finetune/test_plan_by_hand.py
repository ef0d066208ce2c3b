"""The plan and the judgement of a run, number by number, on trajectories written down."""

import math

import pytest
import torch

from implicit_diffusion.commands.finetune.judging import judge
from implicit_diffusion.commands.finetune.plan import GAINS, make_plan
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.bounds import bound, captured, possible, sharpest
from implicit_diffusion.evaluation.chains import mean_and_error

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


def gain_of_j(held, beta, conditional):
    """−E R − J*, start by start: the jackknife of the log-mean-exp, or the influence of a start on that of all."""
    w = held.reward / beta
    if conditional:
        n = w.shape[1]
        left = torch.stack([w[:, [j for j in range(n) if j != i]].logsumexp(1) - math.log(n - 1) for i in range(n)])
        value = n * (w.logsumexp(1) - math.log(n)) - (n - 1) * left.mean(0)
    else:
        total = w.logsumexp((0, 1)) - math.log(w.numel())
        value = total + ((w - total).exp() - 1).mean(1)
    return mean_and_error(beta * value - held.reward.mean(1))


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
        assert row["j_gain_se"] == pytest.approx(gain_of_j(held, beta, conditional)[1], rel=1e-9)
        assert row["j_gain"] == pytest.approx(gain_of_j(held, beta, conditional)[0], rel=1e-9)


def test_a_judgement():
    before = evaluation(rewards())
    after = evaluation(rewards() + 0.7, shift=0.6)
    exported = evaluation(rewards() + 0.4)
    found = judge(before, after, exported, BETA)
    numbers, (best, told) = found.summary, sharpest(before, after, BETA)
    pairs = {
        "reward_before": before.reward,
        "reward_after": after.reward,
        "reward_gain": after.reward - before.reward,
        "reward_exported": exported.reward,
        "exported_less_after": exported.reward - after.reward,
        "path_kl": after.path_kl,
        "j_before": -before.reward,
        "j_after": BETA * after.path_kl - after.reward,
        "j_fall": after.reward - before.reward - BETA * after.path_kl,
    }
    for name, values in pairs.items():
        mean, error = mean_and_error(values)
        assert (numbers[name], numbers[f"{name}_se"]) == pytest.approx((mean, error), rel=1e-12, abs=1e-15)
    assert numbers["reward_std_before"] == pytest.approx(before.reward.std().item())
    assert (numbers["j_bound"], numbers["j_bound_se"], numbers["j_bound_from"]) == (best.j, best.j_se, told)
    assert found.bound == best
    assert (numbers["captured"], numbers["captured_se"]) == pytest.approx(captured(before, after, BETA))
    assert (numbers["j_possible"], numbers["j_possible_se"]) == pytest.approx(possible(before, after, BETA))


@pytest.mark.parametrize(("shift", "by"), [(0.6, "trained"), (3.0, "pretrained")])
def test_the_numbers_of_a_judgement_satisfy_their_formulas(shift, by):
    """J = β·KL − reward, before and after and at the bound; the share is what was gained of what could be."""
    before, after = evaluation(rewards()), evaluation(rewards() + 0.7, shift=shift)  # of one z
    found = judge(before, after, after, BETA)
    s, best = found.summary, found.bound
    assert s["j_bound_from"] == by
    assert s["j_before"] == pytest.approx(-s["reward_before"], rel=1e-12)
    assert s["j_after"] == pytest.approx(BETA * s["path_kl"] - s["reward_after"], rel=1e-12)
    assert best.j == pytest.approx(BETA * best.path_kl - best.reward, rel=1e-12)
    assert s["j_fall"] == pytest.approx(s["j_before"] - s["j_after"], rel=1e-9)
    assert s["j_possible"] == pytest.approx(s["j_before"] - s["j_bound"], rel=1e-9)
    if s["captured"] is not None:
        assert s["captured"] == pytest.approx(s["j_fall"] / s["j_possible"], rel=1e-9)


def test_the_bound_is_told_by_a_chain_that_has_learnt():
    """A trained chain whose weights are all but alike: e^w is constant, and J* is its own J."""
    before = evaluation(rewards(memory=0.0))
    reward = rewards(memory=0.0) + 0.5
    after = Evaluation(reward, torch.full_like(reward, 0.2), reward / BETA - 3.0, before.samples)
    numbers = judge(before, after, after, BETA).summary
    assert numbers["j_bound"] == pytest.approx(0.2 * BETA - reward.mean().item()) == numbers["j_after"]
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
    assert numbers["j_possible"] is numbers["path_kl"] is numbers["captured"] is None
    assert numbers["j_bound"] == bound(held, BETA).j and numbers["j_bound_from"] == "pretrained"
