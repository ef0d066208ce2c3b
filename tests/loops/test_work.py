"""Work is counted by the loop that does it: whatever else samples from the same chain leaves its count alone."""

import inspect

import pytest
import torch

from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.gradients import Adjoint, FullBackprop, TruncatedBackprop
from implicit_diffusion.loops import Nested, Queue
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from tests.helpers.oracles import affine_chain

N, BATCH = 5, 3
LOOPS = {
    "nested": (Nested, {}),
    "backpropagation": (Nested, {"estimator": FullBackprop()}),
    "truncated": (Nested, {"estimator": TruncatedBackprop(2)}),
    "queue": (Queue, {}),
    "queue, stride 2": (Queue, {"stride": 2}),
    "truncated queue": (Queue, {"estimator": TruncatedBackprop(3, random=True)}),
}


def build(name, chain, reward, seed=0):
    kind, options = LOOPS[name]
    sgd = torch.optim.SGD(chain.denoiser.parameters(), lr=1e-3)
    return kind(chain, Reward(reward) + 0.5 * PathKL(), sgd, batch=BATCH, noise=Noise(seed), **options)


@pytest.mark.parametrize("name", LOOPS)
def test_the_count_is_that_of_the_networks_calls(name):
    chain, reward = affine_chain(N, 2, pretrained_rows=(1,))
    calls = []
    for network in (chain.denoiser, chain.reference):
        network.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    loop = build(name, chain, reward)
    calls.clear()  # what was tried when the loop was made is not training
    for _ in range(3 * N):
        metrics = loop.step()
        assert metrics["network_evaluations"] == loop.cost()["network_evaluations"] == sum(calls)


@pytest.mark.parametrize("name", LOOPS)
def test_evaluations_predictions_and_other_loops_leave_it_alone(name):
    chain, reward = affine_chain(N, 2)
    alone, shared = build(name, *affine_chain(N, 2)), build(name, chain, reward)
    other, other_alone = build(name, chain, reward, seed=1), build(name, *affine_chain(N, 2), seed=1)
    for _ in range(2 * N):
        expected = alone.step()["network_evaluations"]
        theta = {key: value.clone() for key, value in chain.denoiser.state_dict().items()}
        other_alone.step(), other.step()
        chain.denoiser.load_state_dict(theta)
        evaluate(chain, reward, Noise(7), starts=4)
        predict_memory(shared)
        chain.sample(Noise(8), 2)
        Adjoint()(chain, shared.objective, Noise(9), BATCH)
        assert shared.step()["network_evaluations"] == expected
    assert other.cost() == other_alone.cost()


@pytest.mark.parametrize("name", LOOPS)
def test_the_count_continues_with_the_state(name):
    loop, other = (build(name, *affine_chain(N, 2)) for _ in range(2))
    for _ in range(N):
        loop.step()
    other.load_state_dict(loop.state_dict())
    assert other.cost() == loop.cost() and loop.cost()["network_evaluations"] > 0


@pytest.mark.parametrize("kind", [Nested, Queue, ChainLoop])
def test_constructors_are_written_out(kind):
    """`help` shows every argument, and the docstring explains each."""
    parameters = list(inspect.signature(kind).parameters.values())
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    assert all(p.annotation is not p.empty for p in parameters)
    assert all(f"    {p.name}: " in kind.__doc__ for p in parameters)
