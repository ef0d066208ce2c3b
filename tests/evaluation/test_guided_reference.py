"""A guided pretrained chain and a plain student: path KL of guidance, J* and what is captured, against closed forms.

u_c(x, t) = gain[c, t] x + shift[c, t], so that guidance is affine as well, and every law is Gaussian.
"""

import pytest
import torch
from torch import nn

import implicit_diffusion as idf
from implicit_diffusion.denoisers import ClassifierFree, Drawn, GaussianDenoiser, frozen_copy
from implicit_diffusion.evaluation import (
    bound,
    captured,
    captured_by_weights,
    judge,
    most_kl,
    possible,
    reweighted,
    sharpest,
)
from implicit_diffusion.evaluation.chains import Evaluation, evaluate, mean_and_error
from implicit_diffusion.evaluation.gains import possible_by
from implicit_diffusion.gradients import Adjoint, FullBackprop
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers.oracles import AffineDenoiser, QuadraticReward, exact_terms, table, tilted_bound

F64 = torch.float64
NULL, SCALE, BETA, DIM = 2, 2.5, 0.7, 2  # the class that stands for none, w, β, coordinates
LABELS = Drawn("which", torch.arange(NULL))
REWARD = QuadraticReward(torch.tensor([0.9, 0.6], dtype=F64), torch.tensor([0.4, 0.3], dtype=F64))


class ByClass(nn.Module):
    """u(x, t, which), affine in x."""

    def __init__(self, rows):
        super().__init__()
        g = torch.Generator().manual_seed(rows)
        gain, shift = 0.4 * torch.randn(2, NULL + 1, rows, DIM, generator=g, dtype=F64)
        self.gain, self.shift = nn.Parameter(gain), nn.Parameter(shift)

    def forward(self, x, t, which):
        return self.gain[which, t.long()] * x + self.shift[which, t.long()]

    def of(self, label, scale=1.0):
        """The denoiser of a class under guidance, by the definition."""
        with torch.no_grad():
            gain, shift = (p[NULL] + scale * (p[label] - p[NULL]) for p in (self.gain, self.shift))
        return AffineDenoiser(gain, shift)


def guided(rows=4, scale=SCALE, last=False):
    """The chain of a plain student, whose reference is guided."""
    student = ByClass(rows)
    reference = ClassifierFree(frozen_copy(student), scale, {"which": NULL})
    kept = (rows - 1,) if last else ()
    return Chain(student, table(rows, scaled=True), (DIM,), reference=reference, pretrained_rows=kept, condition=LABELS)


def by_class(chain, student=1.0, scale=SCALE):
    """The chain of every class, for the oracles: trained with guidance `student`, pretrained with `scale`."""
    rows = {"pretrained_rows": chain.pretrained_rows}
    return [
        Chain(chain.denoiser.of(c, student), chain.table, (DIM,), reference=chain.denoiser.of(c, scale), **rows)
        for c in range(NULL)
    ]


def exact(chain, student=1.0, scale=SCALE):
    """E R and the path KL, over the classes."""
    terms = [exact_terms(each, REWARD)[:2] for each in by_class(chain, student, scale)]
    return tuple(sum(term.item() for term in column) / NULL for column in zip(*terms))


def within(estimate, value, relative=0.12):
    mean, error = estimate
    assert abs(mean - value) < 4 * error, (mean, error, value)
    assert 4 * error < relative * max(abs(value), 0.2)


def test_the_path_kl_of_guidance_between_gaussians_of_one_variance():
    """u_c − u_∅ = e^{−t}(μ_c − μ_∅) on every path: the sum is (w − 1)² (μ_c − μ_∅)² κ, without any noise."""
    steps, horizon, means, w = 5, 1.5, torch.tensor([[1.2], [-0.4], [0.3]], dtype=F64), 3.0
    h = horizon / steps

    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(GaussianDenoiser.ornstein_uhlenbeck(m, 1.0) for m in means)

        def forward(self, x, t, which):
            each = torch.stack([part(x, t) for part in self.parts])
            return each[which, torch.arange(len(x))]

    student = Means()
    reference = ClassifierFree(frozen_copy(student), w, {"which": NULL})
    rows = idf.tables.ou_reverse_sde(steps, horizon)
    chain = Chain(student, rows, (1,), reference=reference, condition=lambda n, b, i: {"which": torch.arange(b) % 2})
    seen = evaluate(chain, lambda x: x.sum(1), Noise(0), starts=4)
    kappa = h * (1 - torch.exp(torch.tensor(-2 * horizon))) / (torch.exp(torch.tensor(2 * h)) - 1)
    expected = (w - 1) ** 2 * (means[:2, 0] - means[NULL, 0]) ** 2 * kappa
    torch.testing.assert_close(seen.path_kl.flatten(), expected.repeat(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [3, 4, 5])
def test_what_guidance_costs_at_the_start(rows):
    """KL and reward of the untrained student; the KL grows as (w − 1)², path by path."""
    chain = guided(rows, last=rows == 4)
    seen = evaluate(chain, REWARD, Noise(0), starts=50_000, chunk=50_000)
    reward, path_kl = exact(chain)
    within(mean_and_error(seen.path_kl), path_kl)
    within(mean_and_error(seen.reward), reward)
    within(mean_and_error(seen.log_ratio), path_kl)
    further = evaluate(guided(rows, 1 + 2 * (SCALE - 1), last=rows == 4), REWARD, Noise(0), starts=50)
    near = evaluate(chain, REWARD, Noise(0), starts=50)
    torch.testing.assert_close(further.path_kl, 4 * near.path_kl, rtol=1e-10, atol=0)
    nothing = evaluate(guided(rows, 1.0), REWARD, Noise(0), starts=3)
    assert nothing.path_kl.abs().max() < 1e-20
    pretrained = evaluate(chain.pretrained(), REWARD, Noise(0), starts=50_000, chunk=50_000)
    within(mean_and_error(pretrained.reward), exact(chain, SCALE)[0])
    assert not pretrained.path_kl.any()


def test_the_gradient_is_full_backpropagation_and_that_of_the_exact_objective():
    chain, parts, batch = guided(), 25, 4000
    objective = Reward(REWARD) + BETA * PathKL()
    parameters = list(chain.denoiser.parameters())

    def gradient(estimator, n, noise):
        chain.denoiser.zero_grad()
        values = estimator(chain, objective, noise, n)
        return torch.cat([p.grad.flatten() for p in parameters]), values

    ours, values = gradient(Adjoint(), 5, Noise(3))
    theirs, same = gradient(FullBackprop(), 5, Noise(3))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values["path_kl"], same["path_kl"], rtol=1e-12, atol=0)
    drawn = torch.stack([gradient(Adjoint(), batch, Noise(4).stream(i))[0] for i in range(parts)])
    chains = by_class(chain)
    for each in chains:
        reward, path_kl, _ = exact_terms(each, REWARD)
        ((BETA * path_kl - reward) / NULL).backward()
    expected = torch.zeros_like(ours).view(2, NULL + 1, 4, DIM)
    for label, each in enumerate(chains):
        expected[0, label], expected[1, label] = each.denoiser.gain.grad, each.denoiser.shift.grad
    error = drawn.std(0) / parts**0.5
    wrong = (drawn.mean(0) - expected.flatten()).abs() / error.clamp(min=1e-12)
    assert wrong.max() < 4.5 and expected[:, NULL].abs().max() == 0  # the student is called under its class alone
    assert error.norm() < 0.02 * expected.norm()


def law(chain, noise=1, **sizes):
    return evaluate(chain, REWARD, Noise(noise), **{"starts": 8000, "repeats": 8, "chunk": 64_000} | sizes)


def test_the_bound_is_that_of_the_guided_chain_under_any_control():
    """From the guided chain, and from a student that is near it; the fall of J counts from the untrained one."""
    chain = guided()
    best = sum(tilted_bound(each, REWARD, BETA)[0] for each in by_class(chain)) / NULL
    before, untrained = law(chain.pretrained()), law(chain)
    plain = bound(before, BETA)
    within((plain.j, plain.j_se), best)
    assert sharpest(before, untrained, BETA)[1] == "pretrained"  # too far away for weights
    reward, path_kl = exact(chain)
    begun = BETA * path_kl - reward
    within(mean_and_error(untrained.objective(BETA)), begun)
    assert begun > -exact(chain, SCALE)[0] > best
    nearly = chain.replace(denoiser=ClassifierFree(chain.denoiser, 0.9 * SCALE, {"which": NULL}))
    after = law(nearly)
    near = bound(after, BETA)
    assert near.effective_samples > 3
    within((near.j, near.j_se), best)
    for own, value in (
        (possible(before, after, BETA, untrained), begun - best),
        (reweighted(before, after, BETA, untrained).j_fall, begun - best),
        (mean_and_error(possible_by(before, untrained, BETA)), begun - best),
    ):
        within(own, value)
    left, kl_left = exact(nearly_as(chain))
    share = (begun - (BETA * kl_left - left)) / (begun - best)
    within(captured(before, after, BETA, untrained), share)
    judgement = judge(before, after, after, BETA, untrained)
    within(judgement.captured, share)
    within(judgement.j_fall, begun - BETA * kl_left + left)
    within(judgement.untrained.path_kl, path_kl)
    within(judgement.untrained.j_above, begun + exact(chain, SCALE)[0])
    assert not judgement.worse and judge(before, untrained, untrained, BETA).worse  # from the guided chain, J rose
    assert captured(before, untrained, BETA, untrained)[0] == pytest.approx(0.0, abs=1e-12)
    by_weights = captured_by_weights(before, after, BETA, untrained)
    assert abs(by_weights.mean - 1) < 4 * by_weights.error < 0.4


def nearly_as(chain):
    """A student whose classes are guided by 0.9 w: for the oracle."""
    other = ByClass(4)
    with torch.no_grad():
        for ours, p in zip(other.parameters(), chain.denoiser.parameters()):
            ours.copy_(p[NULL] + 0.9 * SCALE * (p - p[NULL]))
            ours[NULL] = p[NULL]
    return Reference(chain, other)


class Reference:
    """What `exact` needs: the classes of one network, guided by those of another."""

    def __init__(self, chain, trained):
        self.table, self.pretrained_rows = chain.table, chain.pretrained_rows
        self.denoiser = self
        self.trained, self.pretrained = trained, chain.denoiser

    def of(self, label, scale):
        return self.trained.of(label) if scale == 1 else self.pretrained.of(label, scale)


def test_without_a_reward_the_share_is_that_of_the_path_kl():
    """J* = 0, and J is β times the path KL: the share captured is how much of the cost of guidance is gone."""
    chain = guided()
    sizes = {"starts": 200, "repeats": 4}

    def nothing(each):
        return evaluate(each, lambda x: 0 * x.sum(1), Noise(2), **sizes)

    before, untrained = nothing(chain.pretrained()), nothing(chain)
    after = nothing(chain.replace(denoiser=ClassifierFree(chain.denoiser, 1 + 0.7 * (SCALE - 1), {"which": NULL})))
    judgement = judge(before, after, after, BETA, untrained)
    kl, left = untrained.path_kl.mean().item(), after.path_kl.mean().item()
    assert judgement.j_before == (0.0, 0.0) and judgement.untrained.j.mean == pytest.approx(BETA * kl)
    assert judgement.j_fall.mean == pytest.approx(BETA * (kl - left))
    if judgement.bound_from == "pretrained":
        assert judgement.bound.j == 0
        assert judgement.share.mean == pytest.approx(1 - left / kl)
    else:
        assert abs(judgement.bound.j) < 4 * judgement.bound.j_se + abs(judgement.bound.bias)
    without = judge(before, after, after, BETA)
    assert without.worse and without.captured is None


def test_the_path_kl_that_a_cost_allows_for():
    """R = σ z, whatever x_0 is: KL ≤ (σ²/2β' + c)/(β − β'), the least over β'."""
    sigma, beta, c = 1.3, 2.0, 1.5
    z = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    none = torch.zeros_like(z)
    seen = Evaluation(sigma * z, none, none, z[..., None])
    shares = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], dtype=F64)
    for above in (0.0, c):
        limit = ((sigma**2 / (2 * shares * beta) + above) / ((1 - shares) * beta)).min().item()
        assert most_kl(seen, beta, above) == pytest.approx(limit, rel=0.06)
        assert most_kl(seen, beta, above) > 0.99 * limit  # two standard errors are added
