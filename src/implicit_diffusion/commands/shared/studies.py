"""The finished runs of a study, kept one by one, so that it can go on after an interruption.

The runs of a study follow from its config and their own seeds. One that is made again after an interruption is the one
that would have been made, bit for bit, so what is finished is all that has to be kept.
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
        directory: of the study, held; its checkpoint/ keeps the results, and metrics.jsonl is written from them.

    Raises:
        InvalidInputError: a checkpoint that is damaged, or of something else.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        state = load_state(directory.checkpoint) if directory.has_state else {"study": {}}
        if not isinstance(state, dict) or not isinstance(state.get("study"), dict):
            raise InvalidInputError(f"{directory.checkpoint} holds no study")
        self.results: dict[str, Any] = state["study"]
        with replacing(directory.path / "metrics.jsonl") as file:
            file.write_text("", encoding="utf-8")  # every run writes its lines, also one that was made before
        self._save()

    def once(
        self,
        *key: str | int | float,
        make: Callable[[], V],
        lines: Callable[[V], Iterable[Mapping[str, Any]]] | None = None,
    ) -> V:
        """What `make` returns, or returned before the interruption.

        Args:
            key: of the run within the study.
            make: the run; what it returns is a state as in `save_state`, and files that it writes are complete then.
            lines: the run's lines of metrics.jsonl, from its result.
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
