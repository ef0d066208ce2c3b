"""The surrogate: under the contract, unbiased for every R̂, and never fitted to what it is applied to."""

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Surrogate
from implicit_diffusion.noise import Noise
from tests.gradients.contract import RowEstimatorContract


class TestSurrogate(RowEstimatorContract):
    """One that has learned, so that both of its parts are at work."""

    def make(self):
        chain, objective = self.problem()
        (_, reward), _ = objective.terms
        surrogate = Surrogate(pairs=256, steps=4, learning_rate=1e-2)
        x = chain.pretrained().sample(Noise(9), 256)
        surrogate.learn(x, reward.function(x).detach())
        assert 0.3 < surrogate.regression.share <= 1
        return surrogate


class TestSurrogateFromNothing(RowEstimatorContract):
    def make(self):
        return Surrogate(pairs=16, steps=2)
