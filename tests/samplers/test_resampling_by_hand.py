"""Systematic resampling number by number; a warm-up that keeps an average, and not where its search ended."""

import math

import pytest
import torch

from implicit_diffusion.noise import Noise
from implicit_diffusion.potentials import GaussianMixture
from implicit_diffusion.samplers import MALA, warm_up
from implicit_diffusion.samplers.weighted_state import systematic
from tests.helpers.oracles_gibbs import Harmonic

F64 = torch.float64


@pytest.mark.parametrize("u", [0.0, 0.125, 0.25, 0.5, 0.875])
def test_points_and_cells_by_hand(u):
    """Points (j + 1 − u)/8 fall into cells closed to the right. Eighths and their sums are exact, so are all ties."""
    eighths = [2, 0, 1, 3, 0, 2]
    shares = torch.tensor([*eighths, 0, 0], dtype=F64) / 8
    edges = torch.cat([torch.zeros(1, dtype=F64), shares.cumsum(0)])
    points = [(j + 1 - u) / 8 for j in range(8)]
    expected = [next(i for i in range(8) if edges[i] < point <= edges[i + 1]) for point in points]
    found = systematic(shares.log(), torch.tensor(u, dtype=F64))
    assert found.tolist() == expected
    if u == 0:  # points on the edges themselves: each particle exactly as often as it is due
        assert torch.bincount(found, minlength=8).tolist() == [*eighths, 0, 0]


@pytest.mark.slow
def test_warm_up_averages_its_search():
    """With two particles an acceptance is all but a coin, and so is where a search ends; its average is not."""
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = [math.log(warm_up(MALA(0.5), Harmonic(), x, Noise(k), steps=60)[0].step_size) for k in range(32)]
    assert torch.tensor(found).std() < 0.11  # the last steps of these searches have 0.17


def test_a_mixture_draws_labels_and_noise_independently():
    """Sixteen far centres, all alike: which one it was says nothing of the noise around it or its neighbours."""
    n, far = 20_000, 1e4 * torch.arange(16, dtype=F64)[:, None]
    x = GaussianMixture(far).sample(n, Noise(0))[:, 0]
    label = (x / 1e4).round()
    xi = x - 1e4 * label
    label = (label - label.mean()) / label.std()
    for values in (xi, xi.square() - 1, xi.abs() - xi.abs().mean()):
        for lag in range(-16, 17):
            assert (label * values.roll(lag)).mean().abs() < 5 * values.std() / math.sqrt(n)
