"""Costs along the path of a denoising chain.

Under u_θ and u_0 the rows are Gaussians of the same variance s_k² I, whose means differ by b_k (u_θ − u_0). By the
chain rule of relative entropy (Girsanov's theorem, exact in discrete time)

    KL(path_θ ‖ path_0) = Σ_k E_θ ‖b_k (u_θ − u_0)(m_k x_k, t_k)‖² / (2 s_k²)      in nats,

and it bounds the KL of the outputs x_N from above. Where s_k vanishes the means must agree: such rows stay with u_0.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.objectives.base import RunningCost
from implicit_diffusion.tables.table import ChainTable
from implicit_diffusion.tables.transition import Transition


def squared_norm(x: Float[Tensor, "slots batch *event"]) -> Float[Tensor, "slots batch"]:
    """‖x‖² of every sample."""
    return x.square().flatten(2).sum(-1)


class PathKL(RunningCost):
    """KL of the path to the pretrained one: c_k = ‖b_k(u_θ − u_0)‖² / (2 s_k²), in nats."""

    name = "path_kl"

    def cost(self, transition: Transition) -> Float[Tensor, "slots batch"]:
        return squared_norm(transition.shift) / 2

    def check(self, table: ChainTable, trained_rows: tuple[int, ...]) -> None:
        """Raise `InvalidInputError` where a trained row has (nearly) no noise: there the KL is infinite or useless."""
        otherwise = "for deterministic chains, use DriftPenalty instead of PathKL"
        table.check_noise(trained_rows, "PathKL is infinite on a trained row without noise", otherwise)


class DriftPenalty(RunningCost):
    """Distance of the drifts, for chains without noise: c_k = ‖b_k(u_θ − u_0)‖² / (2 h_k), h_k the row's time step."""

    name = "drift_penalty"

    def cost(self, transition: Transition) -> Float[Tensor, "slots batch"]:
        assert transition.u0 is not None
        return squared_norm(transition.b * (transition.u - transition.u0)) / (2 * transition.h.flatten(1))
