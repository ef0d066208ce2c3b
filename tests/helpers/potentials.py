"""A potential that can be sampled, and a model with latent variables."""

import math

import torch
from torch import nn
from torch.distributions import Normal


class Gaussian(nn.Module):
    """V of N(mean, I) in the plane."""

    log_z = math.log(2 * math.pi)

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return (x - self.mean).square().sum(1) / 2

    def sample(self, n, noise, *key):
        return self.mean.detach() + noise.normal((n, 2), *key, dtype=self.mean.dtype)


class NormalNormal(nn.Module):
    """z ~ N(θ, I) in the plane, 24 data of N(z, I)."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))

    def prior(self):
        return Normal(self.mean, 1.0)

    def likelihood(self, z):
        return Normal(z[:, None].expand(-1, 24, 2), 1.0)

    def simulated(self, n, noise):
        """−log p(x, z; θ) of n draws, without x."""
        return -self.prior().log_prob(self.mean.detach() + noise.normal((n, 2))).sum(1)
