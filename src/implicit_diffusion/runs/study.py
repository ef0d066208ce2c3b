"""Results of a study, run by run, so that it can continue after an interruption.

The runs of a study depend on its config and their own seeds only. A run that is repeated after an interruption gives
the same bits, so that only the results of finished runs have to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from implicit_diffusion.errors import InvalidInputError, check_integer
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.processes import main_only
from implicit_diffusion.runs import RunDirectory

V = TypeVar("V")


class Study:
    """The finished runs of a study.

    Args:
        directory: of the study, held; checkpoint/ has the results, and metrics.jsonl is written from them.
        keep: number of checkpoints that stay, ≥ 1.

    Raises:
        InvalidInputError: all checkpoints are damaged, or the newest is not of a study.
    """

    def __init__(self, directory: RunDirectory, keep: int = KEEP) -> None:
        self.directory, self.keep = directory, check_integer("keep", keep)
        self.results: dict[str, Any] = self._begin()

    def once(
        self,
        *key: str | int | float,
        make: Callable[[], V],
        lines: Callable[[V], Iterable[Mapping[str, Any]]] | None = None,
    ) -> V:
        """The result of a run: what `make` returns, or returned before the interruption.

        Args:
            key: of the run within the study.
            make: makes the run; returns a state as `save_state` takes it, when all files that it writes are complete.
            lines: lines of metrics.jsonl, made from the result.
        """
        name = json.dumps(key)
        if name not in self.results:
            self.results[name] = make()
            self._save()
        result: V = self.results[name]
        if lines is not None:
            self.directory.append_metrics(*lines(result))
        return result

    def together(
        self,
        *keys: tuple[str | int, ...],
        make: Callable[[list[int]], Iterable[V]],
        lines: Callable[[V], Iterable[Mapping[str, Any]]] | None = None,
    ) -> list[V]:
        """The results of runs that are made at the same time: as `once`, for each of them.

        Args:
            keys: of the runs within the study.
            make: makes the runs at these positions among the keys; returns their states in this order.
            lines: lines of metrics.jsonl, made from one result.
        """
        names = [json.dumps(key) for key in keys]
        missing = [i for i, name in enumerate(names) if name not in self.results]
        if missing:
            made = make(missing)
            self.results |= {names[i]: state for i, state in zip(missing, made, strict=True)}
            self._save()
        kept = [partial(self.results.__getitem__, name) for name in names]
        return [self.once(*key, make=each, lines=lines) for key, each in zip(keys, kept)]

    @main_only
    def _begin(self) -> dict[str, Any]:
        """The results so far; metrics.jsonl is emptied."""
        state = self.directory.read_checkpoint().state if self.directory.has_state else {"study": {}}
        if not isinstance(state, dict) or not isinstance(state.get("study"), dict):
            raise InvalidInputError(f"{self.directory.checkpoint} does not hold a study; choose another folder")
        with replacing(self.directory.path / "metrics.jsonl") as file:
            file.write_text("", encoding="utf-8")  # every run writes its lines, also one that finished before
        self.directory.tracking.rewind(0)
        self.results = state["study"]
        self._save()
        return self.results

    def _save(self) -> None:
        self.directory.checkpoints.save(len(self.results), {"study": self.results}, self.keep)
