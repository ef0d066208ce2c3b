"""Kernels that accept or reject their proposals (Metropolis et al., 1953; Hastings, 1970), and so are exact."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.draws import normals
from implicit_diffusion.samplers.kernel import Info, Kernel, State, Step


class MetropolisKernel(Kernel):
    """A kernel that leaves π_θ itself invariant: weights change with θ at fixed particles, A += V_θ(x) − V_θ′(x).

    Args:
        step_size: h > 0, or a function k ↦ h_k of the iteration k = 0, 1, … (`power_law`).

    Raises:
        InvalidInputError: a step size that is not positive and finite.
    """

    weighted, weighs_by_gradient = True, False

    def draws(self, generator: torch.Generator, count: int, x: Float[Tensor, "n *event"]) -> tuple[Tensor, ...]:
        """N(0, 1) with shape (count, n, *event), and U(0, 1) with shape (count, n) for the test."""
        uniform = torch.rand((count, len(x)), generator=generator, device=x.device, dtype=x.dtype)
        return normals(generator, count, x), uniform

    def forward_part(self, step: Step, after: State) -> Float[Tensor, " n"]:
        """V_θ at the new particles."""
        assert after.value is not None
        return exact(after.value)

    def backward_part(
        self, before: Float[Tensor, "n *event"], x: Float[Tensor, "n *event"], here: Energy, h: Float[Tensor, ""]
    ) -> Float[Tensor, " n"]:
        """V_θ′ at the same particles."""
        return exact(here.value)


def accept_or_reject(
    step: Step,
    proposal: Float[Tensor, "n *event"],
    value: Float[Tensor, " n"],
    log_ratio: Float[Tensor, " n"],
    uniform: Float[Tensor, " n"],
) -> tuple[State, Info]:
    """Accept each proposal with probability min(1, e^{log_ratio}); particles stay where they are otherwise.

    A proposal whose ratio is NaN is rejected.

    Args:
        step: whose particles wait for the test.
        proposal: where they would go.
        value: V there.
        log_ratio: log of the Metropolis ratio.
        uniform: U(0, 1).
    """
    log_ratio = log_ratio.to(value.dtype)
    accept = uniform < log_ratio.exp()  # False for NaN
    chosen = accept.view(-1, *[1] * (step.x.ndim - 1))
    x = torch.where(chosen, proposal, step.x)
    state = State(x, None, torch.where(accept, value, step.here.value))
    return state, Info(log_ratio.exp().clamp(max=1).nan_to_num(0.0))
