"""A mean field on the line whose law is a fixed point that quadrature finds."""

import torch
from torch import nn

from implicit_diffusion.potentials import MeanField


class Well(nn.Module):
    """V(x) = a (x² − 1)² / 4 + b x."""

    def __init__(self, a=1.0, b=0.2):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (a, b))

    def forward(self, x):
        return self.a * (x[:, 0] ** 2 - 1) ** 2 / 4 + self.b * x[:, 0]


class Attraction(nn.Module):
    """W(x, y) = −strength e^{−(x−y)²/2}, per coordinate 0."""

    def __init__(self, strength=0.8):
        super().__init__()
        self.strength = nn.Parameter(torch.tensor(strength, dtype=torch.float64))

    def forward(self, x, y):
        return -self.strength * torch.exp(-((x[:, None, 0] - y[None, :, 0]) ** 2) / 2)


GRID = torch.linspace(-5, 5, 801, dtype=torch.float64)[:, None]


def problem(strength=0.8, temperature=0.6):
    return MeanField(Well(), Attraction(strength), temperature)


@torch.no_grad()
def law(mean_field):
    """Masses of π_θ on the grid: the fixed point p ∝ e^{−(V + W p)/τ}, by damped iteration to rounding."""
    v, w = mean_field.potential(GRID), mean_field.interaction(GRID, GRID)
    p = torch.softmax(-v / mean_field.temperature, 0)
    for _ in range(10_000):
        new = torch.softmax(-(v + w @ p) / mean_field.temperature, 0)
        if (new - p).abs().sum() < 1e-14:
            return new
        p = (p + new) / 2
    raise AssertionError("no fixed point")
