"""The network of a pipeline as a denoiser u(x, t, prompt), called exactly as the pipeline calls it.

On row k the pipeline makes its output of the answers u_j of all calls and parts,

    o_k = d_k x_k + κ_k Σ_j c_j u_j,     Σ_j c_j = 1,

with c = (1 − w, w) under guidance of scale w and c = (1) without. Then u = Σ_j c_j u_j is the denoiser, and d_k and the
scale κ_k (−1 where the pipeline turns the sign) go into the chain's table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.embedding_table import fits
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.pipelines.arguments import filled
from implicit_diffusion.models.pipelines.placing import bytes_held, placed
from implicit_diffusion.showing import Shown, of_network

PROMPT = "prompt"  # the condition's name: the number of a prompt


@dataclass(frozen=True)
class PlannedCall:
    """One call of the network per evaluation of u.

    Args:
        roles: its arguments, bound to the values of all prompts.
        weights: c of every part.
    """

    roles: dict[str, Any]
    weights: tuple[float, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Shown):
    """All calls of one evaluation; copies of a denoiser share it, embeddings included.

    Values that fit into memory (`embedding_table.fits`) are copied to the device that first asks for them, and stay
    there, so that no call waits for a transfer. Of others, the rows of a batch travel.
    """

    calls: tuple[PlannedCall, ...]
    prompts: int  # how many there are
    rows: Tensor | None = None  # of each prompt, its row in the values; None where each has its own
    _copies: dict[torch.device, tuple[PlannedCall, ...]] = field(default_factory=dict, repr=False)
    _rows: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @property
    def kept(self) -> int:
        """Bytes that stay on the device of the network."""
        total = sum(bytes_held(call.roles) for call in self.calls)
        return total if fits(total) else 0

    def at(self, device: torch.device) -> tuple[PlannedCall, ...]:
        """The calls, with values on a device unless they are too large to stay there."""
        if device not in self._copies:
            moved = (PlannedCall(placed(call.roles, device), call.weights) for call in self.calls)
            self._copies[device] = tuple(moved) if self.kept else self.calls
        return self._copies[device]

    def rows_of(self, which: Tensor) -> Tensor:
        """The rows of prompts by their numbers."""
        if self.rows is None:
            return which
        if which.device not in self._rows:
            self._rows[which.device] = self.rows.to(which.device)
        return self._rows[which.device][which]

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self


class PipelineDenoiser(DiffusersDenoiser):
    """u(x, t, prompt) of a pipeline's network, guidance included.

    Args:
        model: the network.
        plan: how the pipeline calls it.

    Attributes:
        precision: dtype that the network's layers compute in, by autocast; None for that of its weights.
        compiled: called in place of `model` if it has been compiled, otherwise None.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        nn.Module.__init__(self)
        self.model, self.plan = model, plan
        self.precision, self.compiled = None, None

    def under(self, plan: Plan) -> PipelineDenoiser:
        """The same network, called as another plan says, such as one of another guidance."""
        other = PipelineDenoiser(self.model, plan).train(self.training)
        other.precision, other.compiled = self.precision, self.compiled
        return other

    def _words(self) -> Iterable[str]:
        yield of_network(self.model)
        yield f"weights={tuple(round(c, 4) for call in self.plan.calls for c in call.weights)}"
        yield f"prompts={self.plan.prompts}"

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Any
    ) -> Float[Tensor, "batch *event"]:
        """u(x, t); the condition holds the numbers of the prompts, under `prompt`, unless there is only one.

        Raises:
            InvalidInputError: a condition of another name, or none although there are several prompts.
        """
        which = condition.pop(PROMPT, None)
        if condition or (which is None and self.plan.prompts > 1):
            raise InvalidInputError(
                f"the condition must hold {PROMPT}, the numbers of {self.plan.prompts} prompts, and nothing else; it "
                f"has {', '.join(condition) or 'nothing'}"
            )
        if which is None:
            which = torch.zeros(len(x), dtype=torch.long, device=x.device)
        which = self.plan.rows_of(which)
        call = self.compiled or self.model
        total = torch.zeros_like(x)
        for planned in self.plan.at(x.device):
            arguments = filled(planned.roles, x, t, which, len(planned.weights))
            with torch.autocast(x.device.type, dtype=self.precision) if self.precision else nullcontext():
                answers = first_of(call(**arguments))
            for i, weight in enumerate(planned.weights):
                part = answers[i * len(x) : (i + 1) * len(x)]
                whole = torch.stack(part) if isinstance(part, list) else part
                total = total + weight * as_event(whole, x.shape[1:]).to(x.dtype)
        return total


def first_of(output: Any) -> Any:
    """The answers in what a network of diffusers returns: a tuple, or one of its output classes."""
    return output[0]


def as_event(answers: Tensor, event: Sequence[int]) -> Tensor:
    """Answers (n, …) in the shape of the state: the leading entries of longer dimensions, then another view.

    Raises:
        InvalidInputError: they hold fewer numbers, or others than a leading block.
    """
    size = torch.Size(event).numel()
    if answers[0].numel() != size and answers.ndim == len(event) + 1:
        for dim, length in enumerate(event, start=1):
            answers = answers.narrow(dim, 0, min(length, answers.shape[dim]))
    if answers[0].numel() != size:
        raise InvalidInputError(
            f"pipeline: its network answers with shape {tuple(answers.shape[1:])} to a state of shape {tuple(event)}"
        )
    return answers.reshape(len(answers), *event)
