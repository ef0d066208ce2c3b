"""Overdamped Langevin dynamics, without and with a Metropolis test.

One Euler–Maruyama step of dX = −∇V dt + √2 dW from x proposes y ~ q(·|x) = N(x − h∇V(x), 2h). With

    α(x, y) = V(x) + ½⟨y − x, ∇V(x)⟩ + (h/4)‖∇V(x)‖²

one has, up to a constant, −V(x) + log q(y|x) = −α(x, y) − ‖y − x‖²/4h, whose last term is symmetric. So the Metropolis
ratio is e^{α(x, y) − α(y, x)}, and the weights' increment of a step under θ_k, seen from θ_{k+1}, is
α_{θ_k}(x, y) − α_{θ_{k+1}}(y, x): exact at any h, the bias of ULA included.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.kernel import Info, Kernel, State, Step, inner_product
from implicit_diffusion.samplers.metropolis import MetropolisKernel, accept_or_reject


def alpha(
    x: Float[Tensor, "n *event"], y: Float[Tensor, "n *event"], at_x: Energy, h: Float[Tensor, ""]
) -> Float[Tensor, " n"]:
    """α(x, y) = V(x) + ½⟨y − x, ∇V(x)⟩ + (h/4)‖∇V(x)‖², in the widest dtype: differences of it keep the digits of V.

    Args:
        x: one point per particle.
        y: another one.
        at_x: V and ∇V at x.
        h: the step size.
    """
    return exact(at_x.value) + inner_product(at_x.grad, (y - x) / 2 + h / 4 * at_x.grad)


def langevin_step(step: Step) -> Float[Tensor, "n *event"]:
    """X − h∇V(x) + √(2h) ξ. Drift and noise are added first: far from zero x − h∇V would round to x."""
    return step.x + ((2 * step.h).sqrt() * step.draws[0] - step.h * step.here.grad)


class ULA(Kernel):
    """The unadjusted Langevin algorithm, x⁺ = x − h∇V(x) + √(2h) ξ.

    Its invariant law is biased by O(h): on a unit Gaussian the variance is 1/(1 − h/2), which needs h < 2.

        >>> import torch
        >>> from implicit_diffusion import ULA, GaussianMixture, Noise
        >>> potential, generator = GaussianMixture(torch.zeros(1, 2)), Noise(0).generator()  # N(0, I)
        >>> kernel = ULA(0.2)
        >>> state = kernel.start(torch.zeros(10_000, 2), generator)
        >>> for k in range(40):
        ...     state, info = kernel.move(kernel.prepare(potential, state, generator, k))
        >>> print(f"{state.x.var():.1f}")  # 1/(1 − 0.1)
        1.1

    Args:
        step_size: h > 0, or a function k ↦ h_k of the iteration k = 0, 1, … (`power_law`).

    Raises:
        InvalidInputError: a step size that is not positive and finite.
    """

    weighted = True

    def move(self, step: Step) -> tuple[State, Info]:
        """x⁺ = x − h∇V(x) + √(2h) ξ."""
        return State(langevin_step(step)), Info()

    def forward_part(self, step: Step, after: State) -> Float[Tensor, " n"]:
        """α_θ(x, x⁺) under the θ of the step."""
        return alpha(step.x, after.x, step.here, step.h)

    def backward_part(
        self, before: Float[Tensor, "n *event"], x: Float[Tensor, "n *event"], here: Energy, h: Float[Tensor, ""]
    ) -> Float[Tensor, " n"]:
        """α_θ′(x⁺, x) under the next θ."""
        return alpha(x, before, here, h)


class MALA(MetropolisKernel):
    """The Metropolis-adjusted Langevin algorithm: ULA's proposal, accepted with probability 1 ∧ e^{α(x,y) − α(y,x)}.

    It leaves π_θ invariant exactly (Roberts and Tweedie, *Exponential Convergence of Langevin Distributions and Their
    Discrete Approximations*, 1996).

        >>> import torch
        >>> from implicit_diffusion import MALA, GaussianMixture, Noise
        >>> potential, generator = GaussianMixture(torch.zeros(1, 2)), Noise(0).generator()  # N(0, I)
        >>> kernel = MALA(0.5)
        >>> state = kernel.start(torch.zeros(10_000, 2), generator)
        >>> for k in range(40):
        ...     state, info = kernel.move(kernel.prepare(potential, state, generator, k))
        >>> print(f"{state.x.var():.1f}", bool(info.acceptance.mean() > 0.5))
        1.0 True

    Args:
        step_size: h > 0, or a function k ↦ h_k of the iteration k = 0, 1, … (`power_law`).

    Raises:
        InvalidInputError: a step size that is not positive and finite.
    """

    evaluations_per_step = 2
    target_acceptance = 0.574

    def move(self, step: Step) -> tuple[State, Info]:
        """Propose as ULA does, then accept or reject."""
        y, uniform = langevin_step(step), step.draws[1]
        there = step.energy(y)
        log_ratio = alpha(step.x, y, step.here, step.h) - alpha(y, step.x, there, step.h)
        return accept_or_reject(step, y, there.value, log_ratio, uniform)
