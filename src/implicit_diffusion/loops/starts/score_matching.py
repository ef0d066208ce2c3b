"""Denoising score matching: a potential learns the slope of the log-density of data without any sampler.

For data y ~ p and noise ξ ~ N(0, I), x = y + σξ has the density p_σ = p ∗ N(0, σ²I), whose score is the regression of
−ξ/σ on x (Vincent, *A Connection Between Score Matching and Denoising Autoencoders*, 2011). So

    L(θ) = ½ E ‖σ ∇V_θ(y + σξ) − ξ‖² = (σ²/2) E_{p_σ} ‖∇V_θ + ∇log p_σ‖² + const,

and the minimum is at V = −log p_σ, up to a constant. No particle moves, and log Z does not occur. The loss hardly sees
the masses of modes that lie far apart, since slopes say nothing of them, and learns p_σ in place of p: this is a start.
Maximum likelihood takes over, with weighted particles that `annealed` has brought to V, and with them log Z.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn, optim

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_integer, check_number
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.gradients.fused import dense
from implicit_diffusion.loops.base import Loop, check_same
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Term
from implicit_diffusion.objectives.data import checked
from implicit_diffusion.potentials.energy import check_potential, value_of
from implicit_diffusion.rounding import at_least_single


class FisherDivergence(Term):
    """What score matching minimises, up to a constant; only its name is needed."""

    name = "score_matching"


class ScoreMatching(Loop):
    """One update per step on the denoising score matching loss: a start for `Single` with `ForwardKL`.

        >>> import torch
        >>> from implicit_diffusion import GaussianMixture, Noise
        >>> from implicit_diffusion.loops import ScoreMatching
        >>> data = 3 + Noise(1).normal((2000, 1))
        >>> potential = GaussianMixture(torch.zeros(1, 1))  # N(0, 1)
        >>> adam = torch.optim.Adam([potential.means], lr=0.1)
        >>> loop = ScoreMatching(potential, data, adam, noise_std=0.5, noise=Noise(0))
        >>> for metrics in loop.run(200):
        ...     pass
        >>> print(f"{potential.means.item():.0f}")
        3

    Args:
        potential: V, an `nn.Module` (n, *event) → (n,), trained in place. It must have a second derivative.
        data: draws from p, with shape (m, *event).
        update: a torch optimizer of the potential's parameters, or an `Update` around one.
        noise_std: σ > 0, in the units of the data: what is learned is the density of data with this much noise.
        noise: source of every random number.
        batch: data per update, drawn with replacement; all of them where None.

    Raises:
        InvalidInputError: an argument that does not fit the others; data of another event shape, dtype or device than
            the potential takes.
    """

    def __init__(
        self,
        potential: nn.Module,
        data: Float[Tensor, "m *event"],
        update: Update | optim.Optimizer,
        *,
        noise_std: float,
        noise: Noise,
        batch: int | None = None,
    ) -> None:
        self.data = checked(data)
        self.noise_std = check_number("noise_std", noise_std, 0)
        self.batch = len(self.data) if batch is None else check_integer("batch", batch, note=", or None for all data")
        super().__init__(potential, "potential", FisherDivergence(), update, noise)
        processes.check_divides("batch", self.batch)
        check_same(noise, data=self.data)
        self.parameters = [p for p in self.update.parameters if p.requires_grad]
        first = next(self.model.parameters())
        if (at_least_single(first.dtype), first.device) != (self.data.dtype, self.data.device):
            raise InvalidInputError(
                f"data are {self.data.dtype} on {self.data.device}, the potential's parameters {first.dtype} on "
                f"{first.device}; use data.to(device, dtype)"
            )
        with eval_mode(self.model):
            check_potential(self.model, self.data[:2])

    def _words(self) -> Iterable[str]:
        yield f"noise_std={self.noise_std:g}"
        yield from super()._words()

    @processes.sharing()
    def step(self) -> dict[str, Any]:
        self.update.begin()
        y, xi = (processes.share(part) for part in self._draws(self.iteration))
        with eval_mode(self.model), torch.enable_grad():
            loss = score_matching(self.model, y, xi, self.noise_std) / processes.count()
            gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for p, g in zip(self.parameters, dense(gradients)):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g
        self.iteration += 1
        values = {FisherDivergence.name: processes.total(loss.detach())}
        moved = self.update.step([loss.detach()], lambda: self._why(None, values))
        return self._metrics(values) | moved

    def cost(self) -> dict[str, int]:
        """Pulls through V at all data of an update: one in x, and one in θ."""
        return {"gradient_evaluations": 2 * self.iteration}

    def _draws(self, iteration: int) -> tuple[Tensor, Tensor]:
        """The data of an update, and ξ."""
        generator, y = self.noise.generator(iteration, device=self.data.device), self.data
        if self.batch != len(y):
            y = y[torch.randint(len(y), (self.batch,), generator=generator, device=y.device)]
        return y, torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)

    def _like(self) -> dict[str, Any]:
        return super()._like() | {"noise_std": self.noise_std, "batch": self.batch}


def score_matching(
    potential: nn.Module, y: Float[Tensor, "m *event"], xi: Float[Tensor, "m *event"], noise_std: float
) -> Float[Tensor, ""]:
    """The mean of ½‖σ ∇V(y + σξ) − ξ‖², differentiable in θ.

    Raises:
        InvalidInputError: a potential whose slope does not depend on θ through torch operations.
    """
    x = (y + noise_std * xi).requires_grad_()
    (slope,) = torch.autograd.grad(value_of(potential, x).sum(), x, create_graph=True)
    if not slope.requires_grad:
        raise InvalidInputError("potential: its slope does not depend on its parameters, so scores teach it nothing")
    return (noise_std * slope - xi).square().sum() / (2 * len(y))
