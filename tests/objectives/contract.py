"""What a term of any kind owes as a part of objectives; the tests of each objective inherit it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.objectives import Objective, Reward, Sum, Term, TerminalObjective
from implicit_diffusion.particles import Particles

F64 = torch.float64
OTHER = Reward(lambda x: x[:, 1].tanh(), name="other")


class Training(nn.Module):
    """A network that notes in which mode it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return x.sin().sum(1)

    def weighted_sum(self, x: Tensor, w: Tensor) -> Tensor:
        return w @ self(x)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self(x)[:, None] * self(y)


def check(term: TerminalObjective, particles: Particles) -> None:
    """What an estimator that follows the objective's gradient demands of it."""
    term.check_value(particles)
    term.check_slope(particles)


def snapshot(term: Term) -> dict[str, object]:
    """Everything that a term holds: the very objects, the numbers in tensors, the weights and modes of networks."""

    def numbers(value: object) -> object:
        if isinstance(value, nn.Module):
            return [t.tolist() for t in value.state_dict().values()], [part.training for part in value.modules()]
        return value.tolist() if isinstance(value, Tensor) else None

    return {name: (id(value), numbers(value)) for name, value in vars(term).items()}


class TermContract:
    """What a term of any kind owes."""

    def make(self, dtype: torch.dtype = F64) -> Term:
        raise NotImplementedError

    def holding(self, network: Training) -> Term | None:
        """The term around a network of the user's; None where it calls none."""
        return None

    def use(self, term: Term) -> None:
        """Everything that loops and estimators do with the term."""
        raise NotImplementedError

    def test_it_is_an_objective_of_one_term(self):
        term = self.make()
        assert isinstance(term, Objective) and not isinstance(term, Sum)
        assert term.terms == ((1.0, term),) and repr(term).startswith(f"{type(term).__name__}(")

    def test_multiples_and_sums_are_sums_of_the_same_terms(self):
        term = self.make()
        for objective, expected in (
            (2 * term, {term.name: 2.0}),
            (-term / 4, {term.name: -0.25}),
            (term + OTHER, {term.name: 1.0, "other": 1.0}),
            (3 * (OTHER - 0.5 * term), {"other": 3.0, term.name: -1.5}),
            (sum([OTHER, 2 * term]), {"other": 1.0, term.name: 2.0}),
        ):
            assert isinstance(objective, Sum) and not isinstance(objective, Term)
            assert {each.name: c for c, each in objective.terms} == expected
            assert all(each in (term, OTHER) for _, each in objective.terms)
        assert (2 * term + OTHER).weight(type(term)) == (2.0 if not isinstance(term, Reward) else 3.0)
        with pytest.raises(InvalidInputError, match="different names"):
            term + term
        with pytest.raises(InvalidInputError, match="finite"):
            float("nan") * term

    def test_using_it_changes_nothing_in_it(self):
        term = self.make()
        before = snapshot(term)
        self.use(term)
        assert snapshot(term) == before

    def test_its_networks_are_in_eval_mode_while_it_is_used(self):
        network = Training()
        term = self.holding(network)
        if term is None:
            assert list(self.make().networks()) == []
            return
        assert network in list(term.networks())
        for objective in (term, 0.5 * term + OTHER):
            with objective.evaluating():
                assert not network.training
            assert network.training
        assert not any(network.modes)  # building it may call it as well
