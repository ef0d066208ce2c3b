"""A potential that can be sampled."""

import math

import torch
from torch import nn


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
