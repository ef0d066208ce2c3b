"""The prediction against tensors that a running loop really holds, and a network that can be counted by hand."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.conditions import Drawn, Embedded
from implicit_diffusion.denoisers.lora import checkpoint_activations
from implicit_diffusion.errors import MemoryLimitError
from implicit_diffusion.gradients import FullBackprop, pull_back
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.loops.memory import Memory, check_memory, predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, Reward
from implicit_diffusion.samplers.chain import Chain
from tests.helpers import tiny
from tests.helpers.oracles import affine_chain, table

N, DIM, HIDDEN, BATCH = 7, 3, 5, 4


class Counted(Queue):
    """Counts what its slots hold at the fullest moment, bytes of distinct storages and of the tensors themselves."""

    fullest, storages = 0, 0

    def _pull(self, call):
        tensors = [x for slot in self.slots if slot.states for x in (*slot.states.values(), *slot.carry.values())]
        own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        self.fullest = max(self.fullest, sum(x.nbytes for x in tensors))
        self.storages = max(self.storages, sum(own.values()))
        return super()._pull(call)


@pytest.mark.parametrize("stride", range(1, N + 1))
def test_states_are_those_that_a_running_queue_holds(stride):
    chain, reward = affine_chain(N, DIM)
    optimizer = torch.optim.SGD(chain.denoiser.parameters(), lr=1e-3)
    loop = Counted(chain, Reward(reward), optimizer, batch=BATCH, noise=Noise(0), stride=stride)
    predicted = predict_memory(loop).states
    for _ in loop.run(3 * N):
        pass
    assert loop.fullest == predicted
    # No state is a view that keeps more alive, but for the adjoints: one call's share a storage, until the next call.
    assert predicted <= loop.storages <= predicted + BATCH * DIM * 8


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, DIM)).double()

    def forward(self, x, t):
        return self.layers(x)


def build(loop=Queue, objective=None, optimizer=torch.optim.Adam, **options):
    net = MLP()
    chain = Chain(net, table(N), (DIM,))
    update = Update(optimizer(net.parameters(), lr=1e-3), ema_decay=0.9)
    objective = objective or Reward(lambda x: x.sum(1))
    return loop(chain, objective, update, batch=BATCH, noise=Noise(0), **options)


def test_activations_of_a_network_that_can_be_counted_by_hand():
    network = (DIM + HIDDEN + HIDDEN) * 8  # the inputs of the layers
    assert predict_memory(build()).activations == N * BATCH * network
    assert predict_memory(build(stride=4)).activations == 2 * BATCH * network
    assert predict_memory(build(Nested)).activations == BATCH * network
    full = build(Nested, estimator=FullBackprop())
    assert predict_memory(full).activations == N * BATCH * network

    # u_0's weights ask for no gradient, so it keeps SiLU's input alone; and the cost keeps what it squares.
    compared = build(objective=Reward(lambda x: x.sum(1)) + PathKL())
    assert predict_memory(compared).activations == N * BATCH * (network + HIDDEN * 8 + DIM * 8)


def test_activations_of_a_large_reward_count():
    judge = nn.Sequential(nn.Linear(DIM, 1000), nn.Tanh(), nn.Linear(1000, 1), nn.Flatten(0)).double()
    heavy = build(Nested, objective=Reward(judge.requires_grad_(False)))
    assert predict_memory(heavy).activations == BATCH * 1000 * 8  # Tanh's output


class Live(TorchDispatchMode):
    """Bytes of all tensors that are made inside and still alive, at the fullest moment."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.known:
                size = x.untyped_storage().nbytes()
                self.known.add(key)
                self.now += size
                weakref.finalize(x.untyped_storage(), self._gone, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key, size):
        self.now -= size
        self.known.discard(key)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_unet_are_those_that_a_pull_back_holds(checkpointing):
    """With checkpoints too, where one block at a time is computed again."""
    shape = (3, 16, 16)
    network = tiny.unet(sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=2)
    if checkpointing:
        checkpoint_activations(network)
    chain = Chain(DiffusersDenoiser(network), table(2), shape)
    objective = Reward(lambda x: x.flatten(1).mean(1)) + PathKL()
    loop = Nested(chain, objective, torch.optim.SGD(network.parameters()), batch=1, noise=Noise(0))
    peaks = {}
    for n in (4, 8):
        x = torch.zeros(1, n, *shape)
        network.zero_grad(set_to_none=False)
        with chain.evaluating(), Live() as live:
            pull_back(chain, objective, x, [0], torch.ones_like(x))
        peaks[n] = live.peak
    measured = (peaks[8] - peaks[4]) / 4
    assert predict_memory(loop).activations == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("optimizer", "moments"), [(torch.optim.Adam, 2), (torch.optim.SGD, 0), (torch.optim.Adagrad, 1)]
)
def test_parameters_gradients_and_moments(optimizer, moments):
    loop = build(optimizer=optimizer)
    theta = sum(p.nbytes for p in loop.model.parameters())
    counter = 8  # the average counts its updates
    memory = predict_memory(loop)
    assert memory.resident == 3 * theta + counter  # θ, u_0 and the average
    assert memory.parameters == (4 + moments) * theta + counter


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(DIM))

    def forward(self, x, t, words):
        return self.w * x + words


def test_a_table_that_stays_on_the_device_counts_once(monkeypatch):
    denoiser = Embedded(Shifted(), {"words": torch.zeros(5, DIM)})
    chain = Chain(denoiser, table(N), (DIM,), condition=Drawn("prompt", torch.arange(5)))
    loop = Nested(chain, Reward(lambda x: x.sum(1)) + PathKL(), torch.optim.SGD(denoiser.parameters()), batch=BATCH,
                  noise=Noise(0))  # fmt: skip
    with_it = predict_memory(loop)
    monkeypatch.setattr("implicit_diffusion.denoisers.embedding_table.IN_MEMORY", 0)
    without = predict_memory(loop)
    assert with_it.parameters - without.parameters == with_it.resident - without.resident == 5 * DIM * 4


def test_prediction_leaves_no_trace():
    loop = build(objective=Reward(lambda x: x.sum(1)) + PathKL())
    predict_memory(loop)
    assert loop.evaluations == 0
    assert all(p.grad is None for p in loop.model.parameters())
    assert loop.model.training


def test_refusal_names_parts_and_ways_out():
    memory = Memory(states=3 * 10**9, activations=10**9, parameters=5 * 10**8, resident=2 * 10**8)
    check_memory(memory, "cpu", available=43 * 10**8)  # what is in memory already need not fit again
    with pytest.raises(MemoryLimitError, match=r"4.5 GB \(states 3 GB.*4.2 GB free.*smaller batch.*stride.*nested"):
        check_memory(memory, "cpu", available=42 * 10**8)
    with pytest.raises(MemoryLimitError, match=r"cpu has .* free"):
        check_memory(Memory(10**18, 0, 0), "cpu")
    check_memory(Memory(10**6, 0, 0), "cpu")
