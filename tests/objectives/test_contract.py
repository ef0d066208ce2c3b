"""Every objective under the suites that objectives inherit, each with F in plain arithmetic."""

from dataclasses import replace

import pytest
import torch

from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import (
    MMD,
    DriftPenalty,
    FirstVariation,
    ForwardKL,
    Functional,
    GibbsObjective,
    PathKL,
    ReverseKL,
    Reward,
    Sinkhorn,
    TerminalObjective,
    gaussian_kernel,
)
from implicit_diffusion.particles import Particles
from tests.helpers.oracles import affine_chain
from tests.helpers.oracles_gibbs import Banana, sinkhorn_divergence
from tests.objectives.contract import F64, OTHER, TermContract, Training
from tests.objectives.stationary_contract import StationaryContract, TerminalContract, X

DATA = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=F64) + 0.5
EPSILON, BANDWIDTH = 1.5, 1.3


class TestReward(TerminalContract):
    def make(self, dtype=F64):
        return Reward(lambda x: x.sin().sum(1))

    def functional(self, x, w):
        return -(w @ x.sin().sum(1)).item()

    def rude(self, function):
        return Reward(function)

    def holding(self, network):
        return Reward(network)


def variance_and_mean(x, w):
    mean = w @ x
    return (mean - 1).square().sum() + (w @ x.square() - mean.square()).log().sum()


class TestFunctional(TerminalContract):
    def make(self, dtype=F64):
        return Functional(variance_and_mean)

    def functional(self, x, w):
        return variance_and_mean(x, w).item()

    def rude(self, function):
        return Functional(lambda x, w: w @ function(x))

    def holding(self, network):
        return Functional(network.weighted_sum)


class Spread(TerminalObjective):
    """‖Cov_p x‖², by its value alone, as users write it."""

    name = "spread"

    def value(self, particles):
        x, w = particles.x, particles.weights
        centred = x - w @ x
        return (centred.mT @ (w[:, None] * centred)).square().sum()


class TestOfOnesOwn(TerminalContract):
    def make(self, dtype=F64):
        return Spread()

    def functional(self, x, w):
        covariance = torch.cov(x.mT, correction=0, aweights=w)
        return covariance.square().sum().item()

    def holding(self, network):
        class Held(Spread):
            name = "held"

            def networks(self):
                return [network]

        return Held()


class TestSinkhorn(TerminalContract):
    def make(self, dtype=F64):
        return Sinkhorn(DATA.to(dtype), EPSILON)

    def functional(self, x, w):
        return sinkhorn_divergence(w, x, torch.full((6,), 1 / 6, dtype=F64), DATA, EPSILON)


class TestMMD(TerminalContract):
    """A U-statistic leaves out pairs of a particle with itself: on a law with atoms it is compared with F only in the
    limit of atoms split into many copies, by extrapolation.
    """

    tolerance = 3e-5

    def make(self, dtype=F64):
        return MMD(DATA.to(dtype), gaussian_kernel(BANDWIDTH))

    def functional(self, x, w):
        k = gaussian_kernel(BANDWIDTH)
        gram = k(DATA, DATA)
        within = (gram.sum() - gram.diagonal().sum()) / 30
        return (w @ k(x, x) @ w - 2 * w @ k(x, DATA).mean(1) + within).item()

    def holding(self, network):
        return MMD(DATA, network.gram)

    def variation(self, term, particles, density):
        one, other = (self.split(term, particles, copies) for copies in (100, 200))
        return FirstVariation(2 * other.function - one.function, value=2 * other.value - one.value)

    def split(self, term, particles, copies):
        """F′ and F where each atom is `copies` particles of equal weight."""
        x, logs = (t.repeat_interleave(copies, 0) for t in (particles.x, particles.weights.log()))
        variation = term.first_variation(Particles(x, logs))
        return replace(variation, function=variation.function[::copies])


class TestForwardKL(StationaryContract):
    """The data are some of the particles, one of them twice: there F′ = −p_ref/p is a function as well."""

    index = torch.tensor([1, 4, 4, 6])

    def make(self, dtype=F64):
        return ForwardKL(X[self.index].to(dtype))

    def functional(self, x, w):
        return -w[self.index].log().mean().item()  # cross-entropy


class TestReverseKL(StationaryContract):
    def make(self, dtype=F64):
        return ReverseKL(Banana((0.1, 0.2, 0.3)).to(dtype).requires_grad_(False), log_z=0.0)

    def functional(self, x, w):
        return (w @ (w.log() + Banana((0.1, 0.2, 0.3))(x).detach())).item()

    def rude(self, function):
        return ReverseKL(function)

    def holding(self, network):
        return ReverseKL(network)


class TestReverseKLToStart(TestReverseKL):
    """U is the potential that the loops of the suite start with, and their log Z is not known."""

    def make(self, dtype=F64):
        return ReverseKL(Banana().to(dtype).requires_grad_(False), log_z=0.0)

    def functional(self, x, w):
        return (w @ (w.log() + Banana()(x).detach())).item()

    def test_the_loops_recognise_it(self):
        term = self.make()
        one, other = self.loop(term), self.loop(self.make() + ForwardKL(X))
        assert one.objective.is_start and not term.is_start
        assert [getattr(t, "is_start", None) for _, t in other.objective.terms] == [True, None]
        assert self.loop(OTHER).objective is OTHER


class TestBoth(StationaryContract):
    """A measure on particles and on points: cross-entropy and mean reward in one term."""

    index = TestForwardKL.index

    def make(self, dtype=F64):
        class CrossEntropyAndReward(GibbsObjective):
            name, support = "both", "both"
            data = ForwardKL(X[self.index].to(dtype))

            def draw(self, generator):
                return self.data.draw(generator)

            def first_variation(self, particles, density):
                known = self.data.first_variation(particles, density)
                reward = particles.x.cos().sum(1)
                value = None if known.value is None else known.value - particles.mean(reward)
                return FirstVariation(-reward, known.on_points, value=value)

        return CrossEntropyAndReward()

    def functional(self, x, w):
        return (-w[self.index].log().mean() - w @ x.cos().sum(1)).item()


class TestPathKL(TermContract):
    kind = PathKL

    def make(self, dtype=F64):
        return self.kind()

    def use(self, term):
        chain, _ = affine_chain(3, 2)
        term.check(chain.table, chain.trained_rows)
        Adjoint()(chain, OTHER + term, Noise(0), 4)

    def test_costs_are_those_of_leaving_the_reference(self):
        chain, _ = affine_chain(3, 2)
        transition = chain.transition(Noise(0).normal((3, 5, 2), dtype=F64), range(3), reference=True)
        assert (self.make().cost(transition) >= 0).all()
        assert (self.make().cost(replace(transition, u=transition.u0)) == 0).all()

    @pytest.mark.parametrize("kind", [Nested, Queue])
    def test_loops_that_share_it_do_not_notice_each_other(self, kind):
        def loop(objective, seed):
            chain, _ = affine_chain(3, 2)
            sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
            return kind(chain, objective, sgd, batch=4, noise=Noise(seed))

        shared = TestReward().make() + 0.5 * self.make() + 0.3 * TestSinkhorn().make()
        alone, one = loop(TestReward().make() + 0.5 * self.make() + 0.3 * TestSinkhorn().make(), 0), loop(shared, 0)
        other = loop(shared, 1)
        for _ in range(6):
            expected, metrics, _ = alone.step(), one.step(), other.step()
            assert metrics.keys() == expected.keys()
        assert all(map(torch.equal, one.model.parameters(), alone.model.parameters()))
        assert one.objective is shared and other.objective is shared


class TestDriftPenalty(TestPathKL):
    kind = DriftPenalty


def test_nothing_is_looked_up_among_attributes():
    """A term of one's own names its networks; what it merely holds stays as it is."""
    network, named = Training(), Training()
    term = Spread()
    term.network = network
    named_term = TestOfOnesOwn().holding(named)
    with (term + named_term).evaluating():
        assert network.training and not named.training


@pytest.mark.parametrize("probe", ["value", "slope"])
def test_a_term_that_is_a_module_is_its_own_network(probe):
    class Learnt(Spread, torch.nn.Module):
        name = "learnt"

        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.9)

        def value(self, particles):
            assert not self.training and not self.drop.training
            return self.drop(super().value(particles))

    term = Learnt()
    getattr(term, f"check_{probe}")(Particles(X))
    assert term.training and term.drop.training
