"""Overdamped Langevin dynamics, without and with a Metropolis test.

One Euler–Maruyama step of dX = −∇V dt + √2 dW from x proposes y ~ q(·|x) = N(x − h∇V(x), 2h). With

    α(x, y) = V(x) + ½⟨y − x, ∇V(x)⟩ + (h/4)‖∇V(x)‖²

one has, up to a constant, −V(x) + log q(y|x) = −α(x, y) − ‖y − x‖²/4h, whose last term is symmetric. So the Metropolis
ratio is e^{α(x, y) − α(y, x)}, and the weights' increment of a step under θ_k, seen from θ_{k+1}, is
α_{θ_k}(x, y) − α_{θ_{k+1}}(y, x): exact at any h, the bias of ULA included.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.kernel import ExactKernel, Kernel, Move, inner, metropolis


def alpha(
    x: Float[Tensor, "n *event"], y: Float[Tensor, "n *event"], at_x: Energy, h: Float[Tensor, ""]
) -> Float[Tensor, " n"]:
    """α(x, y) = V(x) + ½⟨y − x, ∇V(x)⟩ + (h/4)‖∇V(x)‖², in the widest dtype: differences of it keep the digits of V."""
    return exact(at_x.value) + inner(at_x.grad, (y - x) / 2 + h / 4 * at_x.grad)


def drifted(here: Energy, xi: Float[Tensor, "n *event"], h: Float[Tensor, ""]) -> Float[Tensor, "n *event"]:
    """√(2h) ξ − h∇V. Drift and noise are added first: far from zero x − h∇V would be x, and the drift be lost."""
    return (2 * h).sqrt() * xi - h * here.grad


class ULA(Kernel):
    """The unadjusted Langevin algorithm, x⁺ = x − h∇V(x) + √(2h) ξ.

    Its invariant law is biased by O(h): on a unit Gaussian the variance is 1/(1 − h/2), and there h < 2.
    """

    def move(
        self,
        x: Float[Tensor, "n *event"],
        momentum: Tensor | None,
        here: Energy,
        energy: Callable[[Tensor], Energy],
        draws: tuple[Tensor, ...],
        h: Float[Tensor, ""],
    ) -> Move:
        (xi,) = draws
        return Move(x + drifted(here, xi, h))

    def owe(self, x: Float[Tensor, "n *event"], here: Energy, move: Move, h: Float[Tensor, ""]) -> Float[Tensor, " n"]:
        return alpha(x, move.x, here, h)

    def repay(
        self, previous: Float[Tensor, "n *event"], x: Float[Tensor, "n *event"], here: Energy, h: Float[Tensor, ""]
    ) -> Float[Tensor, " n"]:
        return alpha(x, previous, here, h)


class MALA(ExactKernel):
    """The Metropolis-adjusted Langevin algorithm: ULA's proposal, accepted with probability 1 ∧ e^{α(x,y) − α(y,x)}.

    Leaves π_θ invariant exactly (Roberts and Tweedie, *Exponential Convergence of Langevin Distributions*, 1996).
    """

    evaluations = 2
    target_acceptance = 0.574

    def move(
        self,
        x: Float[Tensor, "n *event"],
        momentum: Tensor | None,
        here: Energy,
        energy: Callable[[Tensor], Energy],
        draws: tuple[Tensor, ...],
        h: Float[Tensor, ""],
    ) -> Move:
        xi, uniform = draws
        y = x + drifted(here, xi, h)
        there = energy(y)
        log_ratio = alpha(x, y, here, h) - alpha(y, x, there, h)
        return metropolis(log_ratio, uniform, (x, here.value), (y, there.value))
