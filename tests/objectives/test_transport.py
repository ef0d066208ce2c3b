"""Plans are solved to rounding at every usual ε: marginals, F′ against differences, and words where they are not."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.objectives import Sinkhorn, transport
from implicit_diffusion.particles import Particles
from tests.helpers.oracles_gibbs import distances

F64 = torch.float64


def clouds(n=40, m=30, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g, dtype=F64), torch.randn(m, d, generator=g, dtype=F64) + 0.5
    return x, y, (2 * torch.randn(n, generator=g, dtype=F64))


@pytest.mark.parametrize("share", [1.0, 0.1, 0.02, 0.005])
@pytest.mark.parametrize("weighted", [False, True])
def test_marginals_at_every_epsilon(share, weighted):
    x, y, logs = clouds()
    a, b = (logs * weighted).softmax(0), torch.full((30,), 1 / 30, dtype=F64)
    cost = distances(x, y) / (share * distances(x, y).mean())
    log_u, log_v, error = transport.across(a, b, cost)
    plan = (log_u[:, None] + log_v - cost).exp()
    assert error < 1e-10
    torch.testing.assert_close(plan.sum(1), a, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(plan.sum(0), b, rtol=1e-9, atol=1e-14)
    own = distances(x, x) / (share * distances(x, x).mean())
    log_u, error = transport.within(a, own)
    assert error < 1e-10
    torch.testing.assert_close((log_u[:, None] + log_u - own).exp().sum(0), a, rtol=1e-8, atol=1e-12)


def optimum(a, b, cost, epsilon):
    """OT_ε by Newton's method on both potentials at once, with dense matrices: max a·f + b·g − ε Σ T, T of mass one."""
    n = len(a)
    marginals = torch.cat([a, b])
    potentials = torch.zeros_like(marginals)
    for _ in range(300):  # sweeps first
        f = -epsilon * (b.log() + (potentials[n:] - cost) / epsilon).logsumexp(1)
        g = -epsilon * (a.log()[:, None] + (f[:, None] - cost) / epsilon).logsumexp(0)
        potentials = torch.cat([f, g])
    for _ in range(20):
        f, g = potentials[:n], potentials[n:]
        plan = a[:, None] * b * ((f[:, None] + g - cost) / epsilon).exp()
        held = torch.cat([plan.sum(1), plan.sum(0)])
        hessian = torch.diag(held)
        hessian[:n, n:], hessian[n:, :n] = plan, plan.mT
        potentials = potentials + epsilon * torch.linalg.pinv(hessian, rtol=1e-14) @ (marginals - held)
    assert (marginals - held).abs().max() < 1e-14
    return (marginals @ potentials).item()


def divergence(a, x, b, y, epsilon):
    one, two = optimum(a, a, distances(x, x), epsilon), optimum(b, b, distances(y, y), epsilon)
    return optimum(a, b, distances(x, y), epsilon) - (one + two) / 2


@pytest.mark.parametrize("weighted", [False, True])
def test_first_variation_at_two_per_cent_of_the_squared_distance(weighted):
    """d/dε F((1−ε)p + εq) = ∫F′ d(q − p), F by another solver."""
    x, y, logs = clouds(12, 9)
    epsilon = 0.02 * distances(x, y).mean().item()
    p = Particles(x, logs / 2 if weighted else None)
    w, uniform = p.weights, torch.full((9,), 1 / 9, dtype=F64)
    q = torch.rand(12, generator=torch.Generator().manual_seed(5), dtype=F64).softmax(0)
    step = 1e-4
    up, down = (divergence((1 - e) * w + e * q, x, uniform, y, epsilon) for e in (step, -step))
    variation = Sinkhorn(y, epsilon).first_variation(p)
    assert ((q - w) @ variation.function).item() == pytest.approx((up - down) / (2 * step), rel=1e-6)
    assert variation.value.item() == pytest.approx(divergence(w, x, uniform, y, epsilon), rel=1e-9)


def test_a_cloud_is_at_distance_zero_from_itself_at_two_per_cent():
    x, _, _ = clouds(60)
    term = Sinkhorn(x, 0.02 * distances(x, x).mean().item())
    variation = term.first_variation(Particles(x))
    assert abs(variation.value.item()) < 1e-10
    assert (variation.function - variation.function.mean()).abs().max() < 1e-8


def test_a_call_does_not_depend_on_the_calls_before():
    x, y, _ = clouds()
    one, two = Sinkhorn(y, 0.1), Sinkhorn(y, 0.1)
    two.value(Particles(x + 1))
    assert torch.equal(one.value(Particles(x)), two.value(Particles(x)))


def test_too_few_sweeps_are_noticed(monkeypatch):
    x, y, _ = clouds()
    term = Sinkhorn(y, 0.1)
    monkeypatch.setattr(transport, "SWEEPS", 20)
    with pytest.raises(InvalidInputError, match=r"did not converge in 20 sweeps with epsilon 0\.1; .* larger epsilon"):
        term.value(Particles(x))
    monkeypatch.setattr(transport, "SWEEPS", 4)
    with pytest.raises(InvalidInputError, match="did not converge in 4 sweeps"):
        Sinkhorn(y, 0.1)


def test_an_error_of_a_thousandth_is_a_word_and_more_a_refusal(monkeypatch):
    x, y, _ = clouds()
    term, solved = Sinkhorn(y, 1.0), transport.across
    for error in (1e-5, 1e-2):
        monkeypatch.setattr(transport, "across", lambda *a, error=error: (*solved(*a)[:2], error))
        if error < 1e-3:
            with pytest.warns(UserWarning, match=r"epsilon 1 is not solved to rounding.*use a larger epsilon"):
                term.value(Particles(x))
        else:
            with pytest.raises(InvalidInputError, match=r"did not converge .* epsilon 1; .* use a larger epsilon"):
                term.value(Particles(x))
