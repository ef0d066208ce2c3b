"""Adjoint matching under the contract, and where it is the adjoint, unbiased, and biased."""

from implicit_diffusion.gradients import AdjointMatching
from tests.gradients.contract import RowEstimatorContract


class TestAdjointMatching(RowEstimatorContract):
    def make(self):
        return AdjointMatching()
