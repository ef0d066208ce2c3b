"""Rewards: value, sign, and what is refused before any work."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint, FullBackprop
from implicit_diffusion.loops import Queue, Single, Unrolled
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Functional, PathKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import check_potential
from implicit_diffusion.samplers import ULA
from tests.helpers.oracles import affine_chain
from tests.helpers.oracles_gibbs import Banana
from tests.objectives.contract import check

X = torch.linspace(-1, 1, 12).view(3, 4)


def test_is_minus_the_expected_reward():
    r = Reward(lambda x: x.sum(1))
    weights = torch.tensor([0.2, 0.3, 0.5])
    assert r.value(Particles(X)).item() == pytest.approx(-X.sum(1).mean().item())
    value = r.value(Particles(X, weights.log()))
    assert value.item() == pytest.approx(-(weights * X.sum(1)).sum().item())
    assert r.report(value) == ("reward", -value)


BAD = {
    "one number per sample": lambda x: x.mean(),
    "got float": lambda x: 1.0,
    "dtype": lambda x: x.double().sum(1),
    "not differentiable": lambda x: x.detach().sum(1),
    "does not depend": lambda x: torch.ones(len(x), requires_grad=True) * 2,
    "with torch operations throughout, without": lambda x: torch.from_numpy(np.asarray(x.detach()).sum(1)),
    "NaN or infinite": lambda x: (x.sum(1) - 1e3).log(),
    "a gradient that": lambda x: (0 * x.sum(1)).sqrt(),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rewards_are_refused(message):
    with pytest.raises(InvalidInputError, match=message):
        check(Reward(BAD[message]), Particles(X))


F64 = torch.float64
IMAGES = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def module(*layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            *(layer() if callable(layer) and not isinstance(layer, nn.Module) else layer for layer in layers)
        )


def mean(x):
    return x.flatten(1).mean(1)


JUDGE = module(lambda: nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), lambda: nn.Linear(16, 1))
BATCHED = module(nn.Flatten(), lambda: nn.BatchNorm1d(16), lambda: nn.Linear(16, 1))
NO_SLOPE = "has no slope: its gradient is 0 at all 6 samples"
MIXED = "mixes samples: .*each value must depend on its own sample alone"

REFUSED = {
    "256 levels": (NO_SLOPE, lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round().flatten(1).mean(1)),
    "through integers": ("not differentiable", lambda x: (100 * x).int().float().flatten(1).mean(1)),
    "a sign": (NO_SLOPE, lambda x: mean(x.sign())),
    "the place of the largest": ("not differentiable", lambda x: x.flatten(1).argmax(1).float()),
    "steps": (NO_SLOPE, lambda x: torch.floor(3 * mean(x)) + 0 * mean(x)),
    "centred": (MIXED, lambda x: mean(x) - mean(x).mean()),
    "centred by a number": (MIXED, lambda x: mean(x) - mean(x).mean().detach()),
    "normalised": (MIXED, lambda x: (mean(x) - mean(x).mean()) / mean(x).std()),
    "far from zero": (MIXED, lambda x: 1e3 + mean(x) - mean(x).mean().detach()),
    "one number for all": (MIXED, lambda x: x.mean().expand(len(x))),
    "softmax over the batch": (MIXED, lambda x: mean(x).softmax(0)),
    "times a rank": (MIXED, lambda x: mean(x) * mean(x).argsort().argsort()),
    "batch norm": (MIXED, lambda x: BATCHED(x)[:, 0]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rewards_without_slope_or_of_others_are_refused(name):
    message, function = REFUSED[name]
    with pytest.raises(InvalidInputError, match=message):
        check(Reward(function), Particles(IMAGES))


def in_bfloat16(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return JUDGE(x)[:, 0].float()


LEGITIMATE = {
    "a network": lambda x: JUDGE(x)[:, 0],
    "a network in bfloat16": in_bfloat16,
    "a network with batch norm, which Reward puts in eval mode": nn.Sequential(BATCHED, nn.Flatten(0)),
    "flat at all samples but one": lambda x: (mean(x) - mean(IMAGES).sort().values[-2]).relu(),
    "flat at none but one": lambda x: torch.minimum(mean(x), mean(IMAGES).sort().values[1]),
    "saturated": lambda x: torch.tanh(20 * mean(x)),
    "clipped pixels": lambda x: mean(x.clamp(-1, 1)),
    "far from zero": lambda x: 1e4 + mean(x),
    "normalised by itself": lambda x: mean(nn.functional.layer_norm(x, x.shape[1:]) ** 3),
    "rounded with a slope of its own": lambda x: mean(x + ((x * 255).round() / 255 - x).detach()),
    "large and small": lambda x: 1e-20 * mean(x),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_legitimate_rewards_pass_without_a_word(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Reward(LEGITIMATE[name]), Particles(IMAGES))


@pytest.mark.parametrize("name", ["256 levels", "through integers", "a sign", "the place of the largest", "steps"])
def test_black_boxes_have_a_value_though_no_slope(name):
    """What an estimator without ∇R demands; half precision and integers are numbers as well."""
    reward = Reward(REFUSED[name][1])
    reward.check_value(Particles(IMAGES))
    with pytest.raises(InvalidInputError):
        reward.check_slope(Particles(IMAGES))


@pytest.mark.parametrize("name", ["centred", "normalised", "one number for all", "batch norm"])
def test_mixing_shows_without_a_slope(name):
    with pytest.raises(InvalidInputError, match=MIXED):
        Reward(lambda x: REFUSED[name][1](x).detach()).check_value(Particles(IMAGES))


def test_values_of_functionals_need_no_slope():
    step = Functional(lambda x, w: w @ (mean(x) > 0).to(x))
    step.check_value(Particles(IMAGES))
    with pytest.raises(InvalidInputError, match="functional is not differentiable in the samples"):
        step.check_slope(Particles(IMAGES))
    with pytest.raises(InvalidInputError, match="functional is nan on samples of the initial model"):
        Functional(lambda x, w: (w @ mean(x) - 100).log()).check_value(Particles(IMAGES))


def test_a_checked_reward_is_another_one_and_is_called_once():
    calls, particles = [], Particles(IMAGES)
    reward = Reward(lambda x: calls.append(len(x)) or mean(x))
    before = dict(vars(reward))
    check(reward, particles)
    assert vars(reward) == before and len(calls) == 6
    calls.clear()
    check(reward.as_checked(), particles)
    assert vars(reward) == before and len(calls) == 2


def test_a_single_sample_is_enough():
    check(Reward(LEGITIMATE["a network"]), Particles(IMAGES[:1]))


def test_what_is_uncertain_is_a_word():
    with pytest.warns(UserWarning, match="reward is flat: the same value without a slope at all 6 samples"):
        check(Reward(lambda x: (mean(x) - 100).relu()), Particles(IMAGES))
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match=r"reward is random: .*differ by up to"):
        check(Reward(lambda x: mean(x) + torch.randn(len(x), generator=generator)), Particles(IMAGES))
    with pytest.warns(UserWarning, match="functional is flat"):
        check(Functional(lambda x, w: (w @ mean(x) - 100).relu()), Particles(IMAGES))


def test_conditions_go_with_their_samples():
    """A reward of sample and condition mixes nothing, though the probe exchanges samples."""
    which = torch.arange(6)
    check(Reward(lambda x, condition: mean(x) * condition["which"]), Particles(IMAGES, condition={"which": which}))
    with pytest.raises(InvalidInputError, match=MIXED):
        reward = Reward(lambda x, condition: mean(x) + condition["which"].sum())
        check(reward, Particles(IMAGES, condition={"which": which}))


BLACK_BOXES = {
    "centred": (MIXED, lambda x: x[:, 0] - x[:, 0].mean()),
    "ranks": (MIXED, lambda x: x[:, 0].argsort().argsort().to(x)),
    "a comparison with the batch": (MIXED, lambda x: (x[:, 0] > x[:, 0].median()).to(x)),
}
PLANE = torch.linspace(-1, 1, 24, dtype=F64).view(12, 2) ** 3


def single(function, kind=Single, **settings):
    net = Banana()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    return kind(net, ULA(0.1), Reward(function), sgd, particles=PLANE, noise=Noise(0), **settings)


@pytest.mark.parametrize("name", BLACK_BOXES)
def test_black_boxes_judge_each_particle_by_itself(name):
    message, function = BLACK_BOXES[name]
    with pytest.raises(InvalidInputError, match=message):
        single(function)


def test_black_boxes_need_no_slope():
    single(lambda x: (x[:, 0] > 0).to(x)).step()
    with pytest.warns(UserWarning, match="reward is the same at all 12 particles"):
        single(lambda x: (x[:, 0] > 100).to(x))


@pytest.mark.parametrize("mixed", [lambda v: v - v.mean().detach(), lambda v: v - v.mean(), lambda v: v * v.max()])
def test_potentials_are_probed_alike(mixed):
    check_potential(lambda x: x.square().sum(1), PLANE)
    with pytest.raises(InvalidInputError, match="potential mixes particles"):
        check_potential(lambda x: mixed(x.square().sum(1)), PLANE)


class Later:
    """A reward that becomes another one."""

    def __init__(self, first, then):
        self.first, self.then, self.turned = first, then, False

    def __call__(self, x):
        return (self.then if self.turned else self.first)(x)


def queue(function):
    chain, _ = affine_chain(2, 2)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    return Queue(chain, Reward(function) + PathKL(), sgd, batch=4, noise=Noise(0))


LATER = {
    "reward does not depend on the samples any more.*θ was left": lambda x: x.detach().sum(1),
    r"reward must return one number per sample, shape \(4,\)": lambda x: x.sum(),
}


@pytest.mark.parametrize("message", LATER)
def test_rewards_that_change_later_are_blamed(message):
    reward = Later(lambda x: x.sum(1), LATER[message])
    loop = queue(reward)
    for _ in range(5):
        loop.step()
    theta = [p.detach().clone() for p in loop.model.parameters()]
    reward.turned = True
    with pytest.raises(InvalidInputError, match=message):
        loop.step()
    assert all(map(torch.equal, theta, loop.model.parameters()))
    chain, _ = affine_chain(2, 2)
    for estimator in (Adjoint(), FullBackprop()):
        with pytest.raises(InvalidInputError, match=message):
            estimator(chain, Reward(reward), Noise(0), 4)


def test_unrolled_rewards_that_detach_later_are_blamed():
    reward = Later(lambda x: x.sum(1), lambda x: x.detach().sum(1))
    loop = single(reward, Unrolled, unrolled_steps=1)
    loop.step()
    reward.turned = True
    with pytest.raises(InvalidInputError, match="reward does not depend on the samples any more"):
        loop.step()


def test_terms_of_weight_zero_are_told_and_not_followed():
    reward = Later(lambda x: x.sum(1), lambda x: x.detach().sum(1))
    loop = queue(reward)
    loop.objective = loop.objective.with_weight(Reward, 0.0)
    reward.turned = True
    for _ in range(6):
        metrics = loop.step()
    assert metrics["reward"].isfinite()
