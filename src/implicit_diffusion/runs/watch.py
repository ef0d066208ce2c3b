"""A training over a chain that runs away though its numbers are finite: seen before it replaces a sound one on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from implicit_diffusion.errors import DivergenceError
from implicit_diffusion.objectives import PathKL
from implicit_diffusion.runs.fit import Fit

RISE = 1e4  # deviations of the pretrained reward


@dataclass
class Runaway:
    """Callback: stop a run over a chain when its path KL, or the rest of J, runs away though it is finite.

    A path KL of N·d/2 nats moves each of the d numbers of an event by a deviation of the step's own noise, in each of N
    steps. Beyond twenty times that (and a thousand nats more, for the smallest chains) nothing of the pretrained law is
    left. What J holds beside the path KL may not rise above where it began by 10⁴ deviations of the pretrained reward.

    Args:
        reward_std: of the pretrained chain.
        every: updates between two looks; states to be saved are looked at in any case.
        patience: bad looks in a row that stop.

    Raises:
        DivergenceError: when called, with what to change.
    """

    reward_std: float
    every: int = 10
    patience: int = 2
    began: float | None = field(default=None, init=False)
    bad: int = field(default=0, init=False)
    seen: dict[str, Any] = field(default_factory=dict, init=False)

    def __call__(self, fit: Fit) -> None:
        new = self._see(fit)
        if self.began is None and "rest" in self.seen:
            self.began = float(self.seen["rest"])
        if new and fit.updates % self.every == 0:  # a queue that drains tells nothing new: no second look at one batch
            found = self.unsound(fit)
            self.bad = self.bad + 1 if found else 0
            if found and self.bad >= self.patience:
                raise DivergenceError(f"after update {fit.updates}: {found}")

    def unsound(self, fit: Fit) -> str | None:
        """What has run away, if anything, by the last numbers that there were."""
        self._see(fit)
        chain, advice = fit.chain, "take a smaller --lr, or a smaller --max-grad-norm"
        most = 1000 + 10 * chain.num_steps * torch.Size(chain.event_shape).numel()
        kl = float(self.seen.get("path_kl", 0.0))
        if kl > most:
            return f"the path KL is {kl:.3g} nats: beyond {most:.3g} nothing of the pretrained model is left; {advice}"
        rest = float(self.seen["rest"]) if "rest" in self.seen else None
        if rest is not None and self.began is not None and rest > self.began + RISE * self.reward_std:
            return f"J without its path KL rose from {self.began:.3g} to {rest:.3g}, it runs away; {advice}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where it began, how many bad looks in a row there were, and the last numbers."""
        seen = {name: float(value) for name, value in self.seen.items()}
        return {"began": self.began, "bad": self.bad, "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.began, self.bad, self.seen = state["began"], state["bad"], state.get("seen", {})

    def _see(self, fit: Fit) -> bool:
        """Whether the metrics have what is watched; it is kept, unread, since a device would be waited for."""
        m = fit.metrics
        new = {"path_kl": m["path_kl"]} if "path_kl" in m else {}
        if not new and "path_kl" in self.seen and "held_out_path_kl" in m:  # all that a queue tells while it drains
            new = {"path_kl": m["held_out_path_kl"]}
        if "objective" in m:
            new["rest"] = m["objective"] - fit.loop.objective.weight(PathKL) * m.get("path_kl", 0.0)
        self.seen |= new
        return bool(new)
