"""What a state carries over into another loop, name by name, and what that loop then does with it."""

import copy

import pytest
import torch

from implicit_diffusion.loops import Nested, Queue, Single
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers import gibbs_loops
from tests.helpers.oracles import affine_chain


def chain_loop(kind, beta):
    chain, reward = affine_chain(4, 2)
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=0.05)
    return kind(chain, Reward(reward) + beta * PathKL(), sgd, batch=3, noise=Noise(0))


@pytest.mark.parametrize("kind", [Nested, Queue])
def test_weights_of_terms_come_with_the_state(kind):
    """Those that a callback moved: the loop that goes on had been built with the ones in the beginning."""
    whole, second = chain_loop(kind, 0.5), chain_loop(kind, 0.5)
    for _ in range(8):
        whole.step()
    whole.objective = whole.objective.with_weight(PathKL, 3.0)
    second.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert second.objective.weight(PathKL) == 3.0 and second.objective.weight(Reward) == 1.0
    for _ in range(8):
        a, b = whole.step(), second.step()
    assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    for p, q in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(p, q)


def test_counts_and_log_z_come_with_the_state():
    whole, second = gibbs_loops.build("weighted ula"), gibbs_loops.build("weighted ula")
    whole.log_z0 = 2.5
    for _ in range(5):
        whole.step()
    second.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert isinstance(second, Single) and second.log_z0 == 2.5
    assert (second.iteration, second.gradient_evaluations, second.update.updates) == (5, whole.gradient_evaluations, 5)
    assert torch.equal(second.particles.log_z, whole.particles.log_z)


def test_states_in_flight_own_their_memory():
    """A view of an iteration's states would keep those of all its slots alive."""
    loop = chain_loop(Queue, 0.5)
    for _ in range(6):
        loop.step()
    states = [x for slot in loop.slots for row, x in slot.states.items() if row > 0]
    assert len(states) > 4 and all(x.untyped_storage().nbytes() == x.nbytes for x in states)
