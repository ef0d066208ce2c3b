"""Steps that watch the weights: as far along the optimizer's step as enough particles stay effective.

The optimizer proposes a step from θ_0 to θ_1. On the way, θ(s) = θ_0 + s (θ_1 − θ_0), particles that stay where they
are have the log-weights that the next iteration would give them,

    A(s) = A + forward part − backward part under θ(s),        ESS(s) = 1/Σ w(s)²,   w(s) = softmax A(s),

and the step is made in full where ESS(1) ≥ least; otherwise up to a share s at which ESS(s) ≥ least. Where V is linear
in θ, as it is to first order, A(s) = A(0) + s (A(1) − A(0)), and the share is found on these numbers alone, by
bisection. Then V under θ(s) says what A(s) is; if the ESS falls short, [0, s] is the next interval. So what is kept is
the true ESS, and not a prediction of it.

Particles are resampled below n/2. If `least` is lower than that, a shortened step ends in a resampling and the next one
begins with equal weights: θ moves on, however large the optimizer's steps are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.potentials.energy import Energy, energy_of, value_of
from implicit_diffusion.samplers.kernel import Kernel
from implicit_diffusion.samplers.weighted_state import WeightedState, effective, reweighted

ROUNDS = 10  # of shortening; then the step is not made at all
MARGIN = 0.05  # of the way from `least` to ESS(0), by which a predicted share aims higher: V is not quite linear
BISECTIONS = 40


class Segment:
    """θ(s) = θ_0 + s (θ_1 − θ_0), from where parameters were to where a step has put them; both ends to the bit.

    Args:
        parameters: at θ_1.
        before: copies of them at θ_0.
    """

    @torch.no_grad()
    def __init__(self, parameters: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        self.parameters, self.before = parameters, before
        self.after = [p.clone() for p in parameters]

    @torch.no_grad()
    def go_to(self, share: float) -> None:
        """Set the parameters to θ(share)."""
        for p, old, new in zip(self.parameters, self.before, self.after, strict=True):
            p.copy_(new if share == 1 else old + share * (new - old) if share else old)


def log_weights_of(kernel: Kernel, model: nn.Module, state: WeightedState) -> Float[Tensor, " n"]:
    """A under the present θ. Of V's gradient only the increments of inexact kernels make use."""
    if kernel.weighs_by_gradient:
        here = energy_of(model, state.x)
    else:
        with torch.no_grad():
            here = Energy(value_of(model, state.x), torch.zeros_like(state.x))
    return reweighted(kernel, state, here).log_weights


def shorten(segment: Segment, log_weights: Callable[[], Float[Tensor, " n"]], least: float) -> tuple[float, int]:
    """Move θ back along a step, as far as is needed for `least` effective particles.

    Args:
        segment: the step; θ is at its end.
        log_weights: computes A under the present θ.
        least: effective sample size, below the one at which particles are resampled.

    Returns:
        the share of the step that is made, 1 for all of it, and how often the log-weights were computed.
    """
    there = log_weights()
    if _enough(there, least):
        return 1.0, 1
    segment.go_to(0.0)
    here, share = log_weights(), 1.0
    for evaluations in range(2, 2 + ROUNDS):
        share *= _predicted(here, there, least)
        segment.go_to(share)
        if share == 0:
            return share, evaluations
        there = log_weights()
        if _enough(there, least):
            return share, evaluations + 1
    segment.go_to(0.0)
    return 0.0, 2 + ROUNDS


def _enough(log_weights: Tensor, least: float) -> bool:
    return bool(effective(log_weights) >= least)  # NaN is not enough


def _predicted(here: Tensor, there: Tensor, least: float) -> float:
    """The share of the way from `here` to `there` at which the ESS of log-weights on a straight line is `least`."""
    if not there.isfinite().all():
        return 0.5
    here, difference = here.double(), there.double() - here.double()
    most = effective(here).item()
    if not most >= least:
        return 0.0  # it is not θ that leaves too few
    aim, low, high = least + MARGIN * (most - least), 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(here + middle * difference) >= aim else (low, middle)
    return low
