"""The contract of gradient estimators over a denoising chain.

A loop asks its estimator for Γ, an estimate of ∇_θ of the objective, and knows nothing else about it:

    check     what it needs of the chain and of the objective, before the first trajectory
    rows      which rows of a trajectory it pulls back
    turn      what a trajectory carries back once it has reached x_N: λ_N, a return
    pull      one call with gradient on several trajectories, each on a row of its own: adds to `.grad`, and moves what
              they carry back by a row
    memory    what that takes, per sample
    state_dict, load_state_dict    what it has learned so far: baselines, a surrogate; nothing by default

A `RowEstimator` answers all of these, so that a queue can interleave its trajectories; of the way forward it keeps the
states x_k of the rows that it pulls back. What else it needs of a row it finds in `RowStates`: the noise ξ_k is
addressed by key, so it is replayed and not stored. What it needs of later rows, it carries: λ_{k+1}, the return to go,
or the state x_{k+1}.

Where samples are shared out over W processes, an estimator holds this process's and adds their part of Γ to `.grad`: a
mean over the batch is the mean over its own samples divided by W (`processes.mean`), terminal terms are asked by
`shared_value` and `shared_variation`, and the values that it returns are those of the whole batch. Nobody communicates
in a backward pass; a call with gradient may ask the others once, for a few numbers per sample (a baseline is a mean
over all of them). The parts of Γ are added up by `Update`, once.

An `Estimator` that is not a `RowEstimator` computes the gradient of a whole trajectory at once, and serves `Nested`
alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from implicit_diffusion import processes
from implicit_diffusion.denoisers.sharded import gradient_sync
from implicit_diffusion.errors import InvalidInputError, check_integer, check_type
from implicit_diffusion.frozen import refuse_inference_mode
from implicit_diffusion.gradients.footprint import Footprint
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Objective
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown, of_tuple

Carry = dict[
    str, Tensor
]  # what a trajectory carries on its way back, by name; each (batch, ...), or (slots, batch, ...)


@dataclass(frozen=True, repr=False)
class RowStates(Shown):
    """The states of several slots before one call with gradient, each slot on a row of its own.

    Args:
        x: states x_k.
        rows: the row k of each slot.
        indices: the trajectory of each slot, by which its noise and its condition are addressed.
        noise: source of the trajectories' random numbers.
        condition: what the slots are sampled under, from `Chain.conditions`.
    """

    x: Float[Tensor, "slots batch *event"]
    rows: Sequence[int]
    indices: Sequence[int]
    noise: Noise
    condition: Mapping[str, Shaped[Tensor, "slots batch ..."]] | None = None

    def innovation(self, chain: Chain) -> Float[Tensor, "slots batch *event"] | None:
        """ξ_k of these rows, as they were drawn on the way forward; None where all of the rows are deterministic."""
        return chain.innovation(self.noise, self.x.shape[1] * processes.count(), self.indices, self.rows)


class Pulled(NamedTuple):
    """What a call with gradient returns.

    Args:
        carry: what every slot carries before its row k; each entry (slots, batch, ...).
        costs: the mean of every running cost over this process's samples on every slot, unweighted, by name.
        evaluations: network calls × samples that were made.
        measured: what else the call has to tell, by name: on every slot a mean over this process's samples, zero where
            the row is not trained. Metrics show the mean over the trained ones.
    """

    carry: Carry
    costs: dict[str, Float[Tensor, " slots"]]
    evaluations: int
    measured: Mapping[str, Float[Tensor, " slots"]] = MappingProxyType({})

    def __repr__(self) -> str:
        return of_tuple(self)


class TrajectoryResult(NamedTuple):
    """What one trajectory yields besides the gradient, which was added to `.grad`.

    Args:
        values: of every term whose value is known, unweighted, by name; running costs summed over the rows.
        evaluations: network calls × samples that were made.
        measured: what else the calls had to tell, by name: means over the trained rows.
    """

    values: dict[str, Float[Tensor, ""]]
    evaluations: int
    measured: Mapping[str, Float[Tensor, ""]] = MappingProxyType({})

    def __repr__(self) -> str:
        return of_tuple(self)


class Estimator(Shown, ABC):
    """An estimate of ∇_θ of the objective from batches of trajectories of a chain."""

    @property
    def name(self) -> str:
        """Name and settings: loops whose estimators have the same name continue each other's states."""
        return type(self).__name__

    def check(self, chain: Chain, objective: Objective, end: Particles) -> None:
        """Raise `InvalidInputError` where the chain or the objective lacks something that this estimator needs.

        Args:
            chain: the sampler.
            objective: F.
            end: two samples of the chain, with what they were sampled under.
        """

    def rows(self, chain: Chain) -> range:
        """The rows that may be pulled back, the last ones of the chain; all of them by default."""
        return range(chain.num_steps)

    def reports_costs(self, chain: Chain) -> bool:
        """Whether the running costs of every trajectory are known, because all of its rows are pulled back."""
        return len(self.rows(chain)) == chain.num_steps

    @abstractmethod
    def gradient(self, chain: Chain, objective: Objective, noise: Noise, batch: int, index: int) -> TrajectoryResult:
        """Add the gradient of trajectory `index`, of `batch` samples, to the parameters' `.grad`.

        Raises:
            InvalidInputError: a term that no longer depends on the samples.
        """

    @abstractmethod
    def memory(self, chain: Chain, objective: Objective, noise: Noise) -> Footprint:
        """What one sample takes, measured on a trial that leaves no trace."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next call depends on, besides the arguments; empty by default.

        An estimator that has a state serves one loop; the others may be shared.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""

    def __call__(
        self, chain: Chain, objective: Objective, noise: Noise, batch: int, index: int = 0
    ) -> dict[str, Tensor]:
        """Add the gradient of trajectory `index`, of `batch` samples, to the parameters' `.grad`.

        Returns:
            every term's value by name, unweighted, running costs summed over the rows (a path KL is in nats); without
            the running costs where some rows are not pulled back.

        Raises:
            InvalidInputError: an argument of another type; a term that does not depend on the samples.
        """
        check_type("chain", chain, Chain, "use Chain(denoiser, table, event_shape)")
        check_type("objective", objective, Objective, "a reward function becomes one by Reward(f)")
        refuse_inference_mode()
        return self.gradient(chain, objective, noise, check_integer("batch", batch), index).values


class RowEstimator(Estimator):
    """An estimator that moves back row by row, so that trajectories on different rows share a call with gradient."""

    parts: ClassVar[Mapping[str, str]] = {}  # how messages call the entries of the carry, e.g. "adjoints λ"

    def rows_of(self, chain: Chain, noise: Noise, index: int) -> range:
        """The rows over which trajectory `index` is pulled back, the last ones; all of `rows` by default.

        The same arguments must give the same rows. Where they may be fewer than `rows`, `reports_costs` must say so.
        """
        return self.rows(chain)

    @abstractmethod
    def turn(self, objective: Objective, end: Particles) -> tuple[Carry, dict[str, Float[Tensor, ""]]]:
        """What a batch of trajectories carries as it turns round, and the terminal terms' values by name, unweighted.

        Called where gradients are not recorded; what needs them says `torch.enable_grad()`.

        Args:
            objective: F.
            end: this process's x_N, with shape (batch, *event), and what it was sampled under.

        Raises:
            InvalidInputError: a term that no longer depends on the samples.
        """

    @abstractmethod
    def pull(self, chain: Chain, objective: Objective, at: RowStates, carry: Carry) -> Pulled:
        """One call with gradient: add the part of Γ that these rows contribute to `.grad`.

        It records gradients by `torch.enable_grad()` itself, and calls `.backward()` on one scalar per call of the
        network, so that distributed wrappers see it; where the network computes in float16, through
        `implicit_diffusion.gradients.loss_scaling`.

        Args:
            chain: the sampler.
            objective: gives the running costs.
            at: the states x_k and their rows.
            carry: what the slots carry from their rows k + 1, or from `turn`; each entry (slots, batch, ...).
        """

    def gradient(self, chain: Chain, objective: Objective, noise: Noise, batch: int, index: int) -> TrajectoryResult:
        """Sample the trajectory under the present θ, then pull it back, one row per call."""
        rows = self.rows_of(chain, noise, index)
        check_rows(self, chain, rows)
        states: dict[int, Tensor] = {}
        evaluations, x = 0, chain.initial(noise, batch, index)
        condition = chain.conditions(noise, batch, [index])
        with chain.evaluating():
            with torch.no_grad():
                for row, (transition, _, state) in enumerate(chain.walk(x, noise, index)):
                    evaluations += transition.evaluations
                    if row in rows:
                        states[row] = transition.x
                    x = state[0]
                carry, values = self.turn(objective, chain.endpoint(x, noise, index))
            carry = {name: part[None] for name, part in carry.items()}
            costs: dict[str, Tensor] = {}
            measured: dict[str, Tensor] = {}
            last = min(set(rows) - chain.pretrained_rows, default=None)  # in the order of the way back
            for row in reversed(rows):
                at = RowStates(states.pop(row), [row], [index], noise, condition)
                with gradient_sync(chain.denoiser, row == last):
                    pulled = self.pull(chain, objective, at, carry)
                carry, evaluations = pulled.carry, evaluations + pulled.evaluations
                add_up(costs, pulled.costs)
                add_up(measured, pulled.measured)
        trained = len(set(rows) - chain.pretrained_rows)
        costs, means = averaged(costs if len(rows) == chain.num_steps else {}, measured, trained)
        return TrajectoryResult(values | costs, evaluations, means)


def add_up(totals: dict[str, Float[Tensor, ""]], by_slot: Mapping[str, Float[Tensor, " slots"]]) -> None:
    """Add the numbers of a call's slots to the totals of their names."""
    for name, numbers in by_slot.items():
        totals[name] = totals.get(name, 0) + numbers.sum()


def averaged(
    costs: Mapping[str, Float[Tensor, ""]],
    measured: Mapping[str, Float[Tensor, ""]] = MappingProxyType({}),
    trained: int = 0,
) -> tuple[dict[str, Float[Tensor, ""]], dict[str, Float[Tensor, ""]]]:
    """The means over all processes of costs that each has for its own samples, and of what calls measured on `trained`
    trained rows in all; in one call.
    """
    own = [*costs.values(), *(total / trained for total in measured.values())]
    if own and processes.count() > 1:
        own = list(processes.mean(torch.stack(own)))
    return dict(zip(costs, own)), dict(zip(measured, own[len(costs) :]))


def check_rows(estimator: Estimator, chain: Chain, rows: range) -> None:
    """Raise `InvalidInputError` unless the rows over which a trajectory is pulled back are the last ones of the chain,
    and among `Estimator.rows`.
    """
    first, last = max(estimator.rows(chain).start, 0), chain.num_steps
    if not rows or rows != range(rows.start, last) or rows.start < first:
        raise InvalidInputError(
            f"estimator {estimator.name} pulls back {rows}, and trajectories are pulled back over the last rows of the "
            f"chain: range(k, {last}) with k in {first}..{last - 1}"
        )


def require_rows(estimator: Estimator, loop: str) -> RowEstimator:
    """The estimator, for a loop that interleaves trajectories.

    Raises:
        InvalidInputError: one that needs whole trajectories.
    """
    if not isinstance(estimator, RowEstimator):
        raise InvalidInputError(
            f"estimator {estimator.name} differentiates a whole trajectory at once, and a {loop} interleaves the rows "
            "of many; use Adjoint(), or the loop Nested"
        )
    return estimator
