"""Functionals of points together, at the ends of chains, on other shapes and dtypes; `contract` has what each owes."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import terminal_adjoint
from implicit_diffusion.objectives import MMD, Functional, Reward, Sinkhorn, gaussian_kernel
from implicit_diffusion.particles import Particles

F64 = torch.float64
DATA = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.5
EPSILON = 1.5


def variance_and_mean(x, w):
    mean = w @ x
    return (mean - 1).square().sum() + (w @ x.square() - mean.square()).log().sum()


TERMS = {
    "reward": Reward(lambda x: x.sin().sum(1)),
    "functional": Functional(variance_and_mean),
    "mmd": MMD(DATA, gaussian_kernel(1.3)),
    "sinkhorn": Sinkhorn(DATA, EPSILON),
}


def particles(n=8, seed=0, weighted=True):
    g = torch.Generator().manual_seed(seed)
    x, a = torch.randn(n, 2, generator=g, dtype=F64), torch.randn(n, generator=g, dtype=F64)
    return Particles(x, a if weighted else None)


def test_terminal_adjoint_of_a_sum_on_a_chain():
    """λ_N,i = ∂f/∂x_i of 2 Reward + 0.5 MMD + Sinkhorn + Functional, each term reported by its name."""
    objective = 2.0 * TERMS["reward"] + 0.5 * TERMS["mmd"] + TERMS["sinkhorn"] + TERMS["functional"]
    x = particles().x
    adjoint, values = terminal_adjoint(objective, x)
    step, (i, j) = 1e-4, (3, 1)

    def total(shift):
        moved = x.clone()
        moved[i, j] += shift
        return sum(c * term.value(Particles(moved)) for c, term in objective.terminal).item()

    assert adjoint[i, j].item() == pytest.approx((total(step) - total(-step)) / (2 * step), rel=1e-4, abs=1e-6)
    assert set(values) == {"reward", "mmd2", "sinkhorn", "functional"}


def test_events_of_any_shape():
    g = torch.Generator().manual_seed(3)
    x, data = torch.randn(7, 2, 3, generator=g, dtype=F64), torch.randn(5, 2, 3, generator=g, dtype=F64)
    for build in (lambda d: MMD(d), lambda d: Sinkhorn(d, 2.0)):
        folded, flat = build(data), build(data.flatten(1))
        torch.testing.assert_close(folded.value(Particles(x)), flat.value(Particles(x.flatten(1))))
        with pytest.raises(InvalidInputError, match=r"data have event shape \(2, 3\), particles \(6,\)"):
            folded.value(Particles(x.flatten(1)))


def test_reports_and_terms():
    f = TERMS["reward"] + 0.5 * (TERMS["mmd"] + 2.0 * TERMS["sinkhorn"])
    assert [(c, term.name) for c, term in f.terms] == [(1.0, "reward"), (0.5, "mmd2"), (1.0, "sinkhorn")]
    assert f.stationary == f.terminal and not f.running
    assert [term.name for _, term in (0.0 * TERMS["mmd"] + TERMS["reward"]).stationary] == ["reward"]


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("data must be finite and at least two", lambda: MMD(DATA[:1])),
        ("data must be finite", lambda: MMD(DATA * float("inf"))),
        ("bandwidth must be positive", lambda: gaussian_kernel(0.0)),
        ("data must be finite and at least one", lambda: Sinkhorn(DATA[:0], 1.0)),
        ("epsilon must be positive", lambda: Sinkhorn(DATA, 0.0)),
        ("data have event shape", lambda: MMD(DATA).value(Particles(torch.zeros(3, 1, dtype=F64)))),
        ("functional must be a 0-d tensor", lambda: checked(lambda x, w: w * x[:, 0])),
        (
            "functional must be a 0-d tensor that depends on the particles' weights",
            lambda: checked(lambda x, w: x.sum()),
        ),
        ("functional must be a 0-d tensor", lambda: checked(lambda x, w: (w @ x[:, 0]).detach())),
        ("first variation of functional is NaN", lambda: checked(lambda x, w: (w @ x[:, 0] - 99).sqrt())),
    ],
)
def test_refusals(message, build):
    with pytest.raises(InvalidInputError, match=message):
        build()


def test_sinkhorn_value_from_the_plans_of_another_solver():
    """OT_ε from POT's plans: ⟨T, C⟩ + ε KL(T‖a⊗b)."""
    import ot

    p, b = particles(), torch.full((6,), 1 / 6, dtype=F64)

    def divergence(w):
        total = 0.0
        for c, one, x, other, y in ((1, w, p.x, b, DATA), (-0.5, w, p.x, w, p.x), (-0.5, b, DATA, b, DATA)):
            cost = (x[:, None] - y).square().sum(-1)
            plan = ot.sinkhorn(one, other, cost, EPSILON, method="sinkhorn", stopThr=1e-13, numItermax=5000)
            total += c * ((plan * cost).sum() + EPSILON * (plan * (plan / (one[:, None] * other)).log()).sum())
        return total

    w, q = p.weights, torch.full((8,), 1 / 8, dtype=F64)
    variation = TERMS["sinkhorn"].first_variation(p)
    torch.testing.assert_close(variation.value, divergence(w), rtol=1e-8, atol=1e-8)
    slope = (divergence(w + 1e-4 * (q - w)) - divergence(w - 1e-4 * (q - w))) / 2e-4
    torch.testing.assert_close((q - w) @ variation.function, slope, rtol=1e-6, atol=1e-7)


def checked(function):
    p = particles()
    unchecked = Functional(function)
    unchecked.value = lambda p: function(p.x, p.weights)  # beneath the run-time type checks of the tests
    unchecked.check_stationary(p, torch.zeros(8, dtype=F64))


@pytest.mark.parametrize("n", [50, 60, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_sinkhorn_in_single_precision(n, weighted):
    """Weights of single precision sum to one up to 1e-7 only."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(m, 2, generator=generator) for m in (n, 20))
    logs = torch.randn(n, generator=generator) if weighted else None
    single = Sinkhorn(y, 1.0).value(Particles(x, logs))
    double = Sinkhorn(y.double(), 1.0).value(Particles(x.double(), None if logs is None else logs.double()))
    assert single.dtype == torch.float32 and single.item() == pytest.approx(double.item(), rel=1e-5)
