"""Several rewards as one: R = Σ_j c_j R_j, whatever the units of each, with each of them to be seen."""

import math

import pytest
import torch

import implicit_diffusion as idf
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.evaluation.chains import weighed
from implicit_diffusion.objectives import Reward, WeightedRewards
from implicit_diffusion.particles import Particles
from tests.helpers.oracles import affine_chain

F64 = torch.float64


def bright(x):
    return x.flatten(1).mean(1)


def wide(x):
    return 1000 * x.flatten(1).std(1)


def first(x):  # a black box, and a rude one
    x.mul_(0)
    return [3.0] * len(x)


FUNCTIONS = {"bright": bright, "wide": wide}


def test_the_weighted_sum_and_its_gradient():
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    together = WeightedRewards(FUNCTIONS, (2.0, -0.5))
    by_hand = 2 * bright(x) - 0.5 * wide(x)
    torch.testing.assert_close(together.of(Particles(x)), by_hand, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(together.value(Particles(x)), x)
    (expected,) = torch.autograd.grad(-by_hand.mean(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    reward, rewards = together.scored(Particles(x.detach()))
    assert torch.equal(rewards, torch.stack([bright(x), wide(x)], 1).detach())
    assert torch.equal(reward, together.total(rewards))
    assert torch.equal(together.total(rewards.unflatten(0, (1, 5)))[0], reward)


def test_a_sum_of_terms_has_the_same_value():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    terms = 2 * Reward(bright, "a") - 0.5 * Reward(wide, "b")
    total = sum(c * term.value(Particles(x)) for c, term in terms.terminal)
    torch.testing.assert_close(WeightedRewards(FUNCTIONS, (2.0, -0.5)).value(Particles(x)), total)


def test_each_gets_its_own_samples_and_the_condition_that_it_takes():
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(2))
    label = torch.arange(4)

    def of_labels(x, condition):
        return bright(x) + condition["label"]

    both = WeightedRewards({"rude": first, "labels": of_labels, "bright": bright})
    assert both.conditional
    _, rewards = both.scored(Particles(x, condition={"label": label}))
    assert torch.equal(rewards, torch.stack([torch.full((4,), 3.0), bright(x) + label, bright(x)], 1))
    with pytest.raises(InvalidInputError, match="come without a condition"):
        both.of(Particles(x))


def test_samples_are_decoded_once_for_all():
    calls = []

    def decoded(function):
        def of_states(x):
            calls.append(len(x))
            return function(2 * x)

        return of_states

    x = torch.ones(3, 2)
    both = WeightedRewards(FUNCTIONS, through=decoded)
    assert torch.equal(both.scored(Particles(x))[1], torch.tensor([[2.0, 0.0]] * 3)) and calls == [3]


def test_a_watched_reward_counts_nothing_and_needs_no_gradient():
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))

    def strange(x):
        return [math.nan] * len(x)

    watched = WeightedRewards({"bright": bright, "strange": strange}, (1.0, 0.0))
    assert torch.equal(watched.of(Particles(x)), bright(x))
    watched.check_slope(Particles(x))
    with pytest.raises(NonFiniteError, match="the reward strange of 4 of 4 samples is NaN"):
        watched.scored(Particles(x))


def test_every_reward_that_counts_needs_a_gradient():
    """Their sum has one: without the part of the black box it would be the gradient of something else."""
    x = Particles(torch.randn(4, 2, generator=torch.Generator().manual_seed(4)))
    with pytest.raises(InvalidInputError, match=r"^detached: reward is not differentiable"):
        WeightedRewards({"bright": bright, "detached": lambda x: bright(x.detach())}).check_slope(x)
    with pytest.raises(InvalidInputError, match=r"^mean: .*one number per sample"):
        WeightedRewards({"bright": bright, "mean": lambda x: x.mean()}).check_value(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one reward"),
        ((FUNCTIONS, (1.0,)), "one for each of"),
        ((FUNCTIONS, (0.0, 0.0)), "must not all be 0"),
        ((FUNCTIONS, (1.0, math.nan)), "coefficient of wide must be"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        WeightedRewards(*arguments)


def test_an_evaluation_keeps_the_rewards_and_is_weighed_again_without_sampling():
    u, _ = affine_chain(4, 2)
    ours = WeightedRewards(FUNCTIONS, (1.0, 2.0))
    sizes = {"starts": 6, "repeats": 3}
    seen = evaluate(u, ours, idf.Noise(3), **sizes)
    for function, values in zip(FUNCTIONS.values(), seen.each_reward):
        assert torch.equal(values, evaluate(u, function, idf.Noise(3), **sizes).reward)
    other = ours.with_coefficients((0.5, -1.0))
    assert torch.equal(weighed(seen, other).reward, evaluate(u, other, idf.Noise(3), **sizes).reward)
    assert torch.equal(weighed(seen, ours).reward, seen.reward)
    single = evaluate(u, bright, idf.Noise(3), **sizes)
    assert single.rewards is None and weighed(single, ours) is single
    (values,) = single.each_reward
    assert values is single.reward
