"""Evaluations that are kept while they are drawn: what is interrupted goes on where it stopped, bit for bit.

The parts of an evaluation depend on their numbers alone (`loops.evaluation.evaluate_in_parts`), and a reward of the
user's own on the global generators besides, whose states after the last whole part are kept with it. What is kept holds
for as long as all that it rests on is the same; else it is said what differs, and everything is drawn again.

    state.safetensors   rests   what the numbers rest on, by name
                        parts   how many are there
                        reward, path_kl, log_ratio   (starts so far, repeats)
                        samples   the first one of each start, of so many starts as are wanted
                        draws   the global generators
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.finetune.result import JUDGED
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Evaluation
from implicit_diffusion.evaluation.chains import evaluate_in_parts, joined
from implicit_diffusion.files.fingerprints import fingerprint
from implicit_diffusion.files.states import FILE, load_state, save_state
from implicit_diffusion.global_generators import Draws
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Reward
from implicit_diffusion.runs import RunDirectory, provenance
from implicit_diffusion.samplers.chain import Chain

EVERY, SHARE = 5.0, 0.05  # seconds between two writes, which take this share of the time at most
DIFFERENCES = 3  # that are named
SIDES = ("before", "after", "exported")
COLUMNS = ("reward", "path_kl", "log_ratio", "samples")


@dataclass(frozen=True)
class Stored:
    """An evaluation on disk, whole or in part.

    Args:
        folder: where it is, or will be.
        rests: what its numbers rest on, by name; names and values are for people, too.
        starts: how many make it whole.
        draws: the global generators that the reward may draw from.
        shown: of so many starts the first sample is kept; None for all.
    """

    folder: Path
    rests: Mapping[str, str]
    starts: int
    draws: Draws
    shown: int | None = None

    def read(self) -> dict[str, Any] | None:
        """What is there and rests on the same; None where there is nothing.

        Raises:
            InvalidInputError: something is there that cannot be used; the message says why, for people.
        """
        if not (self.folder / FILE).exists():
            return None
        state = load_state(self.folder)
        if not isinstance(state, dict) or not {"rests", "parts", "draws", *COLUMNS} <= state.keys():
            raise InvalidInputError("an earlier release drew it")
        different = list(_differences(state["rests"], self.rests))
        if different:
            more = f", and {len(different) - DIFFERENCES} more" if len(different) > DIFFERENCES else ""
            raise InvalidInputError("; ".join(different[:DIFFERENCES]) + more)
        return state

    def is_whole(self, state: Mapping[str, Any]) -> bool:
        """Whether nothing is left to draw."""
        return len(state["reward"]) == self.starts

    def write(self, found: Evaluation, parts: int = -1, draws: Mapping[str, Any] | None = None) -> None:
        """Replace what is there by an evaluation, of the first `parts` parts and with the generators after them.

        By default it is whole, and nothing was drawn from the generators.
        """
        columns = {name: getattr(found, name) for name in COLUMNS}
        columns["samples"] = self._narrow(found.samples, 0)
        save_state(self.folder, {"rests": dict(self.rests), "parts": parts, "draws": draws, **columns})

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
        """`loops.evaluate`, gone on with where it was interrupted; its samples are those that are kept.

        `skip` is called with the number of trajectories that are there, `progress` with that of those just done.
        """
        state: dict[str, Any] | None = None
        with suppress(InvalidInputError):  # whoever wants to say why has asked `read`
            state = self.read()
        parts: list[Evaluation] = []
        written, after = 0, self.draws.state_dict()
        if state is not None:
            parts, written = [evaluation(state, chain.device)], state["parts"]
            after = state["draws"] or after
            self.draws.load_state_dict(after)
            skip(parts[0].reward.numel())
            if self.is_whole(state):
                return parts[0]
        count, due = written, time.monotonic() + EVERY
        rest = evaluate_in_parts(chain, reward, noise, starts=starts, repeats=repeats, first=count)
        try:
            for part in _inside(self.draws, rest):
                there = sum(len(before.reward) for before in parts)
                parts.append(replace(part, samples=self._narrow(part.samples, there)))
                count, after = count + 1, self.draws.state_dict()
                progress(part.reward.numel())
                began = time.monotonic()
                if began > due:
                    self.write(joined(parts), count, after)
                    written, due = count, time.monotonic() + max(EVERY, (time.monotonic() - began) / SHARE)
        finally:  # whole, or interrupted
            if written < count:
                self.write(joined(parts), count, after)
        return joined(parts)

    def _narrow(self, samples: Tensor, there: int) -> Tensor:
        """The samples of some starts, when there are `there` already, without those that nobody looks at."""
        wanted = len(samples) if self.shown is None else max(0, self.shown - there)
        return samples[:wanted, :1].clone()


def evaluation(state: Mapping[str, Any], device: torch.device) -> Evaluation:
    """What was kept, as far as it goes."""
    return Evaluation(*(state[name].to(device) for name in COLUMNS))


def judgements(
    directory: RunDirectory, trained: Iterable[Tensor], starts: int, draws: Draws
) -> tuple[Stored, Stored, Stored]:
    """Before, after and exported, in the run's folder; says how far an interrupted judgement has come.

    Args:
        directory: of the run. provenance.json has all that was given, and changes that were accepted since.
        trained: the weights of the network that is judged.
        starts: that make each whole.
        draws: of all three, one after the other.
    """
    weights = hashlib.sha256("".join(fingerprint(weight)["tensor"] for weight in trained).encode())
    given = hashlib.sha256((directory.path / provenance.FILE).read_bytes())
    rests = {"the trained weights": weights.hexdigest(), provenance.FILE: given.hexdigest()}
    stored = [Stored(directory.path / JUDGED / name, rests, starts, draws) for name in SIDES]
    there = 0
    for part in stored:
        with suppress(InvalidInputError):
            there += len((part.read() or {"reward": ()})["reward"])
    if there:
        print(f"judging   goes on: {there} of {len(stored) * starts} starts are judged")
    return stored[0], stored[1], stored[2]


def forget(directory: RunDirectory) -> None:
    """Take away what `judgements` kept, once the outcome is."""
    for name in SIDES:
        shutil.rmtree(directory.path / JUDGED / name, ignore_errors=True)


def _inside(draws: Draws, parts: Iterator[Evaluation]) -> Iterator[Evaluation]:
    """The parts, each made with the global generators in place."""
    while True:
        with draws:
            part = next(parts, None)
        if part is None:
            return
        yield part


def _differences(before: Any, now: Mapping[str, str]) -> Iterator[str]:
    if not isinstance(before, dict):
        yield "what it rests on is not said"
        return
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, is_now = (_in_short(side.get(name, "not there")) for side in (before, now))
            yield f"{name} was {was} and is {is_now}"


def _in_short(value: object) -> str:
    """A value for a line; of a digest its beginning."""
    text = str(value)
    return f"{text[:19]}…" if text.startswith("sha256 ") else text
