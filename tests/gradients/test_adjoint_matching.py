"""Adjoint matching under the contract: where it is the adjoint, where it is unbiased, and how biased elsewhere."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint, AdjointMatching
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, PathKL, Reward
from tests.gradients.contract import BATCH, BETA, RowEstimatorContract, gamma
from tests.helpers.estimates import estimates, exact_gradient, moved_affine_chain, tanh_chain, vector, z_scores
from tests.helpers.oracles import affine_chain, riccati


class TestAdjointMatching(RowEstimatorContract):
    def make(self):
        return AdjointMatching()


def reward(x):
    return 2 * torch.sin(x).prod(1) + x[:, 0]


def gradient(estimator, chain, objective):
    chain.denoiser.zero_grad()
    estimator(chain, objective, Noise(3), BATCH)
    return gamma(list(chain.denoiser.parameters()))


@pytest.mark.parametrize("cost", [PathKL(), DriftPenalty()])
def test_at_the_pretrained_network_it_is_the_adjoint(cost):
    chain = tanh_chain()
    objective = Reward(reward) + BETA * cost
    assert not torch.allclose(*(gradient(made(), chain, objective) for made in (AdjointMatching, Adjoint)))
    chain.denoiser.load_state_dict(chain.reference.state_dict())
    ours, theirs = (gradient(made(), chain, objective) for made in (AdjointMatching, Adjoint))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("pretrained_rows", [(), (0, 2)])
@pytest.mark.parametrize("cost", [PathKL(), DriftPenalty()])
def test_it_is_the_recursion_by_jacobians_of_the_pretrained_network(cost, pretrained_rows):
    """λ̃ by explicit matrices, Γ by autograd with λ̃ and the states held fixed."""
    chain = tanh_chain(pretrained_rows=pretrained_rows)
    ours = gradient(AdjointMatching(), chain, Reward(reward) + BETA * cost)
    states, tab = chain.trajectory(Noise(3), BATCH), chain.table
    end = states[-1].requires_grad_()
    (lean,) = torch.autograd.grad(-reward(end).mean(), end)
    total = torch.zeros((), dtype=torch.float64)
    for k in reversed(range(chain.num_steps)):
        t = tab.t[k : k + 1]
        if k not in pretrained_rows:
            x, times = states[k], t.expand(BATCH)
            u, u0 = chain.denoiser(tab.m[k] * x, times), chain.reference(tab.m[k] * x, times)
            scale = tab.s[k] ** 2 if isinstance(cost, PathKL) else tab.h[k]
            paid = (tab.b[k] * (u - u0)).square().sum(1).mean() / (2 * scale)
            total = total + (tab.b[k] * lean * u).sum() + BETA * paid
        each = [torch.func.jacrev(lambda x, t=t: chain.reference(x[None], t)[0])(tab.m[k] * x) for x in states[k]]
        jacobians = tab.m[k] * torch.stack(each).detach()
        lean = tab.a[k] * lean + tab.b[k] * torch.einsum("ni,nij->nj", lean, jacobians)
    expected = vector(torch.autograd.grad(total, list(chain.denoiser.parameters())))
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def lean_gradient(chain, quadratic, beta):
    """E Γ on an affine chain in closed form: λ̃_{k+1} = −g_{k+1} (p − q x_N), with g the product of the later rows'
    factors under u_0, and x_N = α x_{k+1} + γ + noise under u_θ.
    """
    net, ref, tab = chain.denoiser, chain.reference, chain.table
    lean, factor = ((tab.a[:, None] + (tab.b * tab.m)[:, None] * u.gain).detach() for u in (ref, net))
    offset = (tab.b[:, None] * net.shift).detach()
    mean, square, moments = 0 * quadratic.p, 0 * quadratic.p + tab.initial_std**2, []
    for k in range(len(tab)):
        moments.append((mean, square))
        square = factor[k] ** 2 * square + 2 * factor[k] * offset[k] * mean + offset[k] ** 2 + tab.s[k] ** 2
        mean = factor[k] * mean + offset[k]
    p, q, g, alpha, gamma, total = quadratic.p, quadratic.q, 1.0, 1.0, 0.0, 0.0
    for k in reversed(range(len(tab))):
        alpha, gamma, (mean, square) = alpha * factor[k], gamma + alpha * offset[k], moments[k]
        pull, pull_x = q * (alpha * mean + gamma) - p, q * (alpha * square + gamma * mean) - p * mean
        total = total + (tab.b[k] * g * (pull_x * tab.m[k] * net.gain[k] + pull * net.shift[k])).sum()
        dg, ds = tab.m[k] * (net.gain[k] - ref.gain[k]), net.shift[k] - ref.shift[k]
        distance = tab.b[k] ** 2 * (dg**2 * square + 2 * dg * ds * mean + ds**2).sum()
        total, g = total + beta * distance / (2 * tab.s[k] ** 2), g * lean[k]
    return vector(torch.autograd.grad(total, list(net.parameters())))


def towards_the_optimum(part, beta=BETA):
    """A chain, memory of its start and all, that has gone a part of the way to the optimum of J; and its reward."""
    chain, quadratic = affine_chain(4, 2)
    for p, best in zip(chain.denoiser.parameters(), riccati(chain, quadratic, beta)[1:]):
        p.data += part * (best - p.data)
    return chain, quadratic


def test_its_mean_is_the_closed_form():
    chain, quadratic = moved_affine_chain(4, pretrained_rows=(), scale=0.3)
    draws = estimates(AdjointMatching(), chain, Reward(quadratic) + BETA * PathKL(), batch=4000, count=50)
    expected, exact = lean_gradient(chain, quadratic, BETA), exact_gradient(chain, quadratic, BETA)
    z, each, error = z_scores(draws, expected)
    assert error < 0.02 / 5 and abs(z) < 4 and each < 4.5
    assert z_scores(draws, exact)[1] > 8  # here it is biased


def test_it_is_unbiased_at_the_optimum_though_the_chain_remembers_its_start():
    chain, quadratic = towards_the_optimum(1.0)
    assert exact_gradient(chain, quadratic, BETA).abs().max() < 1e-12
    assert lean_gradient(chain, quadratic, BETA).abs().max() < 1e-12
    draws = estimates(AdjointMatching(), chain, Reward(quadratic) + BETA * PathKL(), batch=1000, count=40)
    error = draws.std(0) / len(draws) ** 0.5
    assert (draws.mean(0) / error).abs().max() < 4.5
    begun = exact_gradient(*towards_the_optimum(0.0), BETA)
    assert error.max() < 0.02 * begun.abs().max()


@pytest.mark.parametrize(
    ("part", "bias", "cosine", "truncated"),
    [
        (0.0, 0.0, 1.0, (0.906, 0.813, 0.463)),
        (0.25, 0.076, 0.999, (0.917, 0.825, 0.483)),
        (0.5, 0.156, 0.998, (0.926, 0.834, 0.503)),
        (0.75, 0.238, 0.995, (0.933, 0.842, 0.524)),
    ],
)
def test_biases_are_those_of_the_table_in_the_documentation(part, bias, cosine, truncated):
    chain, quadratic = towards_the_optimum(part)
    ours, exact = lean_gradient(chain, quadratic, BETA), exact_gradient(chain, quadratic, BETA)
    assert ((ours - exact).norm() / exact.norm()).item() == pytest.approx(bias, abs=6e-4)
    assert torch.cosine_similarity(ours, exact, 0).item() == pytest.approx(cosine, abs=6e-4)
    rows = exact.view(2, 4, 2).square().sum((0, 2))  # of gain and shift, by row: truncation has those of the last K
    left_out = [(rows[: 4 - K].sum() / rows.sum()).sqrt().item() for K in (1, 2, 3)]
    assert left_out == pytest.approx(truncated, abs=6e-4)


@pytest.mark.usefixtures("as_users_run")
def test_what_it_needs_and_lacks_is_refused():
    chain = tanh_chain()
    options = {"batch": BATCH, "noise": Noise(0), "estimator": AdjointMatching()}
    for kind in (Nested, Queue):
        sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
        with pytest.raises(InvalidInputError, match="reward is not differentiable"):
            kind(chain, Reward(lambda x: x.detach().sum(1)), sgd, **options)
        silent = chain.replace(reference=lambda x, t: chain.reference(x, t).detach())
        with pytest.raises(InvalidInputError, match=r"reference returns a result without a gradient.* use Adjoint"):
            kind(silent, Reward(lambda x: x.sum(1)), sgd, **options)
