"""The plan and the judgement of a run, number by number, on trajectories written down."""

import math

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import (
    Evaluation,
    bound,
    captured,
    judge,
    make_plan,
    mean_and_error,
    possible,
    sharpest,
)
from implicit_diffusion.evaluation.plans import GAINS, Plan

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
    assert Plan.from_state(plan.state_dict()) == plan
    for row, b, beta in zip(plan.rows(), plan.bounds, expected, strict=True):
        best = bound(held, beta, conditional=conditional)
        assert (b.j, b.reward, b.path_kl) == pytest.approx((best.j, best.reward, best.path_kl), rel=1e-9)
        assert row.kl_weight == pytest.approx(beta) and row.reward_gain == pytest.approx(b.reward - plan.reward)
        assert row.reward_gain_in_std == pytest.approx((b.reward - plan.reward) / std)
        assert row.j_gain == pytest.approx(-plan.reward - b.j) and row.j_gain > 0
        assert row.j_gain == pytest.approx(row.reward_gain - beta * row.path_kl, rel=1e-6)
        assert row.j_gain_se == pytest.approx(gain_of_j(held, beta, conditional)[1], rel=1e-9)
        assert row.j_gain == pytest.approx(gain_of_j(held, beta, conditional)[0], rel=1e-9)


def test_a_judgement():
    before = evaluation(rewards())
    after = evaluation(rewards() + 0.7, shift=0.6)
    exported = evaluation(rewards() + 0.4)
    judgement = judge(before, after, exported, BETA)
    best, source = sharpest(before, after, BETA)
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
        assert tuple(getattr(judgement, name)) == pytest.approx(mean_and_error(values), rel=1e-12, abs=1e-15)
    assert judgement.reward_std_before == pytest.approx(before.reward.std().item())
    assert (judgement.bound, judgement.bound_from) == (best, source)
    assert tuple(judgement.captured) == pytest.approx(captured(before, after, BETA))
    assert tuple(judgement.possible) == pytest.approx(possible(before, after, BETA))
    assert not judgement.worse and judgement.doubt is None


@pytest.mark.parametrize(("shift", "by"), [(0.6, "trained"), (3.0, "pretrained")])
def test_the_numbers_of_a_judgement_satisfy_their_formulas(shift, by):
    """J = β·KL − reward, before and after and at the bound; the share is what was gained of what could be."""
    before, after = evaluation(rewards()), evaluation(rewards() + 0.7, shift=shift)  # of one z
    j = judge(before, after, after, BETA)
    assert j.bound_from == by
    assert j.j_before.mean == pytest.approx(-j.reward_before.mean, rel=1e-12)
    assert j.j_after.mean == pytest.approx(BETA * j.path_kl.mean - j.reward_after.mean, rel=1e-12)
    assert j.bound.j == pytest.approx(BETA * j.bound.path_kl - j.bound.reward, rel=1e-12)
    assert j.j_fall.mean == pytest.approx(j.j_before.mean - j.j_after.mean, rel=1e-9)
    assert j.possible.mean == pytest.approx(j.j_before.mean - j.bound.j, rel=1e-9)
    assert j.share.mean == pytest.approx(j.j_fall.mean / j.possible.mean, rel=1e-9)
    assert (j.captured is None) == j.worse == (j.doubt == "rose") == (by == "pretrained")


def test_the_bound_from_a_chain_that_has_learnt():
    """A trained chain whose weights are all but alike: e^w is constant, and J* is its own J."""
    before = evaluation(rewards(memory=0.0))
    reward = rewards(memory=0.0) + 0.5
    after = Evaluation(reward, torch.full_like(reward, 0.2), reward / BETA - 3.0, before.samples)
    judgement = judge(before, after, after, BETA)
    assert judgement.bound.j == pytest.approx(0.2 * BETA - reward.mean().item()) == judgement.j_after.mean
    assert judgement.captured.mean == pytest.approx(1.0)


@pytest.mark.parametrize(("varying", "known"), [(2, False), (4, True)])
def test_a_share_of_what_may_be_nothing_is_not_reported(varying, known):
    """Where rewards vary within two of four starts the possible gain is √3 of its standard errors: too few."""
    reward = torch.zeros(4, 6, dtype=F64)
    reward[:varying] = torch.linspace(-1, 1, 6, dtype=F64)
    same = evaluation(reward)
    judgement = judge(same, same, same, BETA)
    assert (judgement.captured is not None) == known and judgement.doubt == (None if known else "nothing")
    if known:
        assert judgement.captured.mean == 0.0


def test_without_a_path_kl_there_is_no_j():
    held = evaluation(rewards())
    judgement = judge(held, held, held, None)
    assert judgement.j_before is judgement.j_after is judgement.bound is judgement.captured is None
    ruined = Evaluation(held.reward, held.path_kl + math.inf, held.log_ratio + math.nan, held.samples)
    judgement = judge(held, ruined, ruined, BETA)
    assert judgement.possible is judgement.path_kl is judgement.captured is None and judgement.worse
    assert judgement.bound == bound(held, BETA) and judgement.bound_from == "pretrained"


def test_the_weight_for_a_gain_is_the_planned_one_that_comes_nearest():
    plan = make_plan(evaluation(rewards(starts=256, repeats=16, memory=0.0)))
    gains = {row.kl_weight: row.reward_gain_in_std for row in plan.rows()}
    for deviations in (0.3, 1.0, 1.9):
        beta = plan.beta_for_gain(deviations)
        assert all(abs(gains[beta] - deviations) <= abs(gain - deviations) for gain in gains.values())
    with pytest.raises(InvalidInputError, match="the plan was asked for no β"):
        make_plan(evaluation(rewards()), ()).beta_for_gain()
