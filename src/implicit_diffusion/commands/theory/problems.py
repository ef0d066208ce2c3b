"""Three potentials on the line whose ℓ and ∇ℓ under maximum likelihood are known exactly.

    location    V = (x − θ)²/2                                                Z constant
    scale       V = e^θ x²/2                                                  log Z = −θ/2 + const
    modes       V = −log(s(2θ) e^{−(x − C)²/2} + s(−2θ) e^{−(x + C)²/2})      Z constant

with s the logistic function and C = 2: the mean of a Gaussian, its precision, and the weights of two modes between
which particles have to cross. Data y_j make

    ℓ(θ) = KL(data‖π_θ) + const = mean_j V_θ(y_j) + log Z_θ,

so that ℓ is a closed form, and ∇ℓ its derivative by autograd.

**Copies.** A particle is x ∈ R^{P × S}: a coordinate for each of S copies of each of P problems, with a θ each, and
V(x; θ) = Σ_ps V_p(x_ps; θ_ps). Under maximum likelihood the charges of particles do not depend on where they are, so
that all coordinates are independent runs, with the arithmetic of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from implicit_diffusion.showing import Shown, ShownModule

CENTRE = 2.0  # C
WIDEST = 20.0  # |θ| within which an optimum lies
FINE = 20_001  # points between which quantiles are interpolated
Elementwise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class Problem(Shown):
    """Maximum likelihood of one number θ.

    Args:
        name: as it is reported.
        energy: V(x; θ), elementwise.
        log_z: log ∫ e^{−V}, elementwise in θ, up to a constant.
        data: y_j.
        start: θ_0.
        reach: the law is within ±`reach` but for a mass below rounding.
    """

    name: str
    energy: Elementwise
    log_z: Callable[[Tensor], Tensor]
    data: tuple[float, ...]
    start: float
    reach: float

    def loss(self, theta: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """ℓ(θ), up to a constant."""
        at_data = torch.stack([self.energy(theta.new_tensor(y), theta) for y in self.data])
        return at_data.mean(0) + self.log_z(theta)

    def gradient(self, theta: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """∇ℓ(θ)."""
        return slope(self.loss, theta)

    def curvature(self, theta: float) -> float:
        """ℓ''(θ)."""
        return slope(lambda t: slope(self.loss, t, keep=True), torch.tensor(theta, dtype=torch.float64)).item()

    def quantiles(self, theta: float, levels: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The quantiles of π_θ at levels in (0, 1), by quadrature; of uniform levels they are draws."""
        x = torch.linspace(-self.reach, self.reach, FINE, dtype=levels.dtype)
        mass = (-self.energy(x, x.new_tensor(theta))).softmax(0).cumsum(0)
        i = torch.searchsorted(mass, levels).clamp(1, FINE - 1)
        share = (levels - mass[i - 1]) / (mass[i] - mass[i - 1]).clamp(min=1e-300)
        return x[i - 1] + share * (x[1] - x[0]) + (x[1] - x[0]) / 2

    @cached_property
    def optimum(self) -> float:
        """The θ with ∇ℓ(θ) = 0."""
        return root(lambda t: self.gradient(torch.tensor(t, dtype=torch.float64)).item(), -WIDEST, WIDEST)


class Copies(ShownModule):
    """V(x; θ) = Σ_ps V_p(x_ps; θ_ps), with the parameter `theta` of shape (problems, copies).

    Args:
        problems: one for each row of θ.
        theta: θ at the start.
    """

    def __init__(self, problems: Sequence[Problem], theta: Float[Tensor, "problems copies"]) -> None:
        super().__init__()
        self.problems, self.theta = tuple(problems), nn.Parameter(theta.clone())

    def forward(self, x: Float[Tensor, "n problems copies"]) -> Float[Tensor, " n"]:
        """V(x)."""
        rows = zip(self.problems, x.unbind(1), self.theta)
        return torch.stack([problem.energy(y, theta).sum(1) for problem, y, theta in rows]).sum(0)

    @property
    def data(self) -> Float[Tensor, "m problems copies"]:
        """The data of all copies, which are the same."""
        rows = torch.tensor([problem.data for problem in self.problems], dtype=self.theta.dtype)
        return rows.T[:, :, None].expand(-1, -1, self.theta.shape[1]).clone()


def slope(function: Callable[[Tensor], Tensor], at: Tensor, keep: bool = False) -> Tensor:
    """The derivative of an elementwise function, by autograd; `keep` allows to differentiate it again."""
    with torch.enable_grad():
        at = at if keep else at.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(function(at).sum(), at, create_graph=keep)
    return derivative


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is zero, by bisection to 1e-12."""
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def _location(x: Tensor, theta: Tensor) -> Tensor:
    return (x - theta).square() / 2


def _scale(x: Tensor, theta: Tensor) -> Tensor:
    return theta.exp() * x.square() / 2


def _modes(x: Tensor, theta: Tensor) -> Tensor:
    right = logsigmoid(2 * theta) - (x - CENTRE).square() / 2
    left = logsigmoid(-2 * theta) - (x + CENTRE).square() / 2
    return -torch.logaddexp(right, left)


LOCATION = Problem("location", _location, torch.zeros_like, data=(-1.0, -1.0, 1.0, 1.0), start=1.0, reach=12.0)
SCALE = Problem("scale", _scale, lambda theta: -theta / 2, data=(-1.0, -1.0, 1.0, 1.0), start=-0.5, reach=12.0)
MODES = Problem("modes", _modes, torch.zeros_like, data=(-2.0, 2.0, 2.0, 2.0), start=-0.5, reach=16.0)
PROBLEMS = (LOCATION, SCALE, MODES)
