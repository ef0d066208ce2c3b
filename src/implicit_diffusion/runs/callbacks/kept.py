"""The trained part of a model as it was at one evaluation: kept beside the checkpoint, and put back at the end.

The last model of a run need not be the one to keep: J may have risen, or the path KL may be beyond its target. A
callback that can tell keeps the best model so far, by its own measure, and puts it back when it has stopped the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.frozen import load_trained_state, trained_state
from implicit_diffusion.runs.state import Fit


@dataclass
class Kept:
    """The trained part of the model, and of its average, at one update; on disk where the run has a directory.

    Its file is written at the evaluation; its numbers go with the checkpoint. A run that continues from an earlier
    checkpoint makes the same evaluations, and so the same file, before it needs it.

    Args:
        name: of its folder, below kept/ of the run.
        numbers: results of that evaluation, with `updates`; None while nothing is kept.
    """

    name: str
    numbers: dict[str, float] | None = None
    _held: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def keep(self, fit: Fit, **numbers: float) -> None:
        """Keep what is trained as it is now, in place of what was kept before.

        Raises:
            StorageError: it cannot be written.
        """
        model, ema = fit.loop.model, fit.loop.update.ema
        average = None if ema is None else trained_state(ema, like=model, prefix="module.")
        self.numbers = {"updates": fit.updates, **numbers}
        state = {"numbers": self.numbers, "model": trained_state(model), "average": average}
        if fit.directory is None:
            self._held = _copy(state)
        else:
            save_state(fit.directory.kept / self.name, state)

    def restore(self, fit: Fit) -> bool:
        """Put it back into the model and its average; returns whether anything was kept.

        Raises:
            InvalidInputError: the file is gone or damaged.
        """
        if self.numbers is None:
            return False
        state = self._read(fit)
        self.numbers = fit.kept = state["numbers"]
        for module, tensors in _modules(fit, state):
            load_trained_state(module, tensors)
        return True

    def line(self, fit: Fit) -> Callable[[float], None]:
        """A function that puts θ at a share of the way from the kept model to the present one.

        Raises:
            InvalidInputError: as `restore`.
        """
        pairs = list(_modules(fit, self._read(fit)))
        ends = [(m, tensors, _copy({name: m.state_dict()[name] for name in tensors})) for m, tensors in pairs]

        def move(share: float) -> None:
            for module, begin, end in ends:
                floating = [name for name, value in begin.items() if value.is_floating_point()]
                load_trained_state(
                    module, begin | {name: torch.lerp(begin[name], end[name], share) for name in floating}
                )

        return move

    def _read(self, fit: Fit) -> dict[str, Any]:
        state = self._held if fit.directory is None else load_state(fit.directory.kept / self.name)
        assert state is not None
        return dict(state)


def _modules(fit: Fit, state: dict[str, Any]) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """The model and its average, each with its kept tensors."""
    yield fit.loop.model, state["model"]
    if fit.loop.update.ema is not None:
        yield fit.loop.update.ema, state["average"]


def _copy(value: Any) -> Any:
    """The same tree with tensors of its own, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
