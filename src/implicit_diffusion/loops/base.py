"""What the loops share: a chain, an objective, an update, and a state that continues bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain

TRIAL = 2**31  # trajectory on which a loop tries chain and objective; no run injects so many


class Loop(ABC):
    """One `step()` is one iteration; `state_dict()` holds all that the next one depends on.

    Args:
        chain: the sampler, whose denoiser is trained in place.
        objective: F, e.g. `Reward(r) + beta * PathKL()`; may be replaced between steps.
        update: a torch optimizer, or an `Update` around one.
        batch: trajectories injected together (B).
        noise: source of every random number.

    Raises:
        InvalidInputError: a batch below one; an optimizer that does not move the denoiser; an objective that cannot be
            differentiated on samples of the chain, or has no finite value on its rows.
    """

    def __init__(
        self,
        chain: Chain,
        objective: Objective,
        update: Update | torch.optim.Optimizer,
        *,
        batch: int,
        noise: Noise,
    ) -> None:
        if batch < 1:
            raise InvalidInputError(f"batch must be an integer ≥ 1, got {batch}")
        self.chain, self.objective, self.batch, self.noise = chain, objective, batch, noise
        self.update = update if isinstance(update, Update) else Update(update)
        self.denoiser = self.update.bind(chain.denoiser)
        for _, cost in objective.running:
            cost.check(chain.table, chain.trained_rows)
        trial = Particles(chain.sample(noise, 2, TRIAL))
        for _, term in objective.terminal:
            term.check(trial)
        chain.evaluations = 0
        self.injected = 0  # trajectories begun
        self.iteration = 0

    @abstractmethod
    def step(self) -> dict[str, Any]:
        """One iteration.

        Returns:
            metrics: the objective and its terms on the training noise, `grad_norm` and `lr` where θ moved,
            `updates`, `network_evaluations`; 0-d tensors are left on their device.

        Raises:
            NonFiniteError: NaN or infinity, before θ is touched.
        """

    @abstractmethod
    def run(self, updates: int) -> Iterator[dict[str, Any]]:
        """Step until `updates` updates of θ have been made in all, yielding every step's metrics."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on: tensors, numbers and strings in dicts and lists."""
        return {
            "denoiser": dict(self.denoiser.state_dict()),
            "update": self.update.state_dict(),
            "weights": [weight for weight, _ in self.objective.terms],
            "seed": self.noise.seed,
            "injected": self.injected,
            "iteration": self.iteration,
            "evaluations": self.chain.evaluations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, in a loop built from the same arguments.

        Raises:
            InvalidInputError: the state comes from another seed, whose noise this loop could not replay.
        """
        if state["seed"] != self.noise.seed:
            raise InvalidInputError(f"state was saved under seed {state['seed']}, but noise has seed {self.noise.seed}")
        self.denoiser.load_state_dict(state["denoiser"])
        self.update.load_state_dict(state["update"])
        terms = (term for _, term in self.objective.terms)
        self.objective = Objective(tuple(zip(state["weights"], terms, strict=True)))
        self.injected, self.iteration = state["injected"], state["iteration"]
        self.chain.evaluations = state["evaluations"]

    def _metrics(self, values: dict[str, Tensor]) -> dict[str, Any]:
        """What the terms report, and their weighted sum once every term has a value."""
        known = [(c, term) for c, term in self.objective.terms if term.name in values]
        metrics: dict[str, Any] = dict(term.report(values[term.name]) for _, term in known)
        if all(c == 0 or term.name in values for c, term in self.objective.terms):
            metrics["objective"] = sum(c * values[term.name] for c, term in known)
        return metrics | {"updates": self.update.updates, "network_evaluations": self.chain.evaluations}

    def _bad_value(self, values: dict[str, Tensor]) -> str | None:
        """Names the term whose value is not finite, if any."""
        bad = [name for name, value in values.items() if not value.isfinite().all()]
        return f"iteration {self.iteration}: the value of {bad[0]} is NaN or infinite" if bad else None
