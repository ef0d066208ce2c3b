"""The nested loop: run the sampler to its end, differentiate, update, start again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from implicit_diffusion.errors import check_call, check_type, trying
from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.loops.on_chain import ChainLoop


class Nested(ChainLoop):
    """B fresh trajectories per step: N network calls forward and N with gradient for one gradient estimate.

    Args:
        estimator: of the gradient of one batch of trajectories; the exact adjoint by default.

    The other arguments are those of `ChainLoop`.
    """

    def __init__(self, *args: Any, estimator: Callable[..., dict[str, Tensor]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.estimator = Adjoint() if estimator is None else estimator
        check_call("estimator", self.estimator, "chain", "objective", "noise", "batch", "index")

    def step(self) -> dict[str, Any]:
        self.iteration += 1
        self.update.begin()
        with nullcontext() if self.update.updates else trying("estimator", "its first trajectory"):
            values = self.estimator(self.chain, self.objective, self.noise, self.batch, self.injected)
        check_type("what the estimator returns", values, dict, "it holds the terms' values by name")
        info = self.update.step(list(values.values()), lambda: self._diagnose() or self._bad_value(values))
        self.injected += 1
        return self._metrics(values) | info

    def _diagnose(self) -> str | None:
        """Replay the trajectory, whose noise is addressed by its number, up to the first bad state."""
        for stage, x in enumerate(self.chain.trajectory(self.noise, self.batch, self.injected)):
            if not x.isfinite().all():
                return (
                    f"iteration {self.iteration}: states x_{stage} of trajectory {self.injected} hold NaN or infinity"
                )
        return None
