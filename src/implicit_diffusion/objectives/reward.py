"""Reward: F(p) = −E_p R."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.objectives.base import TerminalObjective
from implicit_diffusion.particles import Particles


class Reward(TerminalObjective):
    """Maximise the expectation of a function of the samples: F(p) = −E_p R.

    On chains the adjoint needs ∇R. Under a stationary law R may be a black box: F′ = −R is all that counts.

    Args:
        function: R, any callable from samples of shape (n, *event) to rewards of shape (n,), in the samples' dtype;
            each reward depends on its own sample alone.
        name: under which metrics report it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], name: str = "reward") -> None:
        self.function, self.name = function, name

    def value(self, particles: Particles) -> Float[Tensor, ""]:
        return -particles.mean(self.function(particles.x))

    def first_variation(self, particles: Particles) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
        reward = self.function(particles.x)
        return -reward, -particles.mean(reward)

    def report(self, value: Float[Tensor, ""]) -> tuple[str, Tensor]:
        """The reward itself, E_p R."""
        return self.name, -value

    def check(self, particles: Particles) -> None:
        """Try the reward on a few samples.

        Raises:
            InvalidInputError: another shape than (n,), another dtype, NaN or infinity, or no gradient.
        """
        x = particles.x.detach().requires_grad_()
        with torch.enable_grad():
            reward = self.function(x)
        self._check_form(reward, x)
        if not reward.requires_grad:
            raise InvalidInputError(
                "reward is not differentiable: its result does not depend on the samples through torch operations; "
                "remove .detach(), .numpy(), torch.no_grad() and comparisons from it"
            )
        gradient = torch.autograd.grad(reward.sum(), x, allow_unused=True)[0]
        if gradient is None:
            raise InvalidInputError("reward is not differentiable: its result does not depend on the samples")
        for what, tensor in (("values", reward), ("a gradient", gradient)):
            _check_finite(what, tensor)

    def check_stationary(self, particles: Particles, energy: Float[Tensor, " n"]) -> None:
        """Raises InvalidInputError: another shape than (n,), another dtype, NaN or infinity."""
        with torch.no_grad():
            reward = self.function(particles.x)
        self._check_form(reward, particles.x)
        _check_finite("values", reward)

    def _check_form(self, reward: object, x: Tensor) -> None:
        if not isinstance(reward, Tensor) or reward.shape != (len(x),):
            given = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise InvalidInputError(
                f"reward must return one number per sample, shape ({len(x)},) for input {tuple(x.shape)}, got {given}; "
                "average over all dimensions but the first"
            )
        if reward.dtype != x.dtype:
            raise InvalidInputError(
                f"reward must return the dtype of the samples, {x.dtype}, got {reward.dtype}; end it with .to(x.dtype)"
            )


def _check_finite(what: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise InvalidInputError(f"reward gives {what} that are NaN or infinite on samples of the initial model")
