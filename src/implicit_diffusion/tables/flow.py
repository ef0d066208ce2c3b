"""The memoryless chain of a flow-matching model.

Diffusers' flow models join data X and noise ε by x_σ = (1 − σ) X + σ ε, and the network predicts
u(x, t) = E[ε − X | x_σ = x] at t = Tσ. In the flow's own time τ = 1 − σ, from noise to data, with the velocity v = −u,
all of

    dX = (v + ½g² ∇log p_τ) dτ + g dB,          ∇log p_τ(x) = −ε̂/σ,       ε̂ = x + (1 − σ) u

have the same marginals. Only one g makes the path from noise to data forget where it began, so that the law of X_1
tilted by e^{R/β} can be reached by a control of the drift (Domingo-Enrich et al., *Adjoint Matching*, arXiv
2409.08861):

    g²(τ) = 2(1 − τ)/τ        with which        dX = (2v − X/τ) dτ + √(2(1 − τ)/τ) dB.

g is infinite at τ = 0, where the chain starts, but nothing has to be cut off: in terms of the predicted data
x̂ = x − σu, the drift is 2(x̂ − X)/(1 − τ) − X/τ, which is linear in X. A row holds x̂ constant and solves this linear
equation exactly. From σ down to σ', with α = 1 − σ, α' = 1 − σ',

    ρ = (α/σ)/(α'/σ')                            the ratio of the signal-to-noise amplitudes, 0 at σ = 1 and at σ' = 0
    x' = (σ'/σ) ρ x + α'(1 − ρ²) x̂ + σ'√(1 − ρ²) ξ

and, with x̂ = x − σu,

    a = α' + σ'ρ,      b = αρσ' − α'σ,      s = σ'√(1 − ρ²),      m = 1,      t = Tσ.

The row is the posterior of x_σ' given x_σ and x̂, as DDPM's step is, and the first-order step of SDE-DPM-Solver++. The
first row (σ = 1) has a = −b: it keeps of x_0 only x_0 − u(x_0), the predicted data. The last row (σ' = 0) returns x̂, s
= 0.

The N noise levels are 1, 1 − 1/N, …, 1/N before the scheduler's own shift and spacing, as the pipelines of large flow
models choose them. By default the scheduler's last level above 0 is 1/T, whatever N is: the row that leads there would
have a large b and hardly any noise, and would dominate the path KL.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.tables.refusals import check_num_steps, check_scheduler, check_shift
from implicit_diffusion.tables.table import ChainTable

FLOW_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def is_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler runs a flow-matching model (u = noise − data)."""
    check_scheduler(scheduler)
    config = scheduler.config
    return (
        type(scheduler).__name__.startswith("FlowMatch")
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def memoryless_flow(scheduler: Any, num_steps: int, *, mu: float | None = None) -> ChainTable:
    """The memoryless SDE of a flow-matching model, with the shift and σ-spacing of its scheduler (module docstring).

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler`; it is copied, not changed.
        num_steps: N, from 1 to the scheduler's number of training timesteps.
        mu: exponent of the resolution-dependent time shift, for schedulers with use_dynamic_shifting=True.

    Returns:
        N rows with h_k = σ_k − σ_{k+1}, the flow time covered; `initial_std` is 1.

    Raises:
        InvalidInputError: another scheduler; num_steps out of range; σ's that do not fall from at most 1 to 0.
    """
    name = type(scheduler).__name__
    if name != "FlowMatchEulerDiscreteScheduler":
        raise InvalidInputError(
            "scheduler: the memoryless flow needs the noise levels of a FlowMatchEulerDiscreteScheduler, "
            f"got {name}; the memoryless chain of a diffusion model is DDPM."
        )
    num_steps = check_num_steps(scheduler, num_steps)
    check_shift(scheduler, mu)
    levels = copy.deepcopy(scheduler)
    even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
    levels.set_timesteps(num_steps, sigmas=even, **({} if mu is None else {"mu": mu}))
    return memoryless_at(levels, num_steps, mu=mu)


def memoryless_at(levels: Any, num_steps: int, *, mu: float | None = None) -> ChainTable:
    """As `memoryless_flow`, at the N noise levels that a scheduler has been set to; `mu` is for the table's name.

    Raises:
        InvalidInputError: σ's that do not fall from at most 1 to 0.
    """
    name = type(levels).__name__
    sigma, after = levels.sigmas[:-1].double(), levels.sigmas[1:].double()
    if len(sigma) != num_steps or not ((sigma > after).all() and sigma[0] <= 1 and after[-1] == 0):
        raise InvalidInputError(
            f"scheduler: the noise levels of {name} must fall from at most 1 to 0, got {levels.sigmas.tolist()}; use "
            "invert_sigmas=False, and shift_terminal with several steps only."
        )
    alpha, alpha_after = 1 - sigma, 1 - after
    rho = alpha * after / (alpha_after * sigma)
    ones = torch.ones_like(sigma)
    shift, spacing = levels.config.shift, [key for key in FLOW_SIGMAS if levels.config.get(key)]
    return ChainTable(
        a=alpha_after + after * rho,
        b=alpha * rho * after - alpha_after * sigma,
        s=after * ((1 - rho) * (1 + rho)).sqrt(),
        m=ones,
        t=levels.timesteps.double(),
        h=sigma - after,
        initial_std=1.0,
        name=", ".join(
            [
                f"memoryless flow, {num_steps} steps",
                *(key.removeprefix("use_").replace("_", " ") for key in spacing),
                *[f"shift={shift:g}"] * (shift != 1),
                *([] if mu is None else [f"mu={mu:g}"]),
            ]
        ),
    )
