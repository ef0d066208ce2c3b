"""A training that makes J worse: said while it runs, not when it has ended."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from implicit_diffusion.runs.fit import Fit

ERRORS = 4.0  # standard errors by which J must have risen


Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    """Where progress is shown as well."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Rise:
    """Callback: say at once that J on held-out noise stands above the pretrained chain's, and when it no longer does.

    It reads what `HeldOut` puts into the metrics, so it comes after it. J of the pretrained chain has no path KL: it is
    minus the mean reward that a plan measured, whatever β is.

    Args:
        j: of the pretrained chain.
        j_se: its standard error; the held-out one's is added, since the noise is another.
        say: gets the sentence; by default it is printed on stderr.
    """

    j: float
    j_se: float = 0.0
    say: Say = say_on_stderr
    above: bool = field(default=False, init=False)

    def __call__(self, fit: Fit) -> None:
        now = fit.metrics.get("held_out_objective")
        if now is None:
            return
        error = math.hypot(self.j_se, fit.metrics.get("held_out_objective_se", 0.0))
        if not self.above and now > self.j + ERRORS * error:
            self.above = True
            self.say(
                f"update {fit.updates}: J on held-out noise is {now:.4g} ± {error:.2g}, above the {self.j:.4g} of the "
                "pretrained model: this training makes it worse. If that stays so, take a smaller learning rate"
            )
        elif self.above and now < self.j:
            self.above = False
            self.say(f"update {fit.updates}: J on held-out noise is {now:.4g} ± {error:.2g}, below {self.j:.4g} again")

    def state_dict(self) -> dict[str, bool]:
        """What was said last."""
        return {"above": self.above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.above = state["above"]
