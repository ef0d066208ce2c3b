"""Guidance: sample from a tilted potential in place of training one.

    V_guided(x) = V(x) − λ R(x),        density ∝ π(x) e^{λ R(x)}

A sampler that is driven by it needs ∇R in every step, for every sample that is drawn; training needs it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_call, check_number
from implicit_diffusion.reward_values import given_as, of_tensors, scores_of
from implicit_diffusion.showing import ShownModule, brief


class Guided(ShownModule):
    """V − λR as a potential.

    Args:
        potential: V, (n, *event) → (n,).
        reward: R, (n, *event) → (n,), differentiable, in any of the forms that `Reward` accepts.
        weight: λ; finite.

    Raises:
        InvalidInputError: a potential or reward that is not a function of one argument; a reward that is given arrays
            or pictures; a weight that is NaN or infinite.
    """

    def __init__(self, potential: nn.Module, reward: Callable[[Tensor], Tensor], weight: float) -> None:
        super().__init__()
        check_call("potential", potential, "x")
        check_call("reward", reward, "x")
        if words := given_as(of_tensors(reward)):
            raise InvalidInputError(
                f"reward is called with {words}, as the annotation of its first argument asks for, and has no "
                "gradient, which guidance follows; write it for torch.Tensor, with torch operations throughout"
            )
        self.potential, self.reward, self.weight = potential, reward, check_number("weight", weight)

    def _words(self) -> Iterable[str]:
        return brief(self.potential), f"reward={brief(self.reward)}", f"weight={self.weight:g}"

    def forward(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, " n"]:
        """V(x) − λR(x)."""
        return self.potential(x) - self.weight * scores_of(self.reward(x), x)
