"""Judges of a run: a planted hack is told in time, nothing else is, and the best model by the judge is kept."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import Estimate, mean_and_error
from implicit_diffusion.loops import Nested, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward, WeightedRewards
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.judges import Judges, fell
from implicit_diffusion.runs.fit import fit
from tests.helpers.oracles import affine_chain
from tests.helpers.stops import interrupt_at

UPDATES = 20


def run(judge, *, seed=0, directory=None, more=(), starts=64):
    """A short training of an affine Gaussian chain, and its judge."""
    chain, reward = affine_chain(3, 2)
    optimizer = torch.optim.SGD(chain.denoiser.parameters(), lr=0.02)
    loop = Nested(chain, Reward(reward) + 0.3 * PathKL(), Update(optimizer), batch=64, noise=Noise(seed))
    functions = WeightedRewards({"raised": reward, "judge": lambda x: judge(x, reward)}, (1.0, 0.0))
    said: list[str] = []
    held_out = HeldOut(functions, Noise(seed).stream(1), every=2, starts=starts)
    judges = Judges(held_out, say=said.append)
    found = fit(loop, UPDATES, callbacks=[held_out, judges, *more], directory=directory)
    return found, judges, said


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def opposite(x, reward):
    return -reward(x)


def chance(x, reward):
    """As good as random, with the same law whatever the chain."""
    return torch.sin(1e5 * x.sum(1))


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_hack_is_told_once_before_half_of_the_updates(seed):
    _, judges, said = run(opposite, seed=seed)
    assert len(said) == 1 and "the judge judge is" in said[0] and said[0].endswith("the reward may be hacked")
    assert judges.warned["judge"] <= UPDATES // 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_judges_that_do_not_fall_are_not_reported(seed):
    for judge in (chance, lambda x, reward: reward(x), lambda x, reward: 0 * reward(x)):
        assert run(judge, seed=seed)[2] == []


def test_each_standard_error_has_a_column_of_its_own_whatever_the_names():
    chain, reward = affine_chain(3, 2)
    loop = Nested(
        chain,
        Reward(reward) + PathKL(),
        Update(torch.optim.SGD(chain.denoiser.parameters(), lr=0.0)),
        batch=2,
        noise=Noise(0),
    )
    functions = {"f": reward, "f_se": lambda x: 2 * reward(x) + 1, "g": lambda x: -reward(x), "g_se": reward}
    held_out = HeldOut(WeightedRewards(functions, (1.0, 1.0, 0.0, 0.0)), Noise(1), every=1, starts=8)
    seen = fit(loop, 1, callbacks=[held_out]).metrics
    assert seen["held_out_reward/f_se"] == pytest.approx(2 * seen["held_out_reward/f"] + 1)
    assert seen["held_out_reward_se/f_se"] == pytest.approx(2 * seen["held_out_reward_se/f"])
    assert seen["held_out_judge/g_se"] == pytest.approx(-seen["held_out_judge/g"])
    assert seen["held_out_judge_se/g_se"] == pytest.approx(seen["held_out_judge_se/g"])
    assert seen["held_out_judge_se/g"] > 0


def test_a_fall_is_four_standard_errors_and_a_tenth_of_a_deviation():
    assert fell(Estimate(-0.41, 0.1), 1.0) and not fell(Estimate(-0.39, 0.1), 1.0)
    assert fell(Estimate(-0.11, 0.001), 1.0) and not fell(Estimate(-0.09, 0.001), 1.0)
    assert not fell(Estimate(0.41, 0.1), 1.0)
    assert not fell(Estimate(0.0, 0.0), 0.0)


def test_chance_alone_is_hardly_ever_a_fall():
    draws = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sum(fell(mean_and_error(row), 1e-9) for row in draws) <= 2
    assert all(fell(mean_and_error(row - 1.5), 1.0) for row in draws[:200])


def test_changes_are_paired_differences():
    found, judges, _ = run(opposite)
    last = judges.held_out.look(found)
    before = judges.held_out.pretrained(found)
    updates, change, error = judges.course["judge"][-1]
    expected = mean_and_error(before.reward.double() - last.reward.double())
    assert (updates, change, error) == (UPDATES, pytest.approx(expected.mean), pytest.approx(expected.error))
    assert len(judges.course["judge"]) == UPDATES // 2


def test_the_best_model_is_kept_and_put_back(tmp_path):
    seen = {}
    found, judges, _ = run(
        opposite, directory=RunDirectory(tmp_path), more=[lambda fit: seen.update({fit.updates: weights(fit.model)})]
    )
    best = judges.best_update("judge")
    assert best == 2  # it only falls
    judges.put_back_best(found)
    assert torch.equal(weights(found.model), seen[best]) and found.kept["updates"] == best


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path):
    whole, judged, _ = run(opposite, directory=RunDirectory(tmp_path / "whole"))
    place = RunDirectory(tmp_path / "parts")
    assert run(opposite, directory=place, more=[interrupt_at(7)])[0].stopped == "interrupted"
    again, resumed, _ = run(opposite, directory=place)
    assert resumed.state_dict() == judged.state_dict()
    for found, judges in ((whole, judged), (again, resumed)):
        judges.put_back_best(found)
    assert torch.equal(weights(whole.model), weights(again.model))


def test_judges_that_nobody_can_ask_are_refused():
    _, reward = affine_chain(3, 2)
    with pytest.raises(InvalidInputError, match="coefficient 0"):
        Judges(HeldOut(reward, Noise(0)))
    with pytest.raises(InvalidInputError, match="at least 2 starts"):
        Judges(HeldOut(WeightedRewards({"a": reward, "b": reward}, (1.0, 0.0)), Noise(0), starts=1))
