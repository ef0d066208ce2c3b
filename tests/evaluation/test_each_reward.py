"""Several rewards under one tilt, against the closed form: Gaussian rewards gain Cov(R_j, R)/β each."""

import math
from dataclasses import replace

import pytest
import torch

from implicit_diffusion.evaluation import Evaluation, judge_rewards, make_plan
from implicit_diffusion.evaluation.each_reward import deviation
from implicit_diffusion.evaluation.gains import gain
from implicit_diffusion.evaluation.plans import Plan

F64 = torch.float64
MIX = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.2, 0.5]], dtype=F64)  # R_j = MEAN_j + MIX_j · z within a start
MEAN = torch.tensor([3.0, -1.0, 20.0], dtype=F64)
BETWEEN = torch.tensor([[0.5], [0.2], [-0.3]], dtype=F64)  # what the start adds
COEFFICIENTS = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
BETA = 2.0


def evaluation(shift=(0.0, 0.0), between=0.0, starts=20_000, repeats=16, seed=0):
    """Under a drift that shifts z: log dP_θ/dP_0 = shift · z + ‖shift‖²/2 at the trajectories of θ."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(starts, repeats, 2, generator=g, dtype=F64)
    start = torch.randn(starts, 1, 1, generator=g, dtype=F64) * between
    a = torch.tensor(shift, dtype=F64)
    rewards = MEAN + (z + a) @ MIX.mT + start @ BETWEEN.mT
    kl = torch.full((starts, repeats), a.square().sum().item() / 2, dtype=F64)
    return Evaluation(rewards @ COEFFICIENTS, kl, kl + z @ a, kl[..., None], rewards)


def covariance(between):
    return MIX @ MIX.mT + between**2 * BETWEEN @ BETWEEN.mT


@pytest.mark.parametrize(("conditional", "between"), [(False, 0.0), (False, 1.0), (True, 1.0)])
def test_the_plan_of_each_is_its_covariance_with_the_sum(conditional, between):
    plan = make_plan(evaluation(between=between), [5.0, 4.0], conditional=conditional)
    within = covariance(0.0 if conditional else between)
    expected = within @ COEFFICIENTS
    for j, each in enumerate(plan.rewards):
        assert abs(each.reward - MEAN[j]) < 4 * each.reward_se
        assert each.reward_std == pytest.approx(within[j, j].sqrt().item(), rel=0.01)
        for row, b in enumerate(plan.bounds):
            z = (each.gain[row] - expected[j].item() / b.beta) / each.gain_se[row]
            assert abs(z) < 4
            assert abs(expected[j] / b.beta) > 40 * each.gain_se[row] or abs(expected[j]) < 0.2  # 2 % would show


def test_the_gains_add_up_to_that_of_the_sum():
    held = evaluation(between=0.7, starts=500)
    for conditional in (False, True):
        plan = make_plan(held, asked=3.0, conditional=conditional)
        for row, of_all in enumerate(plan.rows()):
            total = sum(c * each.gain[row] for c, each in zip(COEFFICIENTS.tolist(), plan.rewards))
            assert total == pytest.approx(of_all.reward_gain, rel=1e-9)
    assert Plan.from_state(plan.state_dict()) == plan


def test_a_single_reward_has_no_plans_of_parts():
    held = replace(evaluation(starts=50), rewards=None)
    plan = make_plan(held)
    assert plan.rewards == () and "rewards" not in plan.to_json()
    assert Plan.from_state(plan.state_dict()) == plan
    row = plan.rows()[0]
    assert gain(held, row.kl_weight, conditional=False, of=held.reward)[0] == pytest.approx(row.reward_gain)
    without = make_plan(replace(evaluation(starts=50)), ())  # of no β
    assert [each.gain for each in without.rewards] == [()] * 3


@pytest.mark.parametrize("share", [1.0, 0.7, 0.4])
def test_the_judgement_of_each_is_the_share_of_what_the_best_law_gains(share):
    best = MIX.mT @ COEFFICIENTS / BETA  # the drift of the optimum
    before, after = (evaluation((factor * best).tolist(), starts=4000, repeats=8) for factor in (0.0, share))
    exported = replace(after, rewards=after.rewards + 1)
    expected = covariance(0.0) @ COEFFICIENTS / BETA
    for j, each in enumerate(judge_rewards(before, after, exported, BETA)):
        assert each.gain.mean == pytest.approx(share * expected[j].item(), rel=1e-9)
        assert each.exported.mean == pytest.approx(each.after.mean + 1)
        assert each.expected is not None and abs(each.expected.mean - expected[j]) < 4 * each.expected.error + 1e-9
        assert each.captured is not None and each.captured.error < 0.05
        assert abs(each.captured.mean - share) < 4 * each.captured.error + 1e-9


def test_where_nothing_is_expected_no_share_is_captured():
    before, after = evaluation(starts=200), evaluation((0.3, 0.1), starts=200)
    idle = torch.randn(200, 16, generator=torch.Generator().manual_seed(5), dtype=F64)
    held, moved = (replace(e, rewards=torch.cat([e.rewards, idle[..., None]], -1)) for e in (before, after))
    *_, last = judge_rewards(held, moved, moved, BETA)
    assert last.captured is None and last.gain == (0.0, 0.0)
    for beta in (None, 0.0):
        first, *_ = judge_rewards(before, after, after, beta)
        assert first.expected is None and first.captured is None and first.gain.mean > 0
    wild = replace(after, log_ratio=after.log_ratio * math.nan)
    first, *_ = judge_rewards(before, wild, wild, BETA)  # the bound is then the pretrained chain's
    assert first.expected is not None and first.expected.mean > 0


def test_a_single_reward_is_judged_as_one():
    before, after = (replace(evaluation(s, starts=300), rewards=None) for s in ((0.0, 0.0), (0.5, 0.4)))
    (only,) = judge_rewards(before, after, after, BETA)
    assert only.before.mean == pytest.approx(before.reward.mean().item()) and only.captured is not None


def test_deviations_are_between_all_samples_or_within_a_start():
    values = evaluation(between=1.0, starts=3000).rewards[..., 0]
    assert deviation(values) == pytest.approx(values.flatten().std().item())
    assert deviation(values, conditional=True) == pytest.approx(values.var(1).mean().sqrt().item())
    assert deviation(1024 * values) == 1024 * deviation(values)
