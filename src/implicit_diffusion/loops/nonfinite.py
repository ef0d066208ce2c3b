"""Why a loop over particles stopped: what became NaN or infinite, in words, with what to change."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.potentials.energy import value_of

SINGLE_PARTICLE = 1.001  # effective particles: one carries all the weight


def what_failed(
    potential: nn.Module,
    particles: Float[Tensor, "n *event"],
    places: Iterable[tuple[str, Tensor]],
    effective: Float[Tensor, ""] | None,
) -> str | None:
    """What is NaN or infinite, in words; None where neither the particles nor V are to blame.

    Args:
        potential: V.
        particles: after the step that failed.
        places: points where V must be finite, and what they are called.
        effective: the effective sample size before the step; None for particles without weights.
    """
    bad = int((~particles.flatten(1).isfinite().all(1)).sum())
    if bad:
        return (
            f"{bad} of {len(particles)} particles became NaN or infinite; use a smaller step size, or check that the "
            "potential confines them"
        )
    if effective is not None and effective < SINGLE_PARTICLE:
        return (
            "one particle carries all the weight, since θ moved too far in one step; use a smaller learning rate or "
            "more particles"
        )
    for name, x in places:
        with eval_mode(potential), torch.no_grad():
            unbounded = int((~value_of(potential, x).isfinite()).sum())
        if unbounded:
            return (
                f"V is NaN or infinite at {unbounded} of {len(x)} {name}; use a smaller step size, or check that the "
                "potential confines the particles and is finite on data"
            )
    return None
