r"""The adjoint measure where it has no closed form: a linear solve on the weights of the particles.

For G(p, θ) = E_θ(p) + ∫ p log p (`potentials.inner_problem`) on particles of weights w, with Hessian H = diag(1/w) + C,

    H ν + λ = −F′,        Σ_j ν_j = 0,        Γ = ∇_θ ⟨ν, ∇_w G⟩ = ∇_θ Σ_j ν_j U_θ(x_j; p).

With ν = √w y the constraint says that y is orthogonal to q = √w, a unit vector, and the system becomes

    (I + √w C √w) y = −√w F′        on the complement of q:

a perturbation of the identity, which is what a solver for C = 0 would invert. Conjugate gradients (Hestenes and
Stiefel, *Methods of Conjugate Gradients for Solving Linear Systems*, 1952) stay in that subspace, need one coupling a
step, and about as many steps as C has directions that matter.

**Where they may not be trusted.** A direction d with ⟨d, (I + √w C √w) d⟩ ≤ 0 means that the particles are at no
minimum of G: attraction is stronger than noise, and there may be several laws. Steps end there. Otherwise they end when
the residual is below `tolerance`, relative to the right-hand side, or after `steps`. `take_info` tells which, and the
true residual.

The closed form of C = 0 is divided by 1 − Σw² in order to be unbiased (`implicit_diffusion.gradients.gibbs`), and so is
ν here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_call, check_integer, check_number, shown, trying
from implicit_diffusion.gradients.adjoint_measure import AdjointMeasure, AdjointSolver
from implicit_diffusion.objectives import FirstVariation
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import exact
from implicit_diffusion.showing import Shown, brief

Coupling = Callable[[Particles, Tensor], Tensor]


class ConjugateGradients(Shown, AdjointSolver):
    """ν of an inner problem, on particles. It starts from its last solution, so it serves one loop.

    Args:
        coupling: C, from the particles and charges on them to numbers on them; linear and symmetric in the charges
            (`InnerProblem.coupling`).
        tolerance: of the residual, relative to the right-hand side.
        steps: the largest number of steps of a solve.

    Raises:
        InvalidInputError: a coupling that is not a function of two arguments; a tolerance or a number of steps that is
            not positive.
    """

    supports = ("particles",)

    def __init__(self, coupling: Coupling, *, tolerance: float = 1e-8, steps: int = 200) -> None:
        check_call("coupling", coupling, "particles", "charges")
        self.coupling = coupling
        self.tolerance, self.steps = check_number("tolerance", tolerance, 0), check_integer("steps", steps)
        self._tried = False
        self._last: dict[str, Tensor] = {}
        self._info: dict[str, float] = {}

    def _words(self) -> Iterable[str]:
        return brief(self.coupling), f"tolerance={self.tolerance:g}", f"steps={self.steps}"

    def __call__(self, variation: FirstVariation, particles: Particles) -> AdjointMeasure:
        """ν on the particles, from a start of its own."""
        return self.solve(variation, particles, "")

    @torch.no_grad()
    def solve(self, variation: FirstVariation, particles: Particles, name: str) -> AdjointMeasure:
        """ν on the particles, from the last solution for the term of this name."""
        assert variation.function is not None  # `supports` admits nothing else
        q = exact(particles.weights).sqrt()

        def onto(v: Tensor) -> Tensor:  # the complement of q
            return v - (q @ v) * q

        def system(y: Tensor) -> Tensor:
            return onto(y + q * self._coupled(particles, q * y))

        function = exact(variation.function)
        b = onto(-q * (function - q.square() @ function))
        last = self._last.get(name)
        y = b if last is None or last.shape != b.shape else onto(last.to(b))
        r = b - system(y)
        d, rr, made, curved = r, r @ r, 0, False
        goal = self.tolerance * float(b.norm())
        while float(rr.sqrt()) > goal and made < self.steps:
            image = system(d)
            curvature = d @ image
            if not float(curvature) > 0:
                curved = True
                break
            y = y + rr / curvature * d
            r = r - rr / curvature * image
            d, rr, made = r + (r @ r) / rr * d, r @ r, made + 1
        residual = float((b - system(y)).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))
        self._info = {
            "solve_residual": max(residual, self._info.get("solve_residual", 0.0)),
            "solve_steps": self._info.get("solve_steps", 0) + made,
            "negative_curvature": max(float(curved), self._info.get("negative_curvature", 0.0)),
        }
        if name and y.isfinite().all():
            self._last[name] = y
        charges = q * y / (1 - q.square().square().sum())
        return AdjointMeasure(charges.to(particles.x.dtype))

    def _coupled(self, particles: Particles, charges: Tensor) -> Tensor:
        """C ν, tried when it is first asked for."""
        if self._tried:
            return exact(self.coupling(particles, charges))
        with trying("coupling", f"{len(particles)} particles and charges of shape {tuple(charges.shape)}"):
            image = self.coupling(particles, charges.clone())
        if not isinstance(image, Tensor) or image.shape != charges.shape:
            raise InvalidInputError(
                f"coupling must return one number per particle, shape {tuple(charges.shape)}, got {shown(image)}"
            )
        self._tried = True
        return exact(image)

    def take_info(self) -> dict[str, float]:
        """What the solves since the last call were like: the largest residual, all steps, whether one met negative
        curvature.
        """
        info, self._info = self._info, {}
        return info

    def state_dict(self) -> dict[str, Any]:
        return dict(self._last)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = dict(state)
