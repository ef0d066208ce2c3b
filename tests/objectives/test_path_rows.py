"""Path costs row by row: in plain arithmetic where a row is trained, nothing where it is not, noise or no noise."""

from dataclasses import replace

import pytest
import torch

from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.gradients import Adjoint, FullBackprop
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.oracles import affine_chain

F64 = torch.float64
N = 4


def build(noiseless=(1, 3)):
    """A chain whose network has left its reference, with rows that have no noise; the reference acts there."""
    (first, reward), (second, _) = affine_chain(N, 2), affine_chain(N, 2, seed=5)
    s = first.table.s.clone()
    s[list(noiseless)] = 0
    table = replace(first.table, s=s)
    chain = Chain(first.denoiser, table, (2,), reference=second.denoiser, pretrained_rows="noiseless")
    assert chain.pretrained_rows == set(noiseless)
    return chain, reward


@pytest.mark.parametrize("term", [PathKL(), DriftPenalty()], ids=["kl", "drift"])
def test_costs_of_all_rows_at_once(term):
    chain, _ = build()
    x = Noise(0).normal((N, 5, 2), dtype=F64)
    with torch.no_grad():
        costs = term.cost(chain.transition(x, range(N), reference=True))
    tab = chain.table
    for k in range(N):
        t = torch.full((5,), float(k), dtype=F64)
        u, u0 = (net(tab.m[k] * x[k], t).detach() for net in (chain.denoiser, chain.reference))
        gap = (tab.b[k] * (u - u0)).square().sum(1)
        own = gap / (2 * tab.s[k] ** 2) if isinstance(term, PathKL) else gap / (2 * tab.h[k])
        expected = own if k in (0, 2) else torch.zeros_like(own)
        torch.testing.assert_close(costs[k], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", [Adjoint(), FullBackprop()], ids=["adjoint", "backpropagation"])
def test_rows_without_noise_leave_values_and_gradients_finite(estimator):
    chain, reward = build()
    objective = Reward(reward) + 0.5 * PathKL()
    values = estimator(chain, objective, Noise(0), 16)
    held = evaluate(chain, reward, Noise(0), starts=16)
    assert values["path_kl"].item() == pytest.approx(held.path_kl.mean().item(), rel=1e-10) and values["path_kl"] > 0.01
    gradients = [p.grad for p in chain.denoiser.parameters()]
    for g in gradients:
        assert g.isfinite().all() and (g[[0, 2]] != 0).all() and (g[[1, 3]] == 0).all()


@pytest.mark.parametrize("kind", [Nested, Queue])
def test_loops_train_past_rows_without_noise(kind):
    chain, reward = build()
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=1e-2)
    loop = kind(chain, Reward(reward) + 0.5 * PathKL(), sgd, batch=4, noise=Noise(0))
    seen = [metrics["path_kl"] for metrics in loop.run(2 * N) if "path_kl" in metrics]
    assert seen and torch.stack(seen).isfinite().all() and all(p.isfinite().all() for p in chain.denoiser.parameters())
