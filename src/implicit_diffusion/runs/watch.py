"""A training over a chain that runs away though its numbers are finite: seen before it replaces a sound one on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from implicit_diffusion.errors import DivergenceError
from implicit_diffusion.objectives import PathKL
from implicit_diffusion.runs.fit import Fit
from implicit_diffusion.samplers.chain import Chain

RISE = 1e4  # deviations of the pretrained reward


def most_sound(chain: Chain) -> float:
    """The path KL in nats beyond which nothing of the pretrained law is left.

    One of N·d/2 moves each of the d numbers of an event by a deviation of the step's own noise, in each of N steps:
    twenty times that, and a thousand nats more, for the smallest chains.
    """
    return 1000.0 + 10 * chain.num_steps * torch.Size(chain.event_shape).numel()


@dataclass
class Runaway:
    """Callback: stop a run over a chain when its path KL, or the rest of J, runs away though it is finite.

    A path KL may not be beyond `most_sound`. What J holds beside it may not rise above where it began by 10⁴ deviations
    of the pretrained reward.

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

    def __call__(self, fit: Fit) -> None:
        if self.began is None and "objective" in fit.metrics:
            self.began = self._rest(fit)
        if fit.updates % self.every == 0:
            found = self.unsound(fit)
            self.bad = self.bad + 1 if found else 0
            if found and self.bad >= self.patience:
                raise DivergenceError(f"after update {fit.updates}: {found}")

    def unsound(self, fit: Fit) -> str | None:
        """What has run away, if anything."""
        chain, advice = fit.chain, "take a smaller --lr, or a smaller --max-grad-norm"
        most = most_sound(chain)
        kl = float(fit.metrics.get("path_kl", 0.0))
        if kl > most:
            return f"the path KL is {kl:.3g} nats: beyond {most:.3g} nothing of the pretrained model is left; {advice}"
        rest = self._rest(fit) if "objective" in fit.metrics else None
        if rest is not None and self.began is not None and rest > self.began + RISE * self.reward_std:
            return f"J without its path KL rose from {self.began:.3g} to {rest:.3g}, it runs away; {advice}"
        return None

    def state_dict(self) -> dict[str, float | int | None]:
        """Where it began, and how many bad looks in a row there were."""
        return {"began": self.began, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.began, self.bad = state["began"], state["bad"]

    @staticmethod
    def _rest(fit: Fit) -> float:
        return float(fit.metrics["objective"]) - fit.loop.objective.weight(PathKL) * float(
            fit.metrics.get("path_kl", 0.0)
        )
