"""The surrogate: under the contract, unbiased for every R̂, fitted to earlier trajectories alone, refused by name."""

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.states import load_state, save_state
from implicit_diffusion.gradients import Adjoint, FullBackprop, ScoreFunction, Surrogate
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.denoisers.test_sharded import sums
from tests.gradients.contract import BETA, RowEstimatorContract, gamma, gammas
from tests.gradients.surrogate_cases import F64, ByHeart, Fixed, class_loop, class_runs, sharded_run, small_chain, using
from tests.helpers.chain_loops import Recorder
from tests.helpers.estimates import exact_gradient, moved_affine_chain, z_scores
from tests.helpers.oracles import affine_chain
from tests.helpers.shared_runs import same_run
from tests.helpers.together import together


class TestSurrogate(RowEstimatorContract):
    """One that has learned, so that both of its parts are at work."""

    def make(self):
        chain, objective = self.problem()
        (_, reward), _ = objective.terms
        surrogate = Surrogate(pairs=64, steps=4, learning_rate=2e-2)
        x = chain.pretrained().sample(Noise(9), 80)
        surrogate.learn(x, reward.function(x).detach())
        assert 0.3 < surrogate.regression.share <= 1
        return surrogate


SURROGATES = {  # of a quadratic reward R
    "good": lambda R: lambda x: 0.9 * R(x) + 0.1 * x.sin().sum(1),
    "unrelated": lambda R: lambda x: (3 * x[:, 0]).sin() * x[:, 1],
    "of the wrong sign": lambda R: lambda x: -0.4 * R(x),
}


def through_loop(kind, estimator, updates, batch, scale=0.5):
    """Γ of every update in a loop without learning, its mean over trajectories, and the exact gradient.

    The objective is the reward alone, so that nothing hides an error of the part that sees its values.
    """
    chain, quadratic = moved_affine_chain(scale=scale)
    optimizer = Recorder(chain.denoiser.parameters(), lr=0.0)
    loop = kind(chain, Reward(quadratic), optimizer, batch=batch, noise=Noise(5), estimator=estimator)
    for _ in range(updates):
        loop.step()
    if kind is Queue:
        for _ in loop.drain():
            pass
    return torch.stack(gammas(loop)), sum(gammas(loop)) / loop.injected, exact_gradient(chain, quadratic, 0.0)


@pytest.fixture(scope="module")
def fixed_gradients():
    """Estimates by every R̂ in a nested loop, and the mean of a queue's by the good one."""
    quadratic, sizes = moved_affine_chain(scale=0.5)[1], {"good": 40, "unrelated": 130, "of the wrong sign": 150}
    draws = {
        name: through_loop(Nested, using(Fixed(make(quadratic))), sizes[name], 10_000)
        for name, make in SURROGATES.items()
    }
    _, mean, _ = through_loop(Queue, using(Fixed(SURROGATES["good"](quadratic))), 40, 10_000)
    return draws, mean


@pytest.mark.slow
def test_it_is_unbiased_for_every_fixed_surrogate(fixed_gradients):
    nested, through_queue = fixed_gradients
    good, mean, exact = nested["good"]
    for name, draws in {"queue": good - mean + through_queue, **{name: nested[name][0] for name in nested}}.items():
        z, each, error = z_scores(draws, exact)
        assert error < 0.02 / 4, (name, error)  # a 2 % error of Γ would show at 4 σ
        assert abs(z) < 4 and each < 4.5, (name, z, each)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.02, 0.98, -1.0])
def test_the_test_sees_wrong_factors(fixed_gradients, factor):
    draws, _, exact = fixed_gradients[0]["good"]
    assert abs(z_scores(factor * draws, exact)[0]) > 4


@pytest.mark.slow
def test_a_good_surrogate_has_far_less_variance_than_the_score_function(fixed_gradients):
    ours, (theirs, _, _) = fixed_gradients[0]["good"][0], through_loop(Nested, ScoreFunction(), 20, 10_000)
    assert ours.var(0).sum() < theirs.var(0).sum() / 5


@pytest.mark.parametrize(("factor", "count"), [(0.9, 40), pytest.param(-0.4, 1200, marks=pytest.mark.slow)])
def test_on_a_small_network_it_agrees_with_backpropagation(factor, count):
    """On the same trajectories, so that the difference alone has a variance."""
    chain = small_chain()
    parameters = list(chain.denoiser.parameters())

    def reward(x):
        return torch.tanh(x).sum(1) - 0.2 * (x[:, 0] * x[:, 1]) ** 2

    objective = Reward(reward) + BETA * PathKL()
    ours = using(Fixed(lambda x: factor * reward(x) + 0.1 * x.sin().sum(1)), clip=None)
    draws = {ours: [], FullBackprop(): []}
    for index in range(count):
        for estimator, found in draws.items():
            chain.denoiser.zero_grad()
            estimator(chain, objective, Noise(11), 3000, index)
            found.append(gamma(parameters))
    ours, theirs = map(torch.stack, draws.values())
    z, each, error = z_scores(ours, theirs.mean(0), theirs - theirs.mean(0))
    assert error < 0.02 / 4, error
    assert abs(z) < 4 and each < 4.5


def test_a_perfect_surrogate_leaves_the_adjoint_alone():
    chain, quadratic = moved_affine_chain(scale=0.5)
    parameters = list(chain.denoiser.parameters())
    gradients = []
    for estimator in (using(Fixed(quadratic)), Adjoint()):
        chain.denoiser.zero_grad()
        estimator(chain, Reward(quadratic) + BETA * PathKL(), Noise(2), 16)
        gradients.append(gamma(parameters))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


class OwnBatchFirst(Surrogate):
    """The mistake that must not be made: R̂ learns a batch before it is applied to it."""

    def turn(self, objective, end):
        self.regression.learn(end.x, objective.terms[0][1].of(end), end.condition)
        return super().turn(objective, end)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Surrogate, OwnBatchFirst])
def test_it_is_unbiased_while_it_learns_and_fitting_its_own_batch_first_is_not(kind):
    """With an R̂ that goes through all pairs of the batch that it learned last."""
    estimator = using(ByHeart(), kind, clip=None)
    draws, _, exact = through_loop(Nested, estimator, 150, 12, scale=0.2)
    z, _, _ = z_scores(draws, exact)
    assert abs(z) < 4 if kind is Surrogate else abs(z) > 6


@pytest.mark.parametrize("seed", range(3))
def test_a_surrogate_that_predicts_nothing_is_not_used(seed):
    """Rewards that do not depend on the samples: the estimate is nearly that of the score function."""
    x = Noise(seed).normal((512, 2), dtype=F64)
    surrogate = Surrogate(steps=3)
    surrogate.learn(x, Noise(seed).normal((512,), 1, dtype=F64))
    assert surrogate.explained < 0.03


def test_the_share_that_is_used_is_the_regression_coefficient():
    x = Noise(0).normal((64, 2), dtype=F64)
    rewards = x[:, 0] + 0.3 * Noise(1).normal((64,), dtype=F64)
    for factor, expected in ((1.0, 1.0), (2.0, 0.5), (-1.0, 0.0), (0.4, 1.0)):
        surrogate = Surrogate(steps=1)
        surrogate.learn(x, rewards)
        regression = surrogate.regression
        regression.measured.zero_()
        regression._measure(factor * x[:, 0], rewards, None)
        r, p = rewards - rewards.mean(), x[:, 0] - x[:, 0].mean()
        exact = (r @ p / (p @ p) / factor).item()
        assert abs(regression.share - min(1.0, max(0.0, exact))) < 0.01
        assert abs(regression.share - expected) < 0.1


@pytest.mark.slow
def test_what_it_explains_is_measured_on_pairs_before_they_are_learned():
    """A network that knows all it has seen by heart explains nothing of noise."""
    x = Noise(2).normal((16, 2), dtype=F64)
    rewards = Noise(3).normal((16,), dtype=F64)
    surrogate = Surrogate(pairs=16, steps=300, learning_rate=1e-2)
    surrogate.learn(x, rewards)
    by_heart = surrogate.regression(x, None) - rewards
    assert by_heart.var() < 0.5 * rewards.var()
    surrogate.learn(Noise(4).normal((48, 2), dtype=F64), Noise(5).normal((48,), dtype=F64))
    assert surrogate.explained < 0.1


@pytest.mark.parametrize(("kind", "options"), [(Nested, {}), (Queue, {"stride": 2})])
def test_a_run_under_classes_continues_from_disk_bit_for_bit(kind, options, tmp_path):
    whole, first, second = (class_loop(kind, torch.optim.Adam, **options) for _ in range(3))
    for _ in range(11):
        expected = whole.step()
    for _ in range(6):
        first.step()
    save_state(tmp_path, first.state_dict())
    second.load_state_dict(load_state(tmp_path))
    for _ in range(5):
        metrics = second.step()
    assert metrics == expected and expected["surrogate_explained"] > 0
    for ours, theirs in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    mine, same = whole.estimator.state_dict(), second.estimator.state_dict()
    for name, part in mine["network"].items():
        assert torch.equal(part, same["network"][name])


def test_two_processes_under_classes_compute_what_one_does():
    alone = class_runs(3)
    for *each, one in zip(*together(2, "tests.gradients.surrogate_cases:class_runs", 3), alone, strict=True):
        same_run(each, one, states=False)


@sums
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nested", "queue"])
def test_weights_may_be_shared_out_over_processes(kind):
    """Whose backward pass runs twice per row."""
    metrics, one = sharded_run(kind, False)
    assert all(row["surrogate_explained"] > 0.1 for row in metrics)
    for _, theirs in together(2, "tests.gradients.surrogate_cases:sharded_run", kind, True):
        for name, part in one.items():
            torch.testing.assert_close(theirs[name], part, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_it_sees_the_class():
    x, label = Noise(0).normal((768, 2), dtype=F64), torch.arange(768) % 2
    rewards = (2 * label - 1) * x[:, 0]
    surrogate, blind = Surrogate(learning_rate=1e-2), Surrogate(learning_rate=1e-2)
    surrogate.learn(x, rewards, {"label": label})
    blind.learn(x, rewards)
    assert surrogate.explained > 0.9 and blind.explained < 0.1


class PerClass(nn.Module):
    """A network of the user's own that sees the class."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.zeros(3, 2, dtype=F64))

    def forward(self, x, condition):
        return (self.slopes[condition["label"]] * x).sum(1)


def test_the_users_own_network_may_see_the_class():
    x, label = Noise(0).normal((768, 2), dtype=F64), torch.arange(768) % 3
    surrogate = Surrogate(PerClass(), learning_rate=0.05)
    surrogate.learn(x, (label - 1) * x[:, 0], {"label": label})
    assert surrogate.explained > 0.9


class Slope(nn.Module):
    """A network of the user's own: w · x, in another form where asked for."""

    def __init__(self, form=lambda value: value, start=0.0):
        super().__init__()
        self.w, self.form = nn.Parameter(torch.full((2,), start, dtype=F64)), form

    def forward(self, x):
        return self.form(x @ self.w)


def test_the_users_own_network_is_trained_in_place_and_kept_in_the_state():
    chain, _ = moved_affine_chain(scale=0.5)
    network = Slope()
    x = chain.sample(Noise(0), 512)
    surrogate = Surrogate(network, learning_rate=0.05)
    surrogate.learn(x, (x[:, 0] - 2 * x[:, 1]).round())
    slope = network.w / network.w.norm()
    assert slope @ torch.tensor([1.0, -2.0], dtype=F64) / 5**0.5 > 0.99
    other = Surrogate(Slope(), learning_rate=0.05)
    other.load_state_dict(surrogate.state_dict())
    assert torch.equal(other.network.w, network.w)
    assert torch.equal(other.regression(x, None), surrogate.regression(x, None))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Slope(lambda v: v[:, None].expand(-1, 3)), r"network must return one number per sample, shape \(2,\)"),
        (Slope(lambda v: v.mean()), r"network must return one number per sample"),
        (Slope(lambda v: v.detach()), "network is not differentiable: .* samples"),
        (Slope(lambda v: v.float()), r"network must return the dtype of the samples, torch.float64"),
        (Slope(lambda v: v - v.mean(), start=1.0), "network mixes samples"),
        (Slope().requires_grad_(False), "network has no weights that require a gradient"),
        (nn.Linear(7, 1).to(F64), r"network fails on samples of shape \(2, 2\)"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_by_name(network, message):
    chain, quadratic = moved_affine_chain(scale=0.5)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    for kind in (Nested, Queue):
        with pytest.raises(InvalidInputError, match=message):
            kind(chain, Reward(quadratic), sgd, batch=4, noise=Noise(0), estimator=Surrogate(network))


def test_events_without_a_network_are_refused_by_name():
    with pytest.raises(InvalidInputError, match=r"not events of shape \(4, 3, 128, 128\); pass a network of your own"):
        Surrogate().learn(torch.zeros(2, 4, 3, 128, 128), torch.zeros(2))


def test_rows_without_noise_are_refused_by_name():
    chain, quadratic = affine_chain(3, 2, noise=False)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match="Surrogate needs noise on every trained row"):
        Nested(chain, Reward(quadratic), sgd, batch=4, noise=Noise(0), estimator=Surrogate())


def test_samples_of_another_kind_than_those_learned_are_refused():
    chain, quadratic = moved_affine_chain(scale=0.5)
    surrogate = Surrogate(steps=1)
    surrogate.learn(torch.zeros(4, 3), torch.zeros(4))
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    message = r"begun with samples of shape \(3,\) in torch.float32 .*, and now there are samples of shape \(2,\)"
    with pytest.raises(InvalidInputError, match=message):
        Nested(chain, Reward(quadratic), sgd, batch=4, noise=Noise(0), estimator=surrogate)


@pytest.mark.usefixtures("as_users_run")
def test_pairs_that_cannot_be_learned_are_refused():
    x, good = torch.zeros(4, 2), torch.zeros(4)
    cases = [
        ((x, good[:3]), "rewards must have one entry for each of 4 samples"),
        ((x, torch.full((4,), torch.nan)), "rewards must be finite"),
        ((x, [0.0] * 4), "rewards must be of type Tensor"),
        ((x, good, {"label": torch.zeros(3)}), "label must have one entry for each of 4 samples"),
        ((torch.full((4, 2), torch.inf), good), "x must be finite"),
    ]
    for given, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            Surrogate().learn(*given)


@pytest.mark.usefixtures("as_users_run")
def test_options_out_of_bounds_are_refused():
    for options, message in (
        ({"network": lambda x: x.sum(1)}, "network must be of type Module"),
        ({"clip": 2.0}, "clip must lie in"),
        ({"pairs": 1}, "pairs must be an integer ≥ 2"),
        ({"steps": 0}, "steps must be an integer ≥ 1"),
        ({"learning_rate": 0}, "learning_rate must lie in"),
        ({"noise": 3}, "noise must be of type Noise"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            Surrogate(**options)


def test_rewards_that_are_not_finite_are_not_learned():
    chain, _ = moved_affine_chain(scale=0.5)
    surrogate = Surrogate(steps=2)
    end = chain.endpoint(chain.sample(Noise(0), 8), Noise(0))
    surrogate.turn(Reward(lambda x: x[:, 0]), end)
    before = {name: part.clone() for name, part in surrogate.state_dict()["network"].items()}
    surrogate.turn(Reward(lambda x: x[:, 0] / 0), end)
    after = surrogate.state_dict()
    assert after["seen"] == 8 and all(torch.equal(part, after["network"][name]) for name, part in before.items())


def test_a_batch_of_one_has_nobody_to_be_compared_with():
    """Its baseline is what R̂ says, once R̂ explains something."""
    chain, quadratic = moved_affine_chain(scale=0.5)
    optimizer = Recorder(chain.denoiser.parameters(), lr=1e-3)
    estimator = Surrogate(learning_rate=1e-2)
    loop = Nested(chain, Reward(quadratic), optimizer, batch=1, noise=Noise(0), estimator=estimator)
    for _ in loop.run(60):
        pass
    assert all(gradient.isfinite().all() for gradient in gammas(loop)) and 0 < estimator.regression.share <= 1


def test_memory_counts_what_it_keeps():
    loop = class_loop(Nested)
    surrogate = loop.estimator
    for _ in range(3):
        loop.step()
    regression = surrogate.regression
    held = sum(part.nbytes for name, part in regression.buffer.items() if name in ("x", "rewards"))
    moments = sum(t.nbytes for s in regression.optimizer.state.values() for t in s.values() if t.ndim)
    need = surrogate.memory(loop.chain, loop.objective, loop.noise)
    assert need.kept > held + moments + sum(p.nbytes for p in regression.weights)
    without = class_loop(Nested)
    without.estimator = ScoreFunction()
    assert predict_memory(loop).parameters - predict_memory(without).parameters == need.kept


@pytest.mark.slow
def test_what_it_remembers_of_large_events_is_bounded_in_bytes():
    """As many pairs as 64 MB hold, in place of 4096; but as many as a step draws, however large they are."""
    for shape, pairs in (((1, 256, 256), 244), ((1, 8, 8), 4096), ((1, 1024, 1024), 64)):
        surrogate = Surrogate(Mean())
        surrogate.learn(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)), torch.arange(3.0))
        assert surrogate.regression.pairs == pairs


@pytest.mark.parametrize(
    ("network", "kept", "pairs"),
    [
        (lambda: None, {"x", "rewards", "condition.prompt"}, 4096),
        (lambda: Mean(), {"x", "rewards"}, 4096),
        (lambda: MeanUnder(), {"x", "rewards", "condition.prompt", "condition.states"}, 976),
    ],
)
def test_of_a_condition_it_remembers_what_its_network_looks_at(network, kept, pairs):
    """Embeddings of prompts may be larger than the samples: they count, and are kept only where they are of use."""
    surrogate = Surrogate(network(), steps=1)
    condition = {"prompt": torch.arange(3), "states": torch.ones(3, 16, 1024)}
    x = torch.arange(3.0)[:, None].expand(3, 4)
    surrogate.learn(x, torch.arange(3.0), condition)
    assert surrogate.regression.buffer.keys() == kept
    assert surrogate.regression.pairs == pairs
    again = Surrogate(network(), steps=1)
    again.load_state_dict(surrogate.state_dict())
    assert again.regression.pairs == pairs


def test_a_batch_of_one_is_measured_by_its_distance_from_earlier_rewards():
    """Rewards far from zero are not explained by predicting their mean."""
    x, rewards = Noise(6).normal((600, 2), dtype=F64), 1000 + Noise(7).normal((600,), dtype=F64)
    surrogate = Surrogate(steps=1)
    surrogate.learn(x[:200], rewards[:200])
    for one in range(200, 600):
        surrogate.learn(x[one : one + 1], rewards[one : one + 1])
    assert surrogate.explained < 0.1


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.flatten(1).mean(1)


class MeanUnder(Mean):
    def forward(self, x, condition):
        return super().forward(x) + 0 * condition["states"].flatten(1).sum(1)
