"""Contrastive bounds of the information gain, against closed forms and quadrature."""

import math

import pytest
import torch

import implicit_diffusion as idf
from implicit_diffusion.design import Gain, bounds, contrastive_bounds, information_gain
from implicit_diffusion.errors import InvalidInputError
from tests.helpers.experiments import F64, Curved, curved_gain, linear_experiment, linear_gain

NOISE = idf.Noise(0)


@pytest.mark.parametrize("contrasts", [1, 5, 40])
def test_the_gain_lies_between_the_bounds(contrasts):
    experiment = linear_experiment(((1.0, 0.5), (0.2, -1.0)), (1.0, 1.5))
    exact = linear_gain(experiment).item()
    gain = information_gain(experiment, NOISE, outcomes=20_000, contrasts=contrasts)
    assert gain.lower.mean < exact + 4 * gain.lower.error and gain.upper.mean > exact - 4 * gain.upper.error
    assert (gain.lower_bounds <= gain.ceiling).all() and gain.ceiling == math.log(contrasts + 1)
    if contrasts == 1:  # far from tight
        assert gain.lower.mean < exact - 20 * gain.lower.error and gain.upper.mean > exact + 20 * gain.upper.error


def test_bounds_of_one_contrast_by_quadrature():
    """Lower: E log 2/(1 + p_1/p_0) over (z, ε, z_1). Upper: E log p_0/p_1 = ξ²/σ²."""
    experiment = linear_experiment(((0.6,),))
    axis = torch.linspace(-6, 6, 61, dtype=F64)
    weights = (-(axis**2) / 2).softmax(0)
    z, epsilon, other = torch.cartesian_prod(axis, axis, axis).T
    y = experiment.outcome(z[:, None], epsilon[:, None])
    own, rest = experiment.log_likelihood(y, z[:, None]), experiment.log_likelihood(y, other[:, None])
    joint = torch.einsum("i,j,k->ijk", weights, weights, weights).flatten()
    exact = joint @ (own - torch.logaddexp(own, rest) + math.log(2))
    gain = information_gain(experiment, NOISE, outcomes=40_000, contrasts=1)
    assert abs(gain.lower.mean - exact.item()) < 4 * gain.lower.error < 0.02
    assert abs(gain.upper.mean - (0.6 / 0.7) ** 2) < 4 * gain.upper.error < 0.05


def test_many_contrasts_come_to_the_gain_where_nothing_is_linear():
    gain = information_gain(Curved((0.8, 0.5)), NOISE, outcomes=6000, contrasts=200)
    exact = curved_gain((0.8, 0.5))
    for bound in (gain.lower, gain.upper):
        assert abs(bound.mean - exact) < 4 * bound.error < 0.2 * exact


def test_the_lower_bound_has_the_gradient_of_the_gain():
    experiment = linear_experiment(((0.9, 0.3),), (1.0, 1.0))
    rows = []
    for i in range(20):
        lower, _ = contrastive_bounds(experiment, NOISE.stream(i), 300, 100)
        rows.append(torch.autograd.grad(lower.mean(), experiment.signal.rows)[0])
    each = torch.stack(rows)
    exact = torch.autograd.grad(linear_gain(experiment), experiment.signal.rows)[0]
    error = each.std(0) / math.sqrt(len(each))
    assert ((each.mean(0) - exact).abs() < 4 * error).all() and (error < 0.03 * exact.norm()).all()


def test_chunks_are_the_same_law_and_designs_share_their_outcomes(monkeypatch):
    experiment, better = linear_experiment(((0.5,),)), linear_experiment(((0.8,),))
    monkeypatch.setattr(bounds, "AT_ONCE", 1000)
    first, second = (information_gain(e, NOISE, outcomes=505, contrasts=50) for e in (experiment, better))
    assert first.lower_bounds.shape == (505,) and not first.lower_bounds.requires_grad
    difference = second.over(first)
    exact = (linear_gain(better) - linear_gain(experiment)).item()
    assert abs(difference.mean - exact) < 4 * difference.error
    assert difference.error < 0.7 * math.hypot(first.lower.error, second.lower.error)


def test_it_says_when_a_gain_is_within_its_error_of_nothing():
    blind, weak = linear_experiment(((0.0,),)), linear_experiment(((0.02,),))
    strong, sharp = linear_experiment(((1.0,),)), linear_experiment(((200.0,),))

    def gain(experiment, contrasts=100):
        return information_gain(experiment, NOISE, outcomes=300, contrasts=contrasts)

    for experiment in (blind, weak):
        (message,) = gain(experiment).advice()
        assert "the design's gain" in message and "within its error of nothing" in message
    assert gain(strong).advice() == []
    (message,) = gain(strong).advice(gain(strong))
    assert "the gain over the other design, 0 nats, is within its error of nothing" in message
    assert gain(strong).advice(gain(blind)) == []
    (message,) = gain(sharp, 9).advice()
    assert "use more contrasts" in message and "exceeds 2.30" in message


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("experiment must be of type Experiment", lambda: information_gain(torch.nn.Linear(1, 1), NOISE)),
        ("outcomes must be an integer", lambda: information_gain(linear_experiment(), NOISE, outcomes=1)),
        ("contrasts must be an integer", lambda: contrastive_bounds(linear_experiment(), NOISE, 2, 0)),
        ("other must have 2 outcomes", lambda: Gain(*torch.ones(2, 2), 3).over(Gain(*torch.ones(2, 3), 3))),
    ],
)
def test_wrong_arguments_are_named(match, call, as_users_run):
    with pytest.raises(InvalidInputError, match=match):
        call()
