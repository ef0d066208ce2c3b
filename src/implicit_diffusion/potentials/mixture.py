"""Mixtures of isotropic Gaussians: the potential whose law is known in closed form.

    V(x; θ) = −log Σ_i softmax(θ)_i e^{−‖x − c_i‖²/(2σ²)}

Every component has the same width, so that the normaliser (2πσ²)^{d/2} does not depend on the weights. Points are
laid out with the particles innermost, (modes, d, n): sums over few modes and few dimensions then run over contiguous
particles, which is what processors vectorise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_integer, check_number, check_tensor, check_type
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import ShownModule


class GaussianMixture(ShownModule):
    """V(x) = −log Σ_i softmax(logits)_i exp(−‖x − means_i‖²/(2 std²)) over vectors x.

    The parameters are `logits` and `means`; freeze either with `.requires_grad_(False)`.

    Args:
        means: the centres c_i, with shape (modes, d).
        logits: θ, with shape (modes,); by default zeros, i.e. equal weights.
        std: σ > 0 of every component, fixed.

    Raises:
        InvalidInputError: arguments that are not tensors of floating-point numbers, shapes that do not fit, means that
            are not finite, or std ≤ 0.
    """

    def __init__(
        self, means: Float[Tensor, "modes d"], logits: Float[Tensor, " modes"] | None = None, std: float = 1.0
    ) -> None:
        super().__init__()
        check_tensor("means", means, "modes d", finite=True)
        logits = means.new_zeros(len(means)) if logits is None else logits
        check_tensor("logits", logits, "modes")
        if means.ndim != 2 or logits.shape != means.shape[:1]:
            raise InvalidInputError(
                f"means must have shape (modes, d) and logits shape (modes,), got {tuple(means.shape)} and "
                f"{tuple(logits.shape)}"
            )
        if not logits.softmax(0).isfinite().all():  # −inf is a component without weight
            raise InvalidInputError(
                "logits must be finite, or −inf where a weight is zero, but hold NaN, +inf or −inf alone"
            )
        self.std = check_number("std", std, 0.0)
        self.means, self.logits = nn.Parameter(means.clone()), nn.Parameter(logits.clone())

    def _words(self) -> Iterable[str]:
        modes, d = self.means.shape
        return f"{modes} modes in {d} dimensions", f"std={self.std:g}"

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """V(x).

        Raises:
            InvalidInputError: vectors of another dimension than the means.
        """
        if x.shape[1:] != self.means.shape[1:]:
            raise InvalidInputError(
                f"a mixture of means with shape {tuple(self.means.shape[1:])} has no density on events of shape "
                f"{tuple(x.shape[1:])}; x must have shape (n, {self.means.shape[1]})"
            )
        squares = (x.mT - self.means[:, :, None]).square().sum(1)
        return -(self.logits.log_softmax(0)[:, None] - squares / (2 * self.std * self.std)).logsumexp(0)

    @property
    def weights(self) -> Float[Tensor, " modes"]:
        """softmax(logits): the probability of each component."""
        return self.logits.detach().softmax(0)

    @property
    def log_z(self) -> float:
        """Log ∫ e^{−V} = (d/2) log(2πσ²)."""
        return self.means.shape[1] / 2 * math.log(2 * math.pi * self.std * self.std)

    @torch.no_grad()
    def sample(self, n: int, noise: Noise, *key: int) -> Float[Tensor, "n d"]:
        """Exact draws from π_θ, with shape (n, d); the same key gives the same draws.

        Args:
            n: how many.
            noise: source of the random numbers.
            key: which draw of this noise.
        """
        check_type("noise", noise, Noise, "use Noise(0), for example")
        check_integer("n", n)
        generator = noise.generator(*key, 0, device=self.means.device)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        xi = noise.normal((n, self.means.shape[1]), *key, 1, device=self.means.device, dtype=self.means.dtype)
        return self.means[which] + self.std * xi
