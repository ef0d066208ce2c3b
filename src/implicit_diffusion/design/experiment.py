r"""Experiments: a prior p(z), outcomes y = T(z, ε; ξ) with the likelihood p(y|z, ξ), and a design ξ.

The expected information gain is the mean free energy of a potential that we can sample. Let z ~ p(z) and ε ~ N(0, I)
make the outcome y = T(z, ε; ξ), and let a second latent z′, the *contrast*, have the potential

    V(z′; z, ε, ξ) = −log p(z′) − log p(y|z′, ξ) + log p(y|z, ξ),        y = T(z, ε; ξ).

Its law is the posterior p(z′|y, ξ), and its free energy is what the outcome says about z:

    −log ∫ e^{−V} dz′ = log p(y|z, ξ) − log p(y|ξ),        EIG(ξ) = E_{z, ε} [−log ∫ e^{−V} dz′].

The derivative of a free energy is the mean of that of the potential, so with z′ ~ p(·|y, ξ)

    ∇EIG(ξ) = E ∇_ξ V = E [∇_ξ log p(y|z, ξ) − ∇_ξ log p(y|z′, ξ)],

in which both gradients are total: through y = T(z, ε; ξ) at fixed (z, ε), and through ξ itself. No normaliser is
needed, nor more than one contrast for each outcome. `docs/mathematics/design.md` has the derivation, and the bias.

A particle is a *pair*, one vector (z′, z, ε): the sampler moves z′ (`PosteriorKernel`), and (z, ε) say which outcome it
belongs to.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import (
    InvalidInputError,
    check_integer,
    check_number,
    check_tensor,
    check_type,
    shown,
    trying,
)
from implicit_diffusion.frozen import frozen_copy
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import ShownModule, brief, of_tuple

TRIED = 3  # latents that an experiment is tried on


class Pairs(NamedTuple):
    """What particles of an experiment hold.

    Args:
        contrast: z′, with shape (n, *event).
        latent: z, with shape (n, *event).
        noise: ε, with shape (n, *noise_shape).
    """

    contrast: Tensor
    latent: Tensor
    noise: Tensor

    def __repr__(self) -> str:
        return of_tuple(self)


class Experiment(ShownModule, ABC):
    """An experiment, and the potential of its pairs. A subclass says what is observed by two methods.

    Args:
        prior: −log p(z) + const, a module (n, *event) → (n,) with `sample(n, noise)`, e.g. a `GaussianMixture`; a
            frozen copy is kept.
        noise_shape: of ε, one outcome's standard normal numbers.

    Raises:
        InvalidInputError: a prior without `sample`, or whose draws are not finite vectors or arrays of numbers.
    """

    def __init__(self, prior: nn.Module, noise_shape: tuple[int, ...]) -> None:
        super().__init__()
        check_type("prior", prior, nn.Module, "it is −log p(z) as a module, e.g. GaussianMixture(torch.zeros(1, 2))")
        if not callable(getattr(prior, "sample", None)):
            raise InvalidInputError("prior must have a method sample(n, noise), which draws n latents from it")
        if not isinstance(noise_shape, tuple):
            raise InvalidInputError(
                f"noise_shape must hold sizes, e.g. (3,), or () for one number, got {shown(noise_shape)}"
            )
        self.prior = frozen_copy(prior)
        self.noise_shape = tuple(check_integer("a size in noise_shape", size) for size in noise_shape)
        z = self.prior_draws(TRIED, Noise(0))
        self.event_shape = tuple(z.shape[1:])
        with trying("prior", f"{TRIED} of its own draws"):
            value = self.prior(z)
        if not isinstance(value, Tensor) or value.shape != (TRIED,) or not value.isfinite().all():
            raise InvalidInputError(
                f"prior must return one finite number per latent, shape ({TRIED},) for latents of shape "
                f"{tuple(z.shape)}, got {shown(value)}"
            )

    @abstractmethod
    def outcome(self, z: Float[Tensor, "n *event"], noise: Float[Tensor, "n *noise_shape"]) -> Float[Tensor, "n *y"]:
        """The outcomes y = T(z, ε; ξ), differentiable in ξ.

        Args:
            z: latents.
            noise: ε, standard normal.
        """

    @abstractmethod
    def log_likelihood(self, y: Float[Tensor, "n *y"], z: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
        """Log p(y_i|z_i, ξ), differentiable in y, z and ξ, of all pairs of rows; normalised, where ξ acts on that."""

    def noise_of(
        self, y: Float[Tensor, "n *y"], z: Float[Tensor, "n *event"]
    ) -> Float[Tensor, "n *noise_shape"] | None:
        """The one ε with T(z, ε; ξ) = y, where any z could have made y: then pairs exchange roles (`PosteriorKernel`).

        None, the default, where there is no such ε, or more than one.
        """
        return None

    def _words(self) -> Iterable[str]:
        return f"prior={brief(self.prior)}", f"latents={self.event_shape}", f"noise={self.noise_shape}"

    def prior_draws(self, n: int, noise: Noise) -> Float[Tensor, "n *event"]:
        """Independent draws of z from the prior."""
        prior: Any = self.prior
        with trying("prior.sample", f"({n}, noise)"):
            z = prior.sample(n, noise)
        check_tensor("what prior.sample returns", z, "n *event", finite=True)
        if len(z) != n:
            raise InvalidInputError(f"prior.sample must return {n} draws, shape ({n}, *event), got {tuple(z.shape)}")
        return z

    def draw(self, n: int, noise: Noise) -> tuple[Float[Tensor, "n *event"], Float[Tensor, "n *noise_shape"]]:
        """Independent draws of (z, ε)."""
        z = self.prior_draws(n, noise.stream(0))
        return z, noise.normal((n, *self.noise_shape), 1, device=z.device, dtype=z.dtype)

    def sample(self, n: int, noise: Noise) -> Float[Tensor, "n pair"]:
        """Pairs to begin with, z′ = z: each z is a draw from its posterior, until it moves not an independent one."""
        z, epsilon = self.draw(n, noise)
        return self.joined(z, z, epsilon)

    def joined(self, contrast: Tensor, latent: Tensor, noise: Tensor) -> Float[Tensor, "n pair"]:
        """Pairs as particles (z′, z, ε), one vector each."""
        return torch.cat(
            [part.reshape(len(latent), math.prod(part.shape[1:])) for part in (contrast, latent, noise)], 1
        )

    def pairs(self, x: Float[Tensor, "n pair"]) -> Pairs:
        """Particles as pairs; z and ε are held fixed, also by autograd.

        Raises:
            InvalidInputError: particles that are not pairs of this experiment.
        """
        d, k = math.prod(self.event_shape), math.prod(self.noise_shape)
        if x.ndim != 2 or x.shape[1] != 2 * d + k:
            raise InvalidInputError(
                f"particles of an experiment are pairs (z′, z, ε), shape (n, {2 * d + k}), got {tuple(x.shape)}; use "
                "particles=n, or what its sample(n, noise) returns"
            )
        contrast, latent, noise = x.split([d, d, k], 1)
        events = (contrast.reshape(-1, *self.event_shape), latent.detach().reshape(-1, *self.event_shape))
        return Pairs(*events, noise.detach().reshape(-1, *self.noise_shape))

    def surprise(self, x: Float[Tensor, "n pair"]) -> Float[Tensor, " n"]:
        """Log p(y|z, ξ) − log p(y|z′, ξ): by how much the latent explains its outcome better than the contrast."""
        contrast, latent, noise = self.pairs(x)
        y = self.outcome(latent, noise)
        both = self.log_likelihood(torch.cat([y, y]), torch.cat([latent, contrast]))
        return both[: len(x)] - both[len(x) :]

    def forward(self, x: Float[Tensor, "n pair"]) -> Float[Tensor, " n"]:
        """V(z′; z, ε, ξ)."""
        return self.prior(self.pairs(x).contrast) + self.surprise(x)


class GaussianExperiment(Experiment):
    """y = f(z; ξ) + σ ε: a signal of the latent, measured with Gaussian noise.

        >>> import torch
        >>> from implicit_diffusion import GaussianMixture, Noise
        >>> from implicit_diffusion.design import GaussianExperiment, information_gain
        >>> signal = torch.nn.Linear(2, 1, bias=False)  # y = ⟨ξ, z⟩ + σ ε
        >>> _ = signal.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> experiment = GaussianExperiment(signal, GaussianMixture(torch.zeros(1, 2)), std=1.0)
        >>> gain = information_gain(experiment, Noise(0), outcomes=2000, contrasts=1000)
        >>> gain.lower.mean < 1.63 + 3 * gain.lower.error and gain.upper.mean > 1.63 - 3 * gain.upper.error  # log(26)/2
        True

    Args:
        signal: f, a module (n, *event) → (n, *y); its parameters are the design ξ.
        prior: as in `Experiment`.
        std: σ > 0.

    Raises:
        InvalidInputError: a signal that fails on the prior's draws, or is not one finite outcome for each; σ ≤ 0; a
            prior as in `Experiment`.
    """

    def __init__(self, signal: nn.Module, prior: nn.Module, std: float) -> None:
        check_type("signal", signal, nn.Module, "it is f(z; ξ) as a module that owns the design")
        super().__init__(prior, ())
        self.signal, self.std = signal, check_number("std", std, 0.0)
        z = self.prior_draws(TRIED, Noise(0))
        with torch.no_grad(), trying("signal", f"latents of shape {tuple(z.shape)} in {z.dtype}"):
            y = signal(z)
        if not isinstance(y, Tensor) or y.ndim < 1 or len(y) != TRIED or (y.dtype, y.device) != (z.dtype, z.device):
            raise InvalidInputError(
                f"signal must return {TRIED} outcomes for {TRIED} latents, {z.dtype} on {z.device}, got {shown(y)}"
            )
        if not y.isfinite().all():
            raise InvalidInputError("signal must be finite on draws from the prior, but is NaN or infinite")
        self.noise_shape = tuple(y.shape[1:])

    def _words(self) -> Iterable[str]:
        return f"signal={brief(self.signal)}", f"std={self.std:g}", *super()._words()

    def outcome(self, z: Float[Tensor, "n *event"], noise: Float[Tensor, "n *noise_shape"]) -> Float[Tensor, "n *y"]:
        """f(z; ξ) + σ ε."""
        return self.signal(z) + self.std * noise

    def noise_of(self, y: Float[Tensor, "n *y"], z: Float[Tensor, "n *event"]) -> Float[Tensor, "n *noise_shape"]:
        """(y − f(z; ξ))/σ."""
        return (y - self.signal(z)) / self.std

    def surprise(self, x: Float[Tensor, "n pair"]) -> Float[Tensor, " n"]:
        """‖δ‖²/2 + ⟨δ, ε⟩ with δ = (f(z) − f(z′))/σ: the signal of each latent once, and no large terms that cancel."""
        contrast, latent, noise = self.pairs(x)
        own, other = self.signal(torch.cat([latent, contrast])).reshape(2, len(x), -1)
        apart = (own - other) / self.std
        return (apart * (apart / 2 + noise.reshape(len(x), -1))).sum(1)

    def log_likelihood(self, y: Float[Tensor, "n *y"], z: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
        """Log N(y; f(z; ξ), σ²)."""
        residual = (y - self.signal(z)).reshape(len(y), -1) / self.std
        return -residual.square().sum(1) / 2 - residual.shape[1] * math.log(self.std * math.sqrt(2 * math.pi))
