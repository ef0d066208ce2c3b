"""Any torch function of weighted particles as an objective.

Write f(x, w) for F(Σ_i w_i δ_{x_i}). Moving mass ε from p to δ_{x_i} changes w alone, so F′(p)[x_i] = ∂f/∂w_i, up to
a constant; autograd does the rest (`objectives.by_autograd`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import check_call
from implicit_diffusion.frozen import modules_in
from implicit_diffusion.objectives.attributes import check_name
from implicit_diffusion.objectives.base import TerminalObjective
from implicit_diffusion.particles import Particles


class Functional(TerminalObjective):
    """F(p) = f(x, w) with F′_i = ∂f/∂w_i. Serves chains as well, where f is differentiable in x.

    A plug-in estimate of a nonlinear functional is biased by O(1/n), and so is its gradient.

    Args:
        function: f, from positions (n, *event) and weights (n,) to a 0-d tensor, differentiable in the weights, e.g.
            `lambda x, w: (w @ x - target).square().sum()`.
        name: under which metrics report it.

    Raises:
        InvalidInputError: something other than a function of two arguments.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], name: str = "functional") -> None:
        check_call("function", function, "x", "w")
        self.function, self.name = function, check_name(name)

    def networks(self) -> Iterable[nn.Module]:
        return modules_in(self.function)

    def value(self, particles: Particles) -> Float[Tensor, ""]:
        return self.function(particles.x, particles.weights)
