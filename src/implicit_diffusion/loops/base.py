"""What all loops share: an objective, an update, noise, and a state that continues bit for bit.

Several processes run the same loop, each on its share of the samples: `step`, `state_dict` and `load_state_dict` are
called in all of them alike. Metrics and θ are then equal to the bit in all, and a state is that of the whole run, which
any number of processes can continue.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError, check_integer, check_type
from implicit_diffusion.files.fingerprints import fingerprint
from implicit_diffusion.frozen import load_trained_state, refuse_inference_mode, trained_state
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective, Sum
from implicit_diffusion.showing import Shown, brief


class Loop(Shown, ABC):
    """One `step()` is one iteration; `state_dict()` holds all that the next one depends on.

    Args:
        model: what is trained in place.
        role: the model's name in messages, "denoiser" or "potential".
        objective: F, which is minimised; may be replaced between steps by one with the same terms.
        update: a torch optimizer, or an `Update` around one.
        noise: source of every random number.

    Raises:
        InvalidInputError: an optimizer that does not move the model; an argument of another type; a model or noise that
            differs between processes.
    """

    def __init__(
        self, model: Any, role: str, objective: Objective, update: Update | torch.optim.Optimizer, noise: Noise
    ) -> None:
        check_type("objective", objective, Objective, "a reward function becomes one by Reward(f)")
        check_type("noise", noise, Noise, "use Noise(0), for example")
        refuse_inference_mode()
        self.objective, self.noise = objective, noise
        self.update = update if isinstance(update, Update) else Update(update)
        self.model: nn.Module = self.update.bind(model, role)
        check_same(noise, **{role: self.model})
        self.iteration = 0

    def _words(self) -> Iterable[str]:
        return f"updates={self.update.updates}", f"iterations={self.iteration}"

    def _parts(self) -> dict[str, object]:
        return {"objective": self.objective, "update": self.update, "noise": self.noise}

    def __repr__(self) -> str:
        parts = "".join(f"\n  {name:9} {brief(part)}" for name, part in self._parts().items())
        return super().__repr__() + parts

    @abstractmethod
    def step(self) -> dict[str, Any]:
        """One iteration.

        Returns:
            metrics: the objective and its terms on the training noise if this step has seen all parts of them,
            `grad_norm` and `lr` if and only if θ moved, `updates` (made so far) and the work so far (`cost`); 0-d
            tensors are left on their device. Nothing is repeated: what a step has not seen is not among them.

        Raises:
            NonFiniteError: NaN or infinity, before θ is touched.
        """

    def run(self, updates: int) -> Iterator[dict[str, Any]]:
        """Train until `updates` updates of θ have been made in all, yielding the metrics of each update.

        Steps that make none, while a queue fills or gradients are accumulated, are not yielded here; `steps` yields
        them too.
        """
        return (metrics for metrics in self.steps(updates) if "grad_norm" in metrics)

    def steps(self, updates: int) -> Iterator[dict[str, Any]]:
        """Step until `updates` updates of θ have been made in all, yielding the metrics of every step."""
        updates = check_integer("updates", updates, 0)
        while self.update.updates < updates:
            yield self.step()

    @abstractmethod
    def cost(self) -> dict[str, int]:
        """The work so far, by name."""

    @processes.sharing()
    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors, numbers and strings in dicts and lists, of the whole run.

        Frozen parameters (all except the adapter's, under LoRA) are not part of it: they are those of the arguments.
        """
        return {
            "model": trained_state(self.model),
            "update": self.update.state_dict(),
            "weights": [weight for weight, _ in self.objective.terms],
            "iteration": self.iteration,
        } | self._like()

    def _like(self) -> dict[str, Any]:
        """What a state and the loop that continues from it must have in common, by name."""
        return {
            "loop": type(self).__name__,
            "seed": self.noise.seed,
            "stream": list(self.noise.prefix),
            "terms": [term.name for _, term in self.objective.terms],
        } | self.update.like()

    @processes.sharing()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in a loop built from the same arguments.

        Whatever is raised, the loop is then as it was before: a state that was read in part is not continued from.

        Raises:
            InvalidInputError: state of a loop with another noise, objective, model, update, batch or the like, which
                this one could not continue.
        """
        check_type("state", state, Mapping, "use the state_dict() of a loop like this one")
        own, present = self._like(), self.state_dict()  # what a state does not say is assumed to agree
        if missing := present.keys() - own.keys() - state.keys():
            raise InvalidInputError(
                f"state is not that of a loop, or damaged: it lacks {', '.join(sorted(missing))}; use what "
                "state_dict() of a loop like this one returned"
            )
        other = [f"{name} was {state[name]}, is {own[name]}" for name in own if state.get(name, own[name]) != own[name]]
        before, now = ({k: tuple(v.shape) for k, v in m.items()} for m in (state["model"], present["model"]))
        if name := next((name for name in before | now if before.get(name) != now.get(name)), None):
            other.append(f"{name} in the model had shape {before.get(name)}, has {now.get(name)}")
        if other:
            raise InvalidInputError(f"state is that of another loop: {'; '.join(other)}; build from the same arguments")
        present = deepcopy(present)  # as large as the copy by which every update undoes a failed step
        try:
            self._load(state)
        except BaseException:
            with suppress(Exception):  # what refuses even its own state stays as it is
                self._load(present)
            raise

    def _load(self, state: Mapping[str, Any]) -> None:
        """Take over a state that has been checked."""
        load_trained_state(self.model, state["model"])
        self.update.load_state_dict(state["update"])
        terms = (term for _, term in self.objective.terms)
        self.objective = Sum(tuple(zip(state["weights"], terms, strict=True)))
        self.iteration = state["iteration"]

    def _metrics(self, values: dict[str, Tensor]) -> dict[str, Any]:
        """What the terms report, and their weighted sum once every term has a value."""
        known = [(c, term) for c, term in self.objective.terms if term.name in values]
        metrics: dict[str, Any] = dict(term.report(values[term.name]) for _, term in known)
        if known and all(c == 0 or term.name in values for c, term in self.objective.terms):
            first, *others = (values[term.name] if c == 1 else c * values[term.name] for c, term in known)
            metrics["objective"] = sum(others, start=first)
        return metrics | {"updates": self.update.updates} | self.cost()

    def _why(self, own: str | None, values: dict[str, Tensor]) -> str | None:
        """What is not finite among this process's samples, or another's; otherwise the term whose value is not."""
        reasons = processes.collected(own) if processes.count() > 1 else [own]
        return next(filter(None, reasons), None) or self._bad_value(values)

    def _bad_value(self, values: dict[str, Tensor]) -> str | None:
        """Names the term whose value is not finite, if any."""
        bad = [name for name, value in values.items() if not value.isfinite().all()]
        return f"iteration {self.iteration}: the value of {bad[0]} is NaN or infinite" if bad else None


def check_same(noise: Noise, **parts: nn.Module | Tensor) -> None:
    """Raise `InvalidInputError` where the processes do not begin with the same noise, modules and particles.

    Args:
        noise: of the loop.
        parts: modules and particles, by their names in messages.
    """
    if processes.world_size() == 1:
        return
    tensors = [(role, name, x) for role, part in parts.items() for name, x in _tensors(part)]
    own = {f"{name} of the {role}": fingerprint(x)["tensor"] for role, name, x in tensors} | {"noise": noise}
    first, *others = processes.collected(own)
    names = dict.fromkeys(name for each in (first, *others) for name in each)
    for name in names:
        if any(each.get(name) != first.get(name) for each in others):
            raise InvalidInputError(
                f"processes begin with different numbers: {name} is not the same in all of them; build the loop from "
                "the same noise, model and particles everywhere, e.g. after torch.manual_seed(0) in each of them"
            )


def _tensors(part: nn.Module | Tensor) -> Iterable[tuple[str, Tensor]]:
    """The tensors of a part by name, except those that are shared out: each process has another piece of them."""
    if isinstance(part, Tensor):
        return [("x", part)]
    named = (*part.named_parameters(), *part.named_buffers())
    return ((name, x) for name, x in named if not processes.is_part(x))
