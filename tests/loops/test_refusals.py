"""What loops refuse before they begin: objectives that would train nothing, schedules that they could not step."""

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients import Adjoint
from implicit_diffusion.loops import Nested, Queue, Unrolled, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, Functional, Reward
from implicit_diffusion.samplers import ULA
from tests.helpers.oracles import affine_chain
from tests.helpers.oracles_gibbs import Banana

F64 = torch.float64
X = torch.linspace(-1, 1, 24, dtype=F64).view(12, 2) ** 3

pytestmark = pytest.mark.usefixtures("as_users_run")


def queue(objective):
    chain, _ = affine_chain(2, 2)
    return Queue(chain, objective, torch.optim.SGD(chain.denoiser.parameters()), batch=4, noise=Noise(0))


def unrolled(objective):
    potential = Banana()
    sgd = torch.optim.SGD(potential.parameters())
    return Unrolled(potential, ULA(0.1), objective, sgd, particles=X, noise=Noise(0), unrolled_steps=1)


ALIKE = "functional is not differentiable in the samples.*Single"
USELESS = {
    "detached": (ALIKE, lambda: Functional(lambda x, w: (w @ x.detach() - 1).square().sum())),
    "a comparison": (ALIKE, lambda: Functional(lambda x, w: w @ (x[:, 0] > 0).double())),
    "another tensor's": (ALIKE, lambda: Functional(lambda x, w: torch.ones(1, requires_grad=True).sum())),
    "in a sum": (ALIKE, lambda: Reward(lambda x: x.sum(1)) + Functional(lambda x, w: w @ x[:, 0].sign().detach())),
    "a vector": (r"functional must be a 0-d tensor, got shape \(2,\)", lambda: Functional(lambda x, w: w @ x)),
    "a number": ("functional must be a 0-d tensor, got float", lambda: Functional(lambda x, w: 1.0)),
    "other events": ("MMD: data have event shape", lambda: MMD(torch.eye(3, dtype=F64))),
}


@pytest.mark.parametrize("build", [queue, unrolled])
@pytest.mark.parametrize("name", USELESS)
def test_objectives_without_a_derivative_in_the_samples(name, build):
    message, objective = USELESS[name]
    if build is unrolled:  # a loop over particles looks at the weights first
        message = "functional (must be a 0-d tensor that depends|is not differentiable)|MMD: data have event shape"
    with pytest.raises(InvalidInputError, match=message):
        build(objective())


class Rows(Adjoint):
    """Pulls back rows of its own choice."""

    def __init__(self, rows, own=None):
        self.longest, self.own = rows, rows if own is None else own

    def rows(self, chain):
        return self.longest

    def rows_of(self, chain, noise, index):
        return self.own


@pytest.mark.parametrize("loop", [Nested, Queue])
def test_a_chain_on_whose_rows_nothing_is_trained(loop):
    """A queue would wait for its first gradient for ever."""
    for kept, estimator in ((range(6), None), ((4, 5), Rows(range(4, 6)))):
        chain, reward = affine_chain(6, 2, pretrained_rows=kept)
        sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
        with pytest.raises(InvalidInputError, match=r"nothing would be trained: .*\.\.5 .* pretrained_rows"):
            loop(chain, Reward(reward), sgd, batch=4, noise=Noise(0), estimator=estimator)


@pytest.mark.parametrize("loop", [Nested, Queue])
@pytest.mark.parametrize(
    "estimator",
    [
        Rows(range(3)),
        Rows(range(6, 6)),
        Rows(range(2, 8)),
        Rows(range(-1, 6)),
        Rows(range(0, 6, 5)),
        Rows(range(3, 6), range(1, 6)),
        Rows(range(3, 6), range(3, 5)),
    ],
    ids=lambda estimator: f"{estimator.longest}, {estimator.own}",
)
def test_an_estimator_whose_rows_are_not_the_last_ones(loop, estimator):
    chain, reward = affine_chain(6, 2)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match=r"Rows pulls back range.*last rows of the chain: range\(k, 6"):
        loop(chain, Reward(reward), sgd, batch=4, noise=Noise(0), estimator=estimator).step()


def test_schedules_that_an_update_cannot_step():
    one, other = (torch.optim.SGD(Banana().parameters(), lr=0.1) for _ in range(2))
    rates = torch.optim.lr_scheduler
    with pytest.raises(InvalidInputError, match=r"ReduceLROnPlateau does not step by itself .*metrics"):
        Update(one, schedule=rates.ReduceLROnPlateau(one))
    parts = [rates.ConstantLR(other), rates.ExponentialLR(other, 0.9)]
    chained = rates.ChainedScheduler([rates.ConstantLR(other)])
    for schedule in (rates.ExponentialLR(other, 0.9), rates.SequentialLR(other, parts, [2]), chained):
        with pytest.raises(InvalidInputError, match="schedule is that of another optimizer"):
            Update(one, schedule=schedule)
        Update(other, schedule=schedule)


def test_differentiable_functionals_and_divergences_pass():
    for objective in (Functional(lambda x, w: (w @ x - 1).square().sum()), MMD(X)):
        queue(objective), unrolled(objective)
