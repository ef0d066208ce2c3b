r"""Laws that minimise a free energy, of which e^{−V} is the simplest.

A stationary law π_θ minimises some G(p, θ) = E_θ(p) + ∫ p log p. Where E_θ(p) = ∫V_θ dp this is KL(p‖e^{−V}) up to a
constant, and π_θ ∝ e^{−V_θ}. In general the minimiser is the law of its own *field*,

    π_θ ∝ e^{−U_θ(·; π_θ)},        U_θ(x; p) = E_θ′(p)[x],

and particles with the drift −∇U_θ(·; p), p their own empirical law, sample it: everything that a sampler and Γ need of
V is asked of the field. What implicit differentiation needs besides is how the field answers to a change of p, the
*coupling*

    C ν = d/dε U_θ(·; p + εν),        ∇²_p G = δ/p + C,

for which ν is solved (`implicit_diffusion.gradients.conjugate_gradients`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_call, check_number, trying
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials.energy import value_of
from implicit_diffusion.showing import ShownModule, brief

SYMMETRY = 1e-4  # of the largest interaction: larger differences between W(x, y) and W(y, x) are not rounding


class InnerProblem(ShownModule, ABC):
    """A free energy G(p, θ) = E_θ(p) + ∫ p log p whose minimiser particles sample.

    A subclass says what E_θ is by two methods.
    """

    @abstractmethod
    def field(self, particles: Particles) -> Callable[[Tensor], Tensor]:
        """U_θ(·; p), a function (m, *event) → (m,), differentiable in its argument and in θ.

        Args:
            particles: p, which is held fixed; positions and weights are read now, not when the function is called.
        """

    @abstractmethod
    def coupling(self, particles: Particles, charges: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """C ν at the particles, symmetric in ν.

        Args:
            particles: p.
            charges: ν, as a number on every particle.
        """

    def forward(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
        """The field of the particles x, uniformly weighted, at these particles."""
        return self.field(Particles(x))(x)


class MeanField(InnerProblem):
    """Particles in a potential that attract or repel each other, at a temperature.

    The law minimises  E_p V_θ + ½ ∬ W_θ(x, x′) p(dx) p(dx′) + τ ∫ p log p,  which is τ times the free energy of

        U_θ(x; p) = (V_θ(x) + ∫ W_θ(x, x′) p(dx′)) / τ.

    A step of `ULA(τ h)` on it is one of mean-field Langevin dynamics, x⁺ = x − h(∇V + ∫∇W(x, ·)dp) + √(2τh) ξ. The
    field of n particles is a sum over all n: n² interactions a step.

    Args:
        potential: V, (n, *event) → (n,).
        interaction: W, from (n, *event) and (m, *event) to (n, m); symmetric.
        temperature: τ > 0.

    Raises:
        InvalidInputError: a potential or an interaction that is not a function of one or two arguments; τ ≤ 0.
    """

    def __init__(
        self, potential: nn.Module, interaction: Callable[[Tensor, Tensor], Tensor], temperature: float = 1.0
    ) -> None:
        super().__init__()
        check_call("potential", potential, "x")
        check_call("interaction", interaction, "x", "y")
        self.potential, self.interaction = potential, interaction
        self.temperature = check_number("temperature", temperature, 0)

    def _words(self) -> Iterable[str]:
        return brief(self.potential), f"interaction={brief(self.interaction)}", f"temperature={self.temperature:g}"

    def field(self, particles: Particles) -> Callable[[Tensor], Tensor]:
        """(V_θ + ∫ W_θ(·, x′) p(dx′)) / τ."""
        y, w = particles.x.detach(), particles.weights.detach()
        return lambda x: (value_of(self.potential, x) + self.interaction(x, y) @ w) / self.temperature

    @torch.no_grad()
    def coupling(self, particles: Particles, charges: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """∫ W_θ(·, x′) ν(dx′) / τ."""
        x = particles.x
        return (self.interaction(x, x) @ charges.to(x.dtype)).to(charges.dtype) / self.temperature


def field_at(potential: Callable[[Tensor], Tensor], x: Float[Tensor, "*n_event"]) -> Callable[[Tensor], Tensor]:
    """V; for an inner problem, the field of the particles x, which several processes gather."""
    if not isinstance(potential, InnerProblem):
        return potential
    whole = Particles(x.detach()).whole()
    with processes.alone():  # in which their weights are those of all
        return potential.field(whole)


@torch.no_grad()
def check_interaction(model: object, x: Float[Tensor, "n *event"]) -> None:
    """Try the interaction of a mean field on a few particles.

    Raises:
        InvalidInputError: another shape than (n, m), or W(x, y) that differs from W(y, x).
    """
    if not isinstance(model, MeanField):
        return
    few = x[:3].detach()
    with trying("interaction", f"particles of shapes {tuple(few[:2].shape)} and {tuple(few.shape)}"):
        part = model.interaction(few[:2], few)
    if not isinstance(part, Tensor) or part.shape != (len(few[:2]), len(few)):
        given = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise InvalidInputError(
            f"interaction must return one number per pair, shape ({len(few[:2])}, {len(few)}) for particles of shapes "
            f"{tuple(few[:2].shape)} and {tuple(few.shape)}, got {given}"
        )
    square = model.interaction(few, few)
    if not (square - square.mT).abs().amax() <= SYMMETRY * square.abs().amax():
        raise InvalidInputError(
            "interaction must be symmetric, W(x, y) = W(y, x), since x acts on y as y on x; use (W(x, y) + W(y, x))/2"
        )
