"""Maximum mean discrepancy to data (Gretton et al., *A Kernel Two-Sample Test*, 2012), by U-statistics.

    F(p) = E k(X, X′) − 2 E k(X, Y) + E k(Y, Y′),       F′(p)[x] = 2 (E_p k(x, X) − E_ref k(x, Y))

Pairs of a particle with itself are left out, since they are not draws from p ⊗ p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_call, check_number, trying
from implicit_diffusion.frozen import modules_in
from implicit_diffusion.objectives.attributes import check_name
from implicit_diffusion.objectives.base import TerminalObjective
from implicit_diffusion.objectives.data import checked, fitting
from implicit_diffusion.objectives.variation import Density, FirstVariation
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import squared_distances
from implicit_diffusion.showing import named


def gaussian_kernel(bandwidth: float) -> Callable[[Tensor, Tensor], Tensor]:
    """k(x, y) = exp(−‖x − y‖²/(2 bandwidth²)) as a function from (n, *event), (m, *event) to (n, m).

    Raises:
        InvalidInputError: a bandwidth that is not positive and finite.
    """
    width = check_number("bandwidth", bandwidth, 0.0)
    kernel: Callable[[Tensor, Tensor], Tensor] = named(
        lambda x, y: (-squared_distances(x, y) / (2 * width * width)).exp().to(x.dtype), f"gaussian_kernel({width:g})"
    )
    return kernel


class MMD(TerminalObjective):
    """MMD² to data. Serves chains as well. Costs n² + nm kernel values per estimate.

    Args:
        data: draws from the reference, with shape (m, *event), m ≥ 2.
        kernel: from (n, *event), (m, *event) to (n, m); Gaussian with the data's median distance where None.
        name: under which metrics report it.

    Raises:
        InvalidInputError: fewer than two data, or data that are not a tensor, NaN, infinite or, without a kernel, equal
            in most pairs; a kernel that is not a function or does not return a finite matrix.
    """

    def __init__(
        self,
        data: Float[Tensor, "m *event"],
        kernel: Callable[[Tensor, Tensor], Tensor] | None = None,
        name: str = "mmd2",
    ) -> None:
        self.data = checked(data, least=2)
        if kernel is not None:
            check_call("kernel", kernel, "x", "y")
        if kernel is None:
            median = torch.pdist(self.data[:2000].flatten(1)).median().item()
            if median == 0:
                raise InvalidInputError(
                    "data are equal in most pairs: their median distance, the kernel's default bandwidth, is 0; pass "
                    "kernel=gaussian_kernel(bandwidth)"
                )
            kernel = gaussian_kernel(median)
        self.kernel, self.name = kernel, check_name(name)
        with self.evaluating(), trying("kernel", "the data"):
            gram = kernel(self.data, self.data)
        _check_gram(gram, len(self.data))
        self._within = (gram.sum() - gram.diagonal().sum()) / (len(data) * (len(data) - 1))

    def networks(self) -> Iterable[nn.Module]:
        return modules_in(self.kernel)

    def value(self, particles: Particles) -> Float[Tensor, ""]:
        return self._estimates(particles)[1]

    def first_variation(self, particles: Particles, density: Density | None = None) -> FirstVariation:
        with torch.no_grad():
            function, value = self._estimates(particles)
        return FirstVariation(function, value=value)

    def _estimates(self, particles: Particles) -> tuple[Tensor, Tensor]:
        """F′ at the particles and F."""
        particles = fitting("MMD", self.data, particles)
        x, w = particles.x, particles.weights
        gram = self.kernel(x, x)
        others = gram @ w - gram.diagonal() * w  # Σ_{j≠i} w_j k(x_i, x_j)
        across = self.kernel(x, self.data).mean(1)
        value = (w * others).sum() / (1 - w.square().sum()) - 2 * (w * across).sum() + self._within
        return 2 * (others / (1 - w) - across), value


def _check_gram(gram: object, m: int) -> None:
    if not isinstance(gram, Tensor) or gram.shape != (m, m) or not gram.isfinite().all():
        given = f"shape {tuple(gram.shape)}" if isinstance(gram, Tensor) else type(gram).__name__
        raise InvalidInputError(
            f"kernel must return finite numbers with shape (n, m), here ({m}, {m}) for the data with themselves, got "
            f"{given}"
        )
