"""Results of a study, run by run, so that it can continue after an interruption.

The runs of a study depend on its config and their own seeds only. A run that is repeated after an interruption gives
the same bits, so that only the results of finished runs have to be kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.runs import RunDirectory

V = TypeVar("V")


class Study:
    """The finished runs of a study.

    Args:
        directory: of the study, held; checkpoint/ has the results, and metrics.jsonl is written from them.

    Raises:
        InvalidInputError: a checkpoint that is damaged, or that is not of a study.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        state = load_state(directory.checkpoint) if directory.has_state else {"study": {}}
        if not isinstance(state, dict) or not isinstance(state.get("study"), dict):
            raise InvalidInputError(f"{directory.checkpoint} does not hold a study; choose another folder")
        self.results: dict[str, Any] = state["study"]
        with replacing(directory.path / "metrics.jsonl") as file:
            file.write_text("", encoding="utf-8")  # every run writes its lines, also one that finished before
        directory.tracking.rewind(0)
        self._save()

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

    def _save(self) -> None:
        save_state(self.directory.checkpoint, {"study": self.results})
