"""Sums, differences, multiples and quotients of objectives, in coefficients, in values and in what loops report."""

import pytest
import torch

from implicit_diffusion.loops import NestedParticles, Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, PathKL, ReverseKL, Reward
from implicit_diffusion.samplers import ULA
from tests.helpers.oracles_gibbs import Location

F64 = torch.float64
ONE, TWO, THREE = (Reward(lambda x, k=k: (k * x).sin().sum(1), name=f"r{k}") for k in (1, 2, 3))


def weights(objective):
    return {term.name: c for c, term in objective.terms}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (ONE + TWO, {"r1": 1, "r2": 1}),
        (ONE - TWO, {"r1": 1, "r2": -1}),
        (-ONE, {"r1": -1}),
        (ONE / 4, {"r1": 0.25}),
        ((2 * ONE - TWO * 3) / 2 - (THREE / 4 - 0.0 * PathKL()), {"r1": 1, "r2": -1.5, "r3": -0.25, "path_kl": 0}),
        (sum([ONE, 2 * TWO]), {"r1": 1, "r2": 2}),
        (3 * (ONE - (TWO - THREE)), {"r1": 3, "r2": -3, "r3": 3}),
    ],
)
def test_coefficients(objective, expected):
    assert weights(objective) == expected
    assert all((objective * 5).terms[i][0] == 5 * c for i, (c, _) in enumerate(objective.terms))


def test_the_weight_of_a_kind_is_that_of_all_its_terms():
    objective = 2.0 * ONE - 0.5 * TWO + 3.0 * PathKL()
    assert objective.weight(Reward) == 1.5 and objective.weight(PathKL) == 3.0 and objective.weight(ReverseKL) == 0.0
    assert weights(objective.with_weight(PathKL, 7.0)) == {"r1": 2.0, "r2": -0.5, "path_kl": 7.0}
    assert weights(objective) == {"r1": 2.0, "r2": -0.5, "path_kl": 3.0}
    assert [term.name for _, term in objective.terminal] == ["r1", "r2"]
    assert [(c, term.name) for c, term in objective.running] == [(3.0, "path_kl")]
    assert [term.name for _, term in (0.0 * ONE + TWO).stationary] == ["r2"]


@pytest.mark.parametrize("kind", [Single, NestedParticles])
def test_loops_report_terms_as_they_are_and_the_objective_as_weighted(kind):
    """Whatever the coefficients, a reward is E R and a KL is in nats; the objective is the sum of what is minimised."""

    def step(a, b, c):
        x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
        potential = Location(torch.tensor([0.4, -0.2], dtype=F64))
        sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
        objective = a * ONE - b * TWO + c * ReverseKL(Location(torch.zeros(2, dtype=F64)))
        settings = {"inner_steps": 1} if kind is NestedParticles else {}
        return kind(potential, ULA(0.1), objective, sgd, particles=x, noise=Noise(0), **settings).step()

    plain, weighted = step(1.0, 1.0, 1.0), step(2.0, 3.0, 0.5)
    for name in ("r1", "r2", "reverse_kl"):
        torch.testing.assert_close(weighted[name], plain[name], rtol=1e-12, atol=0)
    expected = -2.0 * plain["r1"] + 3.0 * plain["r2"] + 0.5 * plain["reverse_kl"]
    torch.testing.assert_close(weighted["objective"], expected, rtol=1e-12, atol=1e-14)


def test_batches_are_drawn_from_all_data():
    """With replacement and equal probabilities: 4 standard deviations of 4000 draws of nine."""
    data = torch.arange(9, dtype=F64)[:, None]
    term, generator = ForwardKL(data, batch=4), torch.Generator().manual_seed(0)
    draws = torch.stack([term.draw(generator)[:, 0] for _ in range(1000)])
    counts = torch.bincount(draws.flatten().long(), minlength=9)
    assert ((counts - 4000 / 9).abs() < 4 * (4000 / 9 * 8 / 9) ** 0.5).all()
    assert any(len(set(row.tolist())) < 4 for row in draws)
    assert torch.equal(ForwardKL(data).draw(generator), data)
