"""Whether −log p(x, z; θ) is normalised for every θ: the score identity on draws from the model itself.

If ∫∫ p(x, z; θ) dx dz = 1 for all θ, its derivative vanishes: E_{p(x, z; θ)} ∇_θ log p(x, z; θ) = 0. A term that
depends on θ alone and was left out, such as (d/2) log τ of a Gaussian with precision τ, is a constant in x and z; no
sampler of z notices, and the identity fails by just its derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_call, check_integer, check_type, trying
from implicit_diffusion.noise import Noise

GROUPS = 20  # independent estimates, whose spread is the standard error
ERRORS = 10  # standard errors that are no chance, however many parameters there are


def check_normalised(
    simulated: Callable[[int, Noise], Float[Tensor, " n"]], model: nn.Module, noise: Noise, *, n: int = 2000
) -> None:
    """Check by simulation that a joint density p(x, z; θ) of your own has all of its normalisers.

    Args:
        simulated: (n, noise) → (n,): draws n independent pairs (x, z) from the model as it is, without a gradient, and
            returns −log p(x_i, z_i; θ) of each, differentiable in θ.
        model: θ, the module whose parameters are checked.
        noise: source of the draws.
        n: pairs in all, at least 20.

    Raises:
        InvalidInputError: the mean of ∂ log p/∂θ over the draws is not zero, by ten standard errors, for a parameter
            that it names; values of another shape, not finite, or without a gradient.
    """
    check_call("simulated", simulated, "n", "noise")
    check_type("model", model, nn.Module, "its parameters are θ")
    check_type("noise", noise, Noise, "use Noise(0), for example")
    size = check_integer("n", n, GROUPS) // GROUPS
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise InvalidInputError("model has no parameters that require a gradient")
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for k in range(GROUPS):
        with torch.enable_grad(), trying("simulated", f"({size}, noise)"):
            values = simulated(size, noise.stream(k))
        if not isinstance(values, Tensor) or values.shape != (size,) or not values.isfinite().all():
            given = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise InvalidInputError(f"simulated must return {size} finite numbers, shape ({size},), got {given}")
        if not values.requires_grad:
            raise InvalidInputError("simulated returns values that do not depend on θ through torch operations")
        gradients = torch.autograd.grad(values.mean(), list(parameters.values()), materialize_grads=True)
        for row, gradient in zip(rows.values(), gradients, strict=True):
            row.append(gradient.flatten().double())
    for name, row in rows.items():
        score = -torch.stack(row)
        mean, error = score.mean(0), score.std(0) / GROUPS**0.5
        rounding = 1e-4 * score.abs().amax(0) + 1e-12
        worst = int((mean.abs() / (error + rounding)).argmax())
        if mean[worst].abs() > ERRORS * (error + rounding)[worst]:
            raise InvalidInputError(
                f"the density is not normalised: E ∂ log p(x, z; θ)/∂{name} must be 0 over the model's own draws, but "
                f"is {mean[worst]:.3g} ± {error[worst]:.1g}; a term that depends on {name} alone is missing, or the "
                "draws are not from this density"
            )
