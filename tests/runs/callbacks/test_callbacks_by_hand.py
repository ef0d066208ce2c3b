"""Callbacks in plain arithmetic, update by update."""

import math

import pytest
import torch

from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.loops import Nested, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.targets import AdaptKL, StopAtKL
from implicit_diffusion.runs.fit import Fit
from tests.helpers.oracles import affine_chain

BETA = 0.8


def driven(**update):
    chain, reward = affine_chain(3, 2)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    loop = Nested(chain, Reward(reward) + BETA * PathKL(), Update(sgd, **update), batch=8, noise=Noise(0))
    return Fit(loop), reward


def test_the_weight_moves_towards_the_target():
    """β ← β exp(rate · (KL/target − 1)), with an excess of at most one either way; without a path KL nothing moves."""
    fit, _ = driven()
    adapt, beta = AdaptKL(target=2.0, rate=0.1), BETA
    for kl, excess in ((1.0, -0.5), (3.0, 0.5), (2.0, 0.0), (50.0, 1.0), (0.0, -1.0)):
        fit.metrics = {"path_kl": torch.tensor(kl)}
        assert adapt(fit) is None
        beta *= math.exp(0.1 * excess)
        assert fit.loop.objective.weight(PathKL) == pytest.approx(beta) and fit.loop.objective.weight(Reward) == 1.0
    fit.metrics = {}
    adapt(fit)
    assert fit.loop.objective.weight(PathKL) == pytest.approx(beta)


def test_the_average_that_stops():
    """The first value, and then nine parts of the old average and one of the new value; stopped at the target."""
    fit, _ = driven()
    stop, average = StopAtKL(target=1.0), None
    for kl in (0.5, 2.0, 0.1, 3.0, 3.0, 3.0):
        fit.metrics = {"path_kl": kl}
        average = kl if average is None else 0.9 * average + 0.1 * kl
        reason = stop(fit)
        assert stop.average == pytest.approx(average)
        assert (reason is not None) == (average >= 1.0)
    assert reason == f"path KL {average:.3g} nats reached the target 1"


def test_held_out_numbers_have_the_weight_of_their_line():
    """Where β was moved before, for the updates to come, the line says which one its numbers were made with."""
    fit, reward = driven()
    fit.loop.step()
    fit.metrics = {"path_kl": 9.0, "kl_weight": 0.5}
    fit.loop.objective = fit.loop.objective.with_weight(PathKL, 1.7)
    fit.loop.update.updates = 2
    HeldOut(reward, Noise(5), every=2, starts=16)(fit)
    formula = 0.5 * fit.metrics["held_out_path_kl"] - fit.metrics["held_out_reward"]
    assert fit.metrics["held_out_objective"] == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_held_out_numbers_are_those_of_an_evaluation(ema):
    """Of the averaged chain where there is one, under the present β, at the updates asked for and at no cost."""
    fit, reward = driven(ema_decay=ema)
    look, seen = HeldOut(reward, Noise(5), every=2, starts=16), []
    for _ in range(4):
        fit.loop.step()
        fit.loop.objective = fit.loop.objective.with_weight(PathKL, 1.7)
        fit.metrics, before = {}, fit.loop.cost()
        look(fit)
        assert fit.loop.cost() == before
        seen.append(bool(fit.metrics))
    assert seen == [False, True, False, True]
    model = fit.loop.model if ema is None else fit.loop.update.ema.module
    held = evaluate(fit.loop.chain.replace(denoiser=model), reward, Noise(5), starts=16)
    for name, values in (
        ("reward", held.reward),
        ("path_kl", held.path_kl),
        ("objective", 1.7 * held.path_kl - held.reward),
    ):
        mean, error = mean_and_error(values)
        assert fit.metrics[f"held_out_{name}"] == pytest.approx(mean, rel=1e-9)
        assert fit.metrics[f"held_out_{name}_se"] == pytest.approx(error, rel=1e-9)
