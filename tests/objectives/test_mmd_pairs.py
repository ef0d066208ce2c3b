"""MMD² pair by pair: what it reports, and F′, are U-statistics of the particles and of the data."""

import pytest
import torch

from implicit_diffusion.objectives import MMD, gaussian_kernel
from implicit_diffusion.particles import Particles

F64 = torch.float64
DATA = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.5
KERNELS = {
    "gaussian": gaussian_kernel(1.3),
    "its diagonal varies": lambda x, y: (1 + x @ y.mT) ** 2,
}


def weighted_particles(n, weighted):
    g = torch.Generator().manual_seed(0)
    x, logs = torch.randn(n, 2, generator=g, dtype=F64), torch.randn(n, generator=g, dtype=F64)
    return Particles(x, logs if weighted else None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", KERNELS)
def test_value_and_variation_pair_by_pair(name, weighted):
    p, k, n, m = weighted_particles(6, weighted), KERNELS[name], 6, len(DATA)
    w, pairs = p.weights, [(i, j) for i in range(n) for j in range(n) if i != j]
    gram, cross, reference = k(p.x, p.x), k(p.x, DATA), k(DATA, DATA)
    within = sum(w[i] * w[j] * gram[i, j] for i, j in pairs) / sum(w[i] * w[j] for i, j in pairs)
    across = sum(w[i] * cross[i, j] / m for i in range(n) for j in range(m))
    data = sum(reference[i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    term = MMD(DATA, k)
    first = term.first_variation(p)
    variation, value = first.function, first.value
    torch.testing.assert_close(value, within - 2 * across + data, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(term.value(p), value, rtol=1e-12, atol=1e-13)
    for i in range(n):
        others = sum(w[j] * gram[i, j] for j in range(n) if j != i) / sum(w[j] for j in range(n) if j != i)
        torch.testing.assert_close(variation[i], 2 * (others - cross[i].mean()), rtol=1e-12, atol=1e-13)


def test_the_default_bandwidth_is_the_median_distance():
    term = MMD(DATA)
    median = torch.pdist(DATA).median().item()
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
    torch.testing.assert_close(term.kernel(x, DATA), (-torch.cdist(x, DATA).square() / (2 * median**2)).exp())
