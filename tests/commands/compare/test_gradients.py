"""What the comparison measures of gradients, against closed forms and by z-scores."""

import math

import pytest
import torch

from implicit_diffusion.commands.compare import policy
from implicit_diffusion.commands.compare.affine import QuadraticReward, affine_problem, exact_objective
from implicit_diffusion.commands.compare.methods import make_loop
from implicit_diffusion.commands.compare.problems import build
from implicit_diffusion.commands.compare.quality import collect, exact, measure, squared_bias, still
from implicit_diffusion.commands.compare.untrained import best_of_kl, guided
from implicit_diffusion.gradients import ScoreFunction
from implicit_diffusion.loops import Nested, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers import oracles


@pytest.fixture(scope="module")
def problem():
    return build("gaussian", 3, 64, Noise(0))


@pytest.fixture(scope="module")
def at(problem):
    return exact(problem, 8, 100, Noise(0))


def test_the_closed_form_is_that_of_the_moments(problem, at):
    reward = oracles.QuadraticReward(problem.reward.slope, problem.reward.curvature)
    expected, kl, _ = oracles.exact_terms(at.chain, reward)
    ours = exact_objective(at.chain, problem.reward, 0.7)
    assert ours.item() == pytest.approx((0.7 * kl - expected).item(), rel=1e-12) and kl > 1e-3


def test_the_pretrained_chain_is_near_its_data():
    """With many steps the law of x_N is N(m, v), up to the error of the discretisation."""
    chain, _ = affine_problem(400)
    slope, none = torch.eye(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    means = [-exact_objective(chain, QuadraticReward(row, none), 0.0).item() for row in slope]
    assert means == pytest.approx(torch.linspace(-1, 1, 8).tolist(), abs=0.15)  # e^{−T} = 0.135 of x_0's law is left


@pytest.mark.parametrize(
    "method",
    [
        "adjoint",
        "score",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("full-backprop", "adjoint-queue", "score-queue")),
    ],
)
def test_unbiased_estimators_are_found_unbiased(method, problem, at):
    """By z-scores, along g and in all directions; gradients that are 1.3 times too long would show for the adjoint."""
    found = measure(problem, method, at, 8, 2, Noise(3))
    assert abs(found.bias.mean) < 4 * found.bias.error
    assert abs(found.squared_bias.mean) < 4 * found.squared_bias.error
    if not method.startswith("score"):
        assert found.bias.error < 0.06 and found.cosine.mean > 0.5
    assert (
        found.predicted_memory_bytes > 0
        and found.seconds > 0
        and found.evaluations == 8 * (6 if method == "full-backprop" else 9)
    )


def test_a_truncated_gradient_is_found_biased_by_what_it_leaves_out(problem, at):
    """Every row has parameters of its own: the bias is at least the gradient of the rows that are left out."""
    found = measure(problem, "draft", at, 8, 2, Noise(3))
    first = at.mean.view(2, 3, -1)[:, 0].square().sum() / at.squared_norm
    assert found.squared_bias.mean > first - 4 * found.squared_bias.error
    assert found.squared_bias.mean > 5 * found.squared_bias.error


@pytest.mark.parametrize(("bias", "most"), [(0.2, 1.15), (0.0, 1.6)])
def test_the_squared_bias_of_gradients_whose_law_is_known(bias, most):
    """Γ − g of mean (bias, bias/2, 0, …) and deviation 0.5: unbiased, with the error that repetitions show.

    Without a bias the error is the larger one of two estimates, and so a little too large.
    """
    mean = torch.zeros(20, dtype=torch.float64)
    mean[0], mean[1] = 2 * bias, bias
    deviation = torch.linspace(0.1, 1, 20, dtype=torch.float64)
    draws = [mean + deviation * Noise(seed).normal((30, 20), 0, dtype=torch.float64) for seed in range(200)]
    estimates = [squared_bias(each, 4.0) for each in draws]
    means = torch.tensor([each.mean for each in estimates])
    errors = torch.tensor([each.error for each in estimates])
    assert abs(means.mean() - mean.square().sum() / 4) < 4 * means.std() / math.sqrt(200)
    ratio = errors.square().mean().sqrt() / means.std()
    assert 0.85 < ratio < most
    assert errors.min() > means.std() / 3  # not as small as the bias is by chance
    pairs = draws[0] @ draws[0].T / 4
    exact_mean = (pairs.sum() - pairs.trace()) / (30 * 29)
    assert estimates[0].mean == pytest.approx(exact_mean.item(), rel=1e-12)


def test_the_reference_of_the_digits_is_the_adjoint(monkeypatch):
    """The norm is that of the mean without its noise, and the adjoint on the shared noise has no bias at all."""
    monkeypatch.setattr("implicit_diffusion.commands.compare.problems.REPEATS", 2)
    monkeypatch.setattr("implicit_diffusion.commands.compare.quality.UPDATES_AWAY", 1)
    digits = build("brightness", 2, 8, Noise(0))
    at = exact(digits, 2, 3, Noise(0))
    assert at.squared_norm < at.mean.square().sum()
    assert measure(digits, "adjoint", at, 2, 2, Noise(0)).squared_bias == (0, 0)
    assert digits.exact(at.chain) is None


def score(chain, reward, estimator, noise, beta=0.0):
    loop = Nested(chain, Reward(reward) + beta * PathKL(), still(chain), batch=8, noise=noise, estimator=estimator)
    return collect(loop, 1)[0][0]


def test_standardised_advantages_are_the_score_function_over_the_deviation(problem, at):
    """Without a penalty: leave-one-out is B/(B − 1) of the mean of all, and the deviation is that of the batch."""
    ours = score(at.chain, problem.reward, policy.Standardised(1.7), Noise(5))
    plain = score(at.chain, problem.reward, ScoreFunction(), Noise(5))
    rewards = problem.reward(at.chain.sample(Noise(5), 8))
    assert torch.allclose(ours, plain * 7 / 8 * 1.7 / rewards.std(unbiased=False), rtol=1e-5)


def test_groups_have_statistics_of_their_own(problem, at):
    """Adding a number to the rewards of a group, or scaling them, changes nothing."""
    calls = []

    def moved(x):
        calls.append(len(x))
        factors = torch.ones(len(x), dtype=x.dtype)
        factors[4:] = 5.0
        return problem.reward(x) * factors + 3 * (factors - 1)

    plain = score(at.chain, problem.reward, policy.Standardised(1.0, 4), Noise(5))
    objective = Reward(moved, checked=True)
    loop = Nested(at.chain, objective, still(at.chain), batch=8, noise=Noise(5), estimator=policy.Standardised(1.0, 4))
    assert torch.allclose(collect(loop, 1)[0][0], plain, rtol=1e-4) and 8 in calls


def test_samples_of_a_group_share_their_start(at):
    x = policy.shared_start(at.chain).initial(Noise(0), 8, 3)
    assert torch.equal(x[0], x[3]) and not torch.equal(x[3], x[4]) and x.shape == (8, 8)


def test_the_first_update_of_a_batch_is_on_policy_and_the_next_is_not(problem, monkeypatch):
    """One update of each batch is the nested loop's; of two, the second has the ratios of the moved θ."""

    def trained(inner, steps, loop=policy.Reusing):
        monkeypatch.setattr(policy, "INNER", inner)
        chain = problem.chain()
        update = Update(torch.optim.SGD(chain.denoiser.parameters(), lr=1e-2))
        estimator = policy.Standardised(1.0)
        loop = loop(chain, problem.objective(), update, batch=8, noise=Noise(1), estimator=estimator)
        for _ in range(steps):
            loop.step()
        return torch.cat([p.detach().flatten() for p in chain.denoiser.parameters()]), loop

    one, _ = trained(1, 2)
    nested, _ = trained(1, 2, Nested)
    assert torch.allclose(one, nested, rtol=1e-12)
    twice, loop = trained(2, 1)
    assert loop.update.updates == 2 and loop.evaluations == 8 * 3 + 2 * 8 * 6
    assert not torch.allclose(twice, one)


@pytest.mark.parametrize("method", ["ddpo", "grpo"])
def test_baselines_have_loops_that_run(method, problem):
    chain = problem.chain()
    loop = make_loop(method, problem, chain, still(chain), batch=8, depth=2, noise=Noise(0))
    assert "grad_norm" in loop.step()


def test_guidance_adds_the_slope_of_the_predicted_clean_sample(problem):
    """On an affine chain x̂ = (x + σ² (g x + c))/α, so that ∇R(x̂) = (p − r x̂) (1 + σ² g)/α."""
    chain, w = guided(problem, 0.6), 0.6
    x = Noise(0).normal((5, 8), 0, dtype=torch.float64)
    for row in range(3):
        transition = chain.transition(x[None], [row], reference=True)
        t, net = chain.table.t[row], chain.reference
        alpha, variance = torch.exp(-t), -torch.expm1(-2 * t)
        slope = (1 + variance * net.gain[row]) / alpha
        predicted = slope * x + variance * net.shift[row] / alpha
        gradient = (problem.reward.slope - problem.reward.curvature * predicted) * slope
        shift = (transition.b * (transition.u - transition.u0))[0]
        assert torch.allclose(shift, w * transition.s[0] ** 2 / problem.beta * gradient, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_kl_of_the_best_of_several(count):
    """∫ M u^{M−1} log(M u^{M−1}) du over the quantiles u, by quadrature."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = count * u ** (count - 1)
    assert best_of_kl(count) == pytest.approx((density * density.log()).mean().item(), abs=1e-6)
