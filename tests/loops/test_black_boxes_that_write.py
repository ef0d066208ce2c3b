"""Rewards and callers that write into the particles they are given change nothing of a loop."""

import pytest
import torch

from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.noise import Noise
from tests.helpers import gibbs_loops
from tests.helpers.oracles import affine_chain


def rude(x):
    value = gibbs_loops.wave(x)
    x.fill_(7.0)
    return value


@pytest.mark.parametrize("name", ["ula", "weighted ula", "ula with lag", "x-first", "weighted x-first mala", "nested"])
def test_a_reward_that_writes_into_its_argument(name):
    polite, other = gibbs_loops.build(name), gibbs_loops.build(name, reward=rude)
    for _ in range(4):
        a, b = polite.step(), other.step()
    assert torch.equal(polite.weighted_state.x, other.weighted_state.x)
    assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("name", ["ula", "weighted ula"])
def test_a_caller_that_writes_into_the_particles(name):
    polite, other = gibbs_loops.build(name), gibbs_loops.build(name)
    for _ in range(4):
        other.particles.x.fill_(7.0)
        polite.step(), other.step()
    assert torch.equal(polite.weighted_state.x, other.weighted_state.x)


def test_an_evaluation_keeps_the_samples_that_were_judged():
    chain, _ = affine_chain(3, 2)
    polite, other = (evaluate(chain, reward, Noise(0), starts=4, repeats=2) for reward in (gibbs_loops.wave, rude))
    assert torch.equal(polite.samples, other.samples) and torch.equal(polite.reward, other.reward)
