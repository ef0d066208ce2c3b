"""The score function under the contract, and against exact gradients."""

import copy
import warnings

import pytest
import torch

from implicit_diffusion import processes
from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint, ScoreFunction, score_function
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.gradients.contract import BATCH, BETA, N, RowEstimatorContract, gammas
from tests.helpers.chain_loops import Recorder
from tests.helpers.estimates import estimates, exact_gradient, moved_affine_chain, tanh_chain, z_scores
from tests.helpers.oracles import AffineDenoiser, affine_chain, table
from tests.helpers.together import together


class TestScoreFunction(RowEstimatorContract):
    def make(self):
        return ScoreFunction()

    def test_black_boxes_are_welcome_and_rows_without_noise_are_not(self):
        """A loop demands of the reward what its estimator demands, no more."""
        chain, reward = affine_chain(N, 2)
        black_box = Reward(lambda x: torch.from_numpy(reward(x).detach().numpy().round()))
        sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
        for kind in (Nested, Queue):
            made = kind(chain, black_box, Update(sgd), batch=BATCH, noise=Noise(0), estimator=self.make())
            for _ in made.run(2):
                pass
            with pytest.raises(InvalidInputError, match=r"reward is not differentiable|reward .*gradient"):
                kind(chain, black_box, Update(sgd), batch=BATCH, noise=Noise(0))
        silent, reward = affine_chain(N, 2, noise=False)
        sgd = torch.optim.SGD(silent.denoiser.parameters(), lr=0.1)
        message = r"ScoreFunction needs noise on every trained row: 6 rows, among them row 5,.*pretrained_rows.*Adjoint"
        with pytest.raises(InvalidInputError, match=message):
            Nested(silent, Reward(reward), sgd, batch=BATCH, noise=Noise(0), estimator=self.make())


class Labelled(AffineDenoiser):
    def forward(self, x, t, labels=None):
        return super().forward(x, t)


def of_classes(chain, reward, classes=3):
    """The chain, whose samples have class labels, and a reward that depends on them."""
    labelled = Chain(
        Labelled(chain.denoiser.gain.data, chain.denoiser.shift.data),
        chain.table,
        chain.event_shape,
        reference=Labelled(chain.reference.gain.data, chain.reference.shift.data).requires_grad_(False),
        pretrained_rows=chain.pretrained_rows,
        condition=Drawn("labels", torch.arange(classes)),
    )
    return labelled, Reward(lambda x, condition: reward(x) + 9.0 * condition["labels"])


class TestScoreFunctionOfClasses(RowEstimatorContract):
    """The baseline is that of the class; among four or six samples there are classes of one."""

    def make(self):
        return ScoreFunction()

    def problem(self):
        chain, objective = super().problem()
        (_, reward), _ = objective.terms
        chain, labelled = of_classes(chain, reward.function)
        return chain, labelled + BETA * PathKL()


@processes.sharing()
def asked():
    """Collective calls of a trajectory, and the bytes that a process contributes to them."""
    found = []
    for kind in (TestScoreFunction, TestScoreFunctionOfClasses):
        before = copy.copy(processes.traffic)
        kind().gradient(*kind().problem())
        found.append((processes.traffic.calls - before.calls, processes.traffic.bytes - before.bytes))
    return found


def test_the_other_processes_are_asked_once_a_row_for_two_numbers_per_sample_at_most():
    """Besides, for the mean reward, for the costs, and for the conditions."""
    (plain, of_labels), other = together(2, f"{__name__}:asked")
    assert [plain, of_labels] == other
    assert plain == (N + 2, 8 * (N + 1 + 2))
    assert of_labels == (N + 3, 8 * (BATCH // 2) * (2 * N + 1) + 8 * (1 + 2))


@pytest.fixture(scope="module", params=[(100, 0.04), pytest.param((400, 0.02), marks=pytest.mark.slow)])
def through_loops(request):
    """The estimates of a nested loop, the mean of a queue's, the exact gradient, and the error of Γ that they show."""
    updates, share = request.param
    chain, quadratic = moved_affine_chain(2, pretrained_rows=(), scale=0.5)
    objective = 2 * Reward(lambda x: quadratic(x) / 2) + 0.1 * PathKL()
    parameters = list(chain.denoiser.parameters())
    nested, queue = (
        kind(chain, objective, Recorder(parameters, lr=0.0), batch=4000, noise=Noise(5), estimator=ScoreFunction())
        for kind in (Nested, Queue)
    )
    for _ in range(updates):
        nested.step(), queue.step()
    for _ in queue.drain():
        pass
    draws = torch.stack(gammas(nested))
    return draws, sum(gammas(queue)) / queue.injected, exact_gradient(chain, quadratic, 0.1), share


def test_it_is_unbiased_in_nested_and_queue(through_loops):
    draws, through_queue, exact, share = through_loops
    for shifted in (draws, draws - draws.mean(0) + through_queue):
        z, each, error = z_scores(shifted, exact)
        assert error < share / 6  # such an error of Γ shows at 4 σ, whatever its own deviation
        assert abs(z) < 4 and each < 4.5


@pytest.mark.parametrize("sign", [1, -1])
def test_the_test_sees_wrong_factors(through_loops, sign):
    draws, through_queue, exact, share = through_loops
    for shifted in (draws, draws - draws.mean(0) + through_queue):
        for factor in (1 + share, 1 - share):
            assert abs(z_scores(sign * factor * shifted, exact)[0]) > 4


@pytest.mark.slow
def test_it_agrees_with_the_adjoint_on_a_small_network():
    """On the same trajectories, in every parameter; without noise on a row that keeps the pretrained network."""
    rows = table(4)
    rows.s[3] = 0
    chain = tanh_chain(pretrained_rows=(3,))
    chain = Chain(chain.denoiser, rows, (2,), reference=chain.reference, pretrained_rows=(3,))
    objective = Reward(lambda x: 2 * torch.sin(x).prod(1) + x[:, 0]) + BETA * PathKL()
    ours, theirs = (estimates(made, chain, objective, batch=4000, count=200) for made in (ScoreFunction(), Adjoint()))
    z, each, error = z_scores(ours, theirs.mean(0), theirs - theirs.mean(0))
    assert error < 0.02 / 5
    assert abs(z) < 4 and each < 4.5


class Late(ScoreFunction):
    """The running costs enter the cost to go a row too late: an off-by-one."""

    def pull(self, chain, objective, at, carry):
        pending = carry.pop("pending", torch.zeros_like(carry["go"]))
        pulled = super().pull(chain, objective, at, carry)
        paid = pulled.carry["go"] - carry["go"]
        return pulled._replace(carry=pulled.carry | {"go": carry["go"] + pending, "pending": paid})


class WrongSign(ScoreFunction):
    """The running costs are subtracted from the cost to go."""

    def pull(self, chain, objective, at, carry):
        pulled = super().pull(chain, objective, at, carry)
        return pulled._replace(carry=pulled.carry | {"go": 2 * carry["go"] - pulled.carry["go"]})


@pytest.mark.parametrize("kind", [ScoreFunction, Late, pytest.param(WrongSign, marks=pytest.mark.slow)])
def test_costs_to_go_begin_with_the_next_row(kind):
    """Where nothing else is paid, all that reaches a row through its noise are the costs of later ones."""
    chain, quadratic = moved_affine_chain(4, pretrained_rows=(), scale=0.5)
    quadratic.p, quadratic.q = 0 * quadratic.p, 0 * quadratic.q
    draws = estimates(kind(), chain, Reward(quadratic) + PathKL(), batch=4000, count=40)
    z, each, _ = z_scores(draws, exact_gradient(chain, quadratic, 1.0))
    assert (max(abs(z), each) < 4.5) == (kind is ScoreFunction)


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_the_baseline_leaves_the_sample_out(own, monkeypatch):
    """In batches of four, a mean that includes the sample would shrink Γ by a quarter."""
    if own:
        monkeypatch.setattr(score_function, "leave_one_out", lambda go, group: go - go.mean(1, keepdim=True))
    chain, quadratic = moved_affine_chain(2, pretrained_rows=())
    draws = estimates(ScoreFunction(), chain, Reward(quadratic), batch=4, slots=250, count=40)
    z, _, error = z_scores(draws, exact_gradient(chain, quadratic, 0.0))
    assert error < 0.25 / 6
    assert (abs(z) < 4) == (not own)


def test_the_baseline_of_a_class_is_unbiased_and_saves_variance(monkeypatch):
    chain, quadratic = moved_affine_chain(2, pretrained_rows=(), scale=0.5)
    labelled, reward = of_classes(chain, quadratic)
    options = {"batch": 12, "slots": 10, "count": 40}
    draws = estimates(ScoreFunction(), labelled, reward, **options)
    z, each, error = z_scores(draws, exact_gradient(chain, quadratic, 0.0))
    assert error < 0.1 and abs(z) < 4 and each < 4.5
    monkeypatch.setattr(score_function, "groups", lambda condition: None)
    assert draws.var(0).sum() < 0.5 * estimates(ScoreFunction(), labelled, reward, **options).var(0).sum()


def test_baselines_by_hand():
    go = Noise(1).normal((3, 7), dtype=torch.float64)
    group = torch.tensor([[0, 1, 0, 2, 1, 0, 3], [0] * 7, list(range(7))])
    expected = torch.empty_like(go)
    for slot in range(3):
        for i in range(7):
            others = [j for j in range(7) if j != i and group[slot, j] == group[slot, i]]
            others = others or [j for j in range(7) if j != i]
            expected[slot, i] = go[slot, i] - go[slot, others].mean()
    torch.testing.assert_close(score_function.leave_one_out(go, group), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(score_function.leave_one_out(go)[1:2], expected[1:2], rtol=1e-13, atol=1e-13)
    assert torch.equal(score_function.leave_one_out(go[:, :1]), go[:, :1])  # nobody to compare with
    assert torch.equal(score_function.leave_one_out(go[:, :1], group[:, :1]), go[:, :1])


def test_samples_of_one_condition_have_one_number():
    labels, prompts = torch.tensor([4, 1, 4, 4, 1]), torch.tensor([[0.5, 1], [2, 2], [0.5, 1], [0.5, 3], [2, 2]])
    assert score_function.groups(None) is None
    assert score_function.groups({"labels": labels}).tolist() == [1, 0, 1, 1, 0]
    together = score_function.groups({"labels": labels, "prompts": prompts})
    assert [[(a == b).item() for a in together] for b in together] == [
        [i == j or {i, j} in ({0, 2}, {1, 4}) for i in range(5)] for j in range(5)
    ]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_ratio_is_one_to_rounding_where_theta_has_not_moved(dtype, bound, monkeypatch):
    seen, formula = [], score_function.log_ratio
    monkeypatch.setattr(score_function, "log_ratio", lambda *a: seen.append(formula(*a)) or seen[-1])
    chain = tanh_chain()
    chain = Chain(chain.denoiser.to(dtype), chain.table, (2,))
    for kind in (Nested, Queue):
        optimizer = torch.optim.SGD(chain.denoiser.parameters(), lr=0.0)
        options = {"batch": 64, "noise": Noise(0), "estimator": ScoreFunction(clip=1e-3)}
        for metrics in kind(chain, Reward(lambda x: x.sum(1)), optimizer, **options).run(8):
            assert metrics["clipped"] == 0
    assert max(log_rho.abs().max() for log_rho in seen) < bound


@pytest.mark.parametrize("weighted", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_ratio_corrects_the_rows_own_action(weighted, monkeypatch):
    """Only row 1 has moved since the samples were drawn: its gradient is that at the present θ."""
    chain, quadratic = moved_affine_chain(scale=0.5)
    shift = 0.1 * Noise(2).normal((2, 2), dtype=torch.float64)

    def meanwhile():
        chain.denoiser.gain.data[1] += shift[0]
        chain.denoiser.shift.data[1] += shift[1]

    if not weighted:  # ∇ log p_θ in place of ∇ρ
        formula = score_function.log_ratio
        monkeypatch.setattr(score_function, "log_ratio", lambda *a: (log_rho := formula(*a)) - log_rho.detach())
    objective = Reward(quadratic) + BETA * PathKL()
    draws = estimates(ScoreFunction(clip=None), chain, objective, batch=4000, count=150, meanwhile=meanwhile)
    meanwhile()
    own = [2, 3, 8, 9]  # gain and shift of row 1, among 3 rows × 2 numbers each
    z, each, error = z_scores(draws[:, own], exact_gradient(chain, quadratic, BETA)[own])
    assert error < 0.03 / 4
    assert (max(abs(z), each) < 4.5) == weighted


def test_clipping_is_that_of_proximal_policy_optimization():
    generator = torch.Generator().manual_seed(3)
    log_rho, advantage = torch.randn(2, 5, 400, generator=generator, dtype=torch.float64)
    ours, theirs = (log_rho.clone().requires_grad_() for _ in range(2))
    surrogate, clipped = score_function.clipped_objective(ours, advantage, 0.3)
    surrogate.sum().backward()
    rho = theirs.exp()
    torch.maximum(rho * advantage, rho.clamp(0.7, 1.3) * advantage).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-14, atol=0)
    assert torch.equal(clipped, theirs.grad == 0) and 0.2 < clipped.double().mean() < 0.8
    far = torch.tensor([[2000.0, -2000.0]], requires_grad=True)  # e²⁰⁰⁰ is infinite
    score_function.clipped_objective(far, torch.tensor([[-1.0, 1.0]]), 0.3)[0].sum().backward()
    assert torch.equal(far.grad, torch.zeros(1, 2))


def test_metrics_tell_the_share_that_was_clipped():
    chain, quadratic = moved_affine_chain()
    objective, shares = Reward(quadratic) + BETA * PathKL(), []
    for kind in (Nested, Queue):
        sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
        loop = kind(chain, objective, sgd, batch=64, noise=Noise(0), estimator=ScoreFunction(clip=0.05))
        shares.append([metrics["clipped"].item() for metrics in loop.run(12)])
    nested, queue = shares
    assert nested == [0.0] * 12
    assert max(queue) > 0.1 and all(0 <= share < 1 for share in queue)


def test_terms_that_compare_samples_act_by_their_first_variation():
    """The bias is of the order of one sample in the batch."""
    chain, _ = moved_affine_chain(2, pretrained_rows=())
    term = MMD(1 + Noise(4).normal((50, 2), dtype=torch.float64))
    ours, theirs = (estimates(made, chain, term, batch=200, count=100) for made in (ScoreFunction(), Adjoint()))
    z, each, error = z_scores(ours, theirs.mean(0), theirs - theirs.mean(0))
    assert error < 0.02
    assert abs(z) < 4 and each < 4.5


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
def test_rewards_that_count_are_numbers(kind):
    chain, _ = moved_affine_chain()
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    counted = Reward(lambda x: (x.sum(1) > 0).to(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop = Queue(chain, counted, sgd, batch=16, noise=Noise(0), estimator=ScoreFunction())
    for metrics in loop.run(3):
        assert metrics["grad_norm"] > 0


def test_rows_with_next_to_no_noise_are_refused_by_name_unless_pretrained():
    rows = table(4)
    rows.s[3] = 1e-10  # as DDPM's last row
    sgd = lambda chain: torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)  # noqa: E731
    chain = Chain(tanh_chain().denoiser, rows, (2,))
    options = {"batch": 8, "noise": Noise(0), "estimator": ScoreFunction()}
    with pytest.raises(InvalidInputError, match=r"row 3 of the 4 rows of test table has s = 1\.0e-10 beside b = "):
        Nested(chain, Reward(lambda x: x.sum(1)), sgd(chain), **options)
    kept = chain.replace(pretrained_rows="noiseless")
    assert Nested(kept, Reward(lambda x: x.sum(1)), sgd(kept), **options).step()["grad_norm"].isfinite()


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("clip", [0, 1, -0.1, float("nan"), "0.2"])
def test_a_clip_outside_of_its_range_is_refused(clip):
    with pytest.raises(InvalidInputError, match="clip must"):
        ScoreFunction(clip=clip)
