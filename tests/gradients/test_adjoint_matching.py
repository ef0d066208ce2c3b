"""Adjoint matching under the contract, and where it is the adjoint, unbiased, and biased."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint, AdjointMatching
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, PathKL, Reward
from tests.gradients.contract import BATCH, BETA, N, RowEstimatorContract
from tests.helpers.oracles import affine_chain, exact_terms, riccati


class TestAdjointMatching(RowEstimatorContract):
    def make(self):
        return AdjointMatching()
