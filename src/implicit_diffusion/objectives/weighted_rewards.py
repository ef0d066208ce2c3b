"""Several rewards as one, R = Σ_j c_j R_j, in which every R_j can still be seen.

A sum of `Reward` terms has the same gradient. Here the samples are decoded and scored together, and an evaluation keeps
the R_j beside R (`evaluation.Evaluation.rewards`): for other coefficients, nothing has to be sampled again.

With c_j = w_j/σ_j, where σ_j is the standard deviation of R_j between pretrained samples, R counts in deviations, and
the weights w_j say how the rewards compare, whatever their units: R_j → s R_j changes σ_j → s σ_j, and R not at all.

A reward with coefficient 0 is watched: measured wherever R is evaluated, and without a part in R or in its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_number, check_type
from implicit_diffusion.objectives.attributes import changed, check_name
from implicit_diffusion.objectives.reward import Reward, check_values
from implicit_diffusion.particles import Particles
from implicit_diffusion.reward_values import of_tensors, scores_of, takes_condition


class WeightedRewards(Reward):
    """Maximise the expectation of a weighted sum of rewards: F(p) = −E_p Σ_j c_j R_j.

    Args:
        functions: the R_j by their names, each in any form that `Reward` accepts; some may take a condition.
        coefficients: the c_j, in the order of the functions; by default 1 each. A reward with coefficient 0 is watched.
        name: under which metrics report R.
        through: makes a function of a chain's states of one of the functions' arguments, e.g. by decoding; it is called
            with all of them together as well, as a function (n, rewards), so that states are decoded once for all.
        checked: as in `Reward`.

    Raises:
        InvalidInputError: no functions, or something other than functions of one argument or two; another number of
            coefficients; coefficients that are not finite, or all zero.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        coefficients: Sequence[float] | None = None,
        name: str = "reward",
        *,
        through: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
        checked: bool = False,
    ) -> None:
        check_type("functions", functions, Mapping, 'name them, as in {"bright": f, "sharp": g}')
        if not functions:
            raise InvalidInputError(
                'functions must hold at least one reward, as in {"bright": f, "sharp": g}, got none'
            )
        members = []
        for each, function in functions.items():
            with named(check_name(each)):
                members.append(Reward(through(Reward(function).function), each, checked=checked))
        self.names, self.members = tuple(functions), tuple(members)
        super().__init__(through(_together(functions)), name, checked=checked)
        self.coefficients = self._checked(coefficients)

    def _checked(self, coefficients: Sequence[float] | None) -> tuple[float, ...]:
        given = (1.0,) * len(self.names) if coefficients is None else coefficients
        check_type("coefficients", given, Sequence, f"use numbers, one for each of {list(self.names)}")
        if len(given) != len(self.names):
            raise InvalidInputError(f"coefficients must be one for each of {list(self.names)}, got {list(given)}")
        values = tuple(check_number(f"the coefficient of {name}", c) for name, c in zip(self.names, given))
        if not any(values):
            raise InvalidInputError("coefficients must not all be 0: there would be nothing to raise")
        return values

    def with_coefficients(self, coefficients: Sequence[float]) -> WeightedRewards:
        """The same rewards with other coefficients."""
        return changed(self, coefficients=self._checked(coefficients))

    def as_checked(self) -> WeightedRewards:
        return changed(self, checked=True, members=tuple(member.as_checked() for member in self.members))

    def networks(self) -> Iterable[nn.Module]:
        return (network for member in self.members for network in member.networks())

    def _words(self) -> Iterable[str]:
        yield " + ".join(f"{c:g}·{name}" for c, name in zip(self.coefficients, self.names))
        yield from (f"name={self.name!r}", *["conditional"] * self.conditional)

    def total(self, rewards: Float[Tensor, "*shape rewards"]) -> Float[Tensor, "*shape"]:
        """R of the R_j, number by number in one order: equal to the bit for every shape."""
        first, *others = (c * rewards[..., j] for j, c in enumerate(self.coefficients) if c)
        return sum(others, start=first)

    def of(self, particles: Particles) -> Float[Tensor, " n"]:
        return self.total(self.called(particles))

    def scored(self, particles: Particles) -> tuple[Float[Tensor, " n"], Float[Tensor, "n rewards"]]:
        rewards: Tensor = self.called(particles)
        for name, values in zip(self.names, rewards.unbind(-1)):
            check_values(f"the reward {name}", values)
        return self.total(rewards), rewards

    def check_value(self, particles: Particles) -> None:
        for name, member in zip(self.names, self.members):
            with named(name):
                member.check_value(particles)

    def check_slope(self, particles: Particles) -> None:
        """Every reward that is not only watched must have a gradient: that of R without some R_j is another one."""
        for name, member, c in zip(self.names, self.members, self.coefficients):
            if c:
                with named(name):
                    member.check_slope(particles)


def _together(functions: Mapping[str, Callable[..., Any]]) -> Callable[..., Float[Tensor, "n rewards"]]:
    """One function with a column for each; it takes a condition where one of them does."""
    conditional = {name: takes_condition(function) for name, function in functions.items()}
    functions = {name: of_tensors(function) for name, function in functions.items()}

    def columns(x: Tensor, *condition: Any) -> Tensor:
        made = []
        for name, function in functions.items():
            own = x.clone()  # a black box may write into it
            with named(name):
                scores = scores_of(function(own, *condition) if conditional[name] else function(own), own)
            made.append(scores.to(x.dtype))
        return torch.stack(made, 1)

    def of_both(x: Tensor, condition: Any) -> Tensor:
        return columns(x, condition)

    def of_samples(x: Tensor) -> Tensor:
        return columns(x)

    return of_both if any(conditional.values()) else of_samples


@contextmanager
def named(name: str) -> Iterator[None]:
    """Turn an error in the block into one that begins with the name of the reward that is refused."""
    try:
        yield
    except InvalidInputError as error:
        raise InvalidInputError(f"{name}: {error}") from error
