"""Every estimator under the contract, and what is particular to each."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint, FullBackprop, TruncatedBackprop
from implicit_diffusion.gradients.estimator import TrajectoryResult
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.gradients.contract import BATCH, BETA, EstimatorContract, N, RowEstimatorContract, gamma
from tests.helpers.oracles import affine_chain
from tests.helpers.score_function import WithBaseline


class TestAdjoint(RowEstimatorContract):
    def make(self):
        return Adjoint()


class TestFullBackprop(EstimatorContract):
    def make(self):
        return FullBackprop()

    def test_it_equals_the_adjoint(self):
        chain, objective = self.problem()
        ours, theirs = (self.gradient(chain, objective, estimator=made)[0] for made in (self.make(), Adjoint()))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    def test_a_queue_refuses_it_by_name_and_leaves_the_update_free(self):
        chain, objective = self.problem()
        update = Update(torch.optim.SGD(chain.denoiser.parameters(), lr=0.1))
        with pytest.raises(InvalidInputError, match=r"FullBackprop differentiates a whole .* queue .*Adjoint.*Nested"):
            Queue(chain, objective, update, batch=BATCH, noise=Noise(0), estimator=FullBackprop())
        Nested(chain, objective, update, batch=BATCH, noise=Noise(0), estimator=FullBackprop()).step()


class TestTruncated(RowEstimatorContract):
    depth = 3

    def make(self):
        return TruncatedBackprop(self.depth)

    @pytest.mark.parametrize("depth", range(1, N + 1))
    def test_it_is_autograd_through_the_last_rows(self, depth):
        """With x_{N−K} detached, in float64."""
        self.pretrained_rows = (4,)
        chain, objective = self.problem()
        ours, _ = self.gradient(chain, objective, estimator=TruncatedBackprop(depth))
        chain.denoiser.zero_grad()
        x = chain.trajectory(Noise(3), BATCH)[N - depth][None]
        total = torch.zeros((), dtype=torch.float64)
        for row in range(N - depth, N):
            transition = chain.transition(x, [row], reference=True)
            total = total + BETA * PathKL().cost(transition).mean()
            x = transition.push(chain.innovation(Noise(3), BATCH, [0], [row]))
        (_, reward), _ = objective.terms
        (total + reward.value(chain.endpoint(x[0], Noise(3)))).backward()
        theirs = gamma(list(chain.denoiser.parameters()))
        assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()

    @pytest.mark.parametrize(("kind", "options"), [(Nested, {}), (Queue, {"stride": 1}), (Queue, {"stride": 4})])
    def test_with_all_rows_it_is_the_adjoint_bit_for_bit(self, kind, options):
        ours = self.loop(kind, estimator=TruncatedBackprop(N), **options)
        theirs = self.loop(kind, estimator=Adjoint(), **options)
        for a, b in zip(ours.steps(9), theirs.steps(9), strict=True):
            assert a == b
        assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), theirs.model.parameters()))

    def test_a_queue_frees_its_slots_early_and_keeps_the_last_states_alone(self):
        self.pretrained_rows = ()
        loop, most = self.loop(Queue), 0
        for _ in range(3 * N):
            loop.step()
            assert all(min(slot.states) >= min(N - self.depth, slot.stage) for slot in loop.slots)
            most = max(most, *(len(slot.states) for slot in loop.slots))
        assert most == self.depth  # and x_N, which is gone by then
        assert len(loop.slots) == N - 1 + self.depth - 1
        metrics = loop.step()
        assert metrics["staleness_max"] == N - 1 + self.depth - 1
        assert "reward" in metrics and "path_kl" not in metrics and "phase" not in metrics

    def test_a_depth_that_does_not_fit_is_refused(self):
        for depth, message in ((N + 1, rf"depth must lie in 1\.\.{N}"), (1, "depth must be at least 2 .* trained row")):
            with pytest.raises(InvalidInputError, match=message):
                self.loop(estimator=TruncatedBackprop(depth))
        with pytest.raises(InvalidInputError, match="depth must be an integer ≥ 1"):
            TruncatedBackprop(0)


class TestTruncatedAtRandom(RowEstimatorContract):
    depth = 4

    def make(self):
        return TruncatedBackprop(self.depth, random=True)

    def test_depths_are_drawn_by_trajectory_and_reach_a_trained_row(self):
        chain, _ = self.problem()  # whose last row keeps the pretrained network
        depths = [len(self.make().rows_of(chain, Noise(3), index)) for index in range(3000)]
        counts = [depths.count(depth) for depth in range(2, self.depth + 1)]
        assert sum(counts) == len(depths)
        assert all(abs(count - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for count in counts)
        assert depths == [len(self.make().rows_of(chain, Noise(3), index)) for index in range(3000)]
        assert depths != [len(self.make().rows_of(chain, Noise(4), index)) for index in range(3000)]

    def test_a_trajectory_is_truncated_at_its_depth(self):
        chain, objective = self.problem()
        for index in range(6):
            fixed = TruncatedBackprop(len(self.make().rows_of(chain, Noise(3), index)))
            ours, theirs = (self.gradient(chain, objective, index, made)[0] for made in (self.make(), fixed))
            assert torch.equal(ours, theirs)

    def test_a_full_queue_says_so_although_some_slots_leave_early(self):
        loop = self.loop(Queue)
        metrics = [loop.step() for _ in range(4 * N)]
        filling = N - 1 + self.depth - 1
        assert [m.get("phase") for m in metrics] == ["filling"] * filling + [None] * (4 * N - filling)


class TestWithBaseline(RowEstimatorContract):
    def make(self):
        return WithBaseline()


@pytest.mark.parametrize("kind", [Nested, Queue])
def test_a_term_of_weight_zero_needs_no_slope(kind):
    """It is only reported: a black box may be watched beside the reward that is optimised."""
    chain, reward = affine_chain(N, 2)
    watched = Reward(lambda x: torch.from_numpy(x.detach().numpy().round().sum(1)), name="watched")
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    loop = kind(chain, Reward(reward) + 0 * watched, sgd, batch=BATCH, noise=Noise(0))
    assert any("watched" in loop.step() for _ in range(N))


@pytest.mark.usefixtures("as_users_run")
def test_an_estimator_of_another_type_is_refused():
    chain, reward = affine_chain(N, 2)
    for kind in (Nested, Queue):
        for other in (lambda *a: {}, Adjoint, TrajectoryResult({}, 0)):
            sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
            with pytest.raises(InvalidInputError, match="estimator must be of type Estimator"):
                kind(chain, Reward(reward), sgd, batch=BATCH, noise=Noise(0), estimator=other)
