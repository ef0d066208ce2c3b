"""Evaluations that are stored while they are drawn: an interrupted one continues where it stopped, bit for bit.

A part of an evaluation depends on its number alone (`chains.evaluate_in_parts`). What is stored is valid as long as
everything that the numbers depend on is the same; otherwise the differences are named, and everything is drawn again.
Several processes call all of this alike; the main one reads and writes.

    state.safetensors   depends_on   what the numbers depend on, by name
                        parts        number of complete parts
                        reward, path_kl, log_ratio   (starts so far, repeats)
                        rewards      (starts so far, repeats, rewards), where there are several; otherwise None
                        samples      the first sample of each start, for as many starts as are wanted
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation.chains import Evaluation, evaluate_in_parts, joined, moved, weighed
from implicit_diffusion.files.states import has_state, load_state, save_state
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.processes import from_main, main_alone, main_only
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown

WRITE_EVERY = 5.0  # seconds between two writes, at least
WRITING_SHARE = 0.05  # of the time, that writing takes at most
DIFFERENCES = 3  # number of differences that are named
STORED_COLUMNS = ("reward", "path_kl", "log_ratio", "samples", "rewards")


@dataclass(frozen=True, repr=False)
class Stored(Shown):
    """An evaluation on disk, complete or in part.

    Args:
        folder: that holds it, now or later.
        depends_on: what its numbers depend on, by name; names and values are shown to people.
        starts: number of starts of the complete evaluation.
        shown: number of starts whose first sample is stored; None for all.
    """

    folder: Path
    depends_on: Mapping[str, str]
    starts: int
    shown: int | None = None

    @main_only
    def read(self) -> dict[str, Any] | None:
        """The stored state, if it is valid; None where nothing is stored.

        Raises:
            InvalidInputError: what is stored cannot be used; the message says why.
        """
        if not has_state(self.folder):
            return None
        state = load_state(self.folder)
        if not isinstance(state, dict) or not {"depends_on", "parts", *STORED_COLUMNS} <= state.keys():
            raise InvalidInputError("another release drew it")
        different = list(_differences(state["depends_on"], self.depends_on))
        if different:
            more = f", and {len(different) - DIFFERENCES} more" if len(different) > DIFFERENCES else ""
            raise InvalidInputError("; ".join(different[:DIFFERENCES]) + more)
        return state

    def is_whole(self, state: Mapping[str, Any]) -> bool:
        """Whether the evaluation is complete."""
        return len(state["reward"]) == self.starts

    @main_only
    def write(self, evaluation: Evaluation, parts: int = -1) -> None:
        """Replace what is stored.

        Args:
            evaluation: of the first `parts` parts; by default complete.
            parts: number of parts.
        """
        columns = {name: getattr(evaluation, name) for name in STORED_COLUMNS}
        columns["samples"] = self._narrow(evaluation.samples, 0)
        save_state(self.folder, {"depends_on": dict(self.depends_on), "parts": parts, **columns})

    def evaluate(
        self,
        chain: Chain,
        reward: Callable[..., Any] | Reward,
        noise: Noise,
        *,
        starts: int,
        repeats: int,
        progress: Callable[[int], None] = lambda done: None,
        skip: Callable[[int], None] = lambda done: None,
    ) -> Evaluation:
        """`evaluate`, continued where it was interrupted; the result has only the samples that are stored.

        Args:
            chain: as in `evaluate`.
            reward: as in `evaluate`.
            noise: as in `evaluate`.
            starts: as in `evaluate`.
            repeats: as in `evaluate`.
            progress: called with the number of trajectories just completed.
            skip: called with the number of trajectories that are stored already.
        """
        state: dict[str, Any] | None = None
        with suppress(InvalidInputError):  # a caller that reports the reason has called `read`
            state = self.read()
        parts: list[Evaluation] = []
        written = 0
        if state is not None:
            parts, written = [weighed(from_state(state, chain.device), reward)], state["parts"]
            skip(parts[0].reward.numel())
            if self.is_whole(state):
                return parts[0]
        count, due = written, time.monotonic() + WRITE_EVERY
        rest = evaluate_in_parts(chain, reward, noise, starts=starts, repeats=repeats, first=count)
        try:
            for part in rest:
                there = sum(len(before.reward) for before in parts)
                parts.append(replace(part, samples=self._narrow(part.samples, there)))
                count += 1
                progress(part.reward.numel())
                began = time.monotonic()
                if from_main((began > due).__bool__):  # its clock decides for all
                    self.write(joined(parts), count)
                    written, due = (
                        count,
                        time.monotonic() + max(WRITE_EVERY, (time.monotonic() - began) / WRITING_SHARE),
                    )
        except BaseException:  # an interrupt as well, perhaps of this process alone
            if written < count:
                main_alone(lambda: self.write(joined(parts), count))
            raise
        if written < count:
            self.write(joined(parts), count)
        return joined(parts)

    def _narrow(self, samples: Tensor, there: int) -> Tensor:
        """The samples to store of some starts, when `there` starts are stored already."""
        wanted = len(samples) if self.shown is None else max(0, self.shown - there)
        return samples[:wanted, :1].clone()


def from_state(state: Mapping[str, Any], device: torch.device) -> Evaluation:
    """The evaluation in a state that `Stored.read` returned, as far as it was drawn."""
    return moved(Evaluation(*(state[name] for name in STORED_COLUMNS)), device)


def _differences(before: Any, now: Mapping[str, str]) -> Iterator[str]:
    if not isinstance(before, dict):
        yield "it does not say what it depends on"
        return
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, is_now = (_in_short(side.get(name, "not there")) for side in (before, now))
            yield f"{name} was {was} and is {is_now}"


def _in_short(value: object) -> str:
    """A value for a line; a digest is cut."""
    text = str(value)
    return f"{text[:19]}…" if text.startswith("sha256 ") else text
