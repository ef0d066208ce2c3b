"""What the processes of tests/scorers/test_scorer.py are asked to compute."""

import torch

from implicit_diffusion.loops import Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward, Scorer
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.runs.fit import fit
from implicit_diffusion.samplers import ULA


def loop_with(reward):
    """A loop whose reward may be a black box."""
    means = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    potential = GaussianMixture(means)
    adam = torch.optim.Adam(potential.parameters(), lr=0.05)
    return Single(potential, ULA(0.1), Reward(reward), adam, particles=32, noise=Noise(3))


def theta(loop):
    return [p.detach().clone() for p in loop.model.parameters()]


def trained(file):
    """θ after a few updates with a scorer, and how many samples it is given at a time."""
    with Scorer(file, "points") as scorer:
        sizes = []

        def reward(x):
            sizes.append(len(x))
            return scorer(x.numpy())

        loop = loop_with(reward)
        fit(loop, 4)
    return theta(loop), sizes[-1]
