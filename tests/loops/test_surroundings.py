"""Loops do what they do whatever they stand in: autocast, no_grad, inference_mode, other defaults of torch."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.gradients import Adjoint, FullBackprop
from implicit_diffusion.loops import Nested, NestedParticles, Queue, Single, Unrolled, Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import PathKL, ReverseKL, Reward
from implicit_diffusion.samplers import ULA
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.samplers.simulation import simulate
from tests.helpers.oracles import table

N = 3
START = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))


def layers(*sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(*sizes[:2], dtype=torch.float32), nn.Linear(*sizes[1:], dtype=torch.float32)
    return nn.Sequential(first, nn.Tanh(), last)


class U(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = layers(3, 8, 2)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None].to(x)], 1))


class V(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = layers(2, 8, 1)

    def forward(self, x):
        return self.net(x)[:, 0] + x.square().sum(1) / 2


def reward(x):
    return torch.tanh(x[:, 0])


def on_chain(kind, **settings):
    chain = Chain(U(), table(N), (2,))
    adam = torch.optim.Adam(chain.denoiser.parameters(), 0.05)
    objective = Reward(reward) + 0.1 * PathKL()
    return kind(chain, objective, Update(adam, ema_decay=0.9), batch=8, noise=Noise(0), **settings)


def on_particles(kind, **settings):
    net = V()
    objective = Reward(reward) if kind is Unrolled else Reward(reward) + 0.1 * ReverseKL.to_initial(net)
    adam = torch.optim.Adam(net.parameters(), 0.05)
    return kind(net, ULA(0.1), objective, adam, particles=START, noise=Noise(0), **settings)


LOOPS = {
    "queue": lambda: on_chain(Queue),
    "nested": lambda: on_chain(Nested),
    "backprop": lambda: on_chain(Nested, estimator=FullBackprop()),
    "single": lambda: on_particles(Single),
    "weighted": lambda: on_particles(Single, weighted=True),
    "several": lambda: on_particles(Single, iterations=2),
    "nested particles": lambda: on_particles(NestedParticles, inner_steps=2),
    "unrolled": lambda: on_particles(Unrolled, unrolled_steps=2),
}


def trained(name, steps=2 * N + 2):
    loop = LOOPS[name]()
    for _ in range(steps):
        loop.step()
    return loop.model.state_dict()


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def cast(**settings):
    return torch.autocast("cpu", dtype=torch.bfloat16, **settings)


@pytest.mark.parametrize("name", LOOPS)
def test_under_autocast_every_step_sees_the_one_before(name):
    with cast(cache_enabled=False):
        right = trained(name)
    with cast():
        found = trained(name)
        assert torch.is_autocast_cache_enabled()
    assert equal(found, right) and not equal(found, LOOPS[name]().model.state_dict())


def test_samples_evaluations_and_the_caller_see_the_present_weights():
    chain = Chain(U(), table(N), (2,))
    x, t = START, torch.zeros(len(START))
    looks = {
        "sample": lambda: chain.sample(Noise(1), 4),
        "evaluate": lambda: evaluate(chain, reward, Noise(1), starts=4).path_kl,
        "simulate": lambda: list(simulate(ULA(0.1), potential, x, Noise(1), 2))[-1][0].x,
    }
    potential = V()
    with cast():
        chain.denoiser(x, t), potential(x)  # with gradients: autocast keeps its casts
        before = {name: look() for name, look in looks.items()}
        with torch.no_grad():
            for p in (*chain.denoiser.parameters(), *potential.parameters()):
                p.mul_(2)
        after = {name: look() for name, look in looks.items()}
    with cast(cache_enabled=False):
        right = {name: look() for name, look in looks.items()}
    assert equal(after, right) and not any(torch.equal(before[name], after[name]) for name in looks)
    with cast():
        loop = on_chain(Nested)
        loop.model(x, t)
        loop.step()
        assert torch.equal(loop.model(x, t), copy.deepcopy(loop.model)(x, t))  # between two steps, by the caller


@pytest.mark.parametrize("estimator", [Adjoint(), FullBackprop()])
def test_gradients_under_autocast_are_those_of_the_present_weights(estimator):
    def gradients(**settings):
        chain = Chain(U(), table(N), (2,))
        with cast(**settings):
            chain.denoiser(START, torch.zeros(len(START)))
            with torch.no_grad():
                [p.mul_(2) for p in chain.denoiser.parameters()]
            estimator(chain, Reward(reward), Noise(0), 8)
        return torch.cat([p.grad.flatten() for p in chain.denoiser.parameters()])

    assert torch.equal(gradients(), gradients(cache_enabled=False))


def test_the_cache_is_given_back():
    for cached in (True, False):
        with cast(cache_enabled=cached):
            with contextlib.suppress(KeyError), eval_mode(U()):
                assert not torch.is_autocast_cache_enabled()
                raise KeyError
            assert torch.is_autocast_cache_enabled() == cached


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("around", [torch.no_grad, default_dtype, deterministic])
@pytest.mark.parametrize("name", LOOPS)
def test_other_surroundings_change_nothing(name, around):
    right = trained(name)
    with around():
        assert equal(trained(name), right)


@pytest.mark.parametrize("name", LOOPS)
def test_inference_mode_is_refused(name):
    with torch.inference_mode(), pytest.raises(InvalidInputError, match=r"inference_mode rules them out.*no_grad"):
        LOOPS[name]()
    loop = LOOPS[name]()
    with torch.inference_mode(), pytest.raises(InvalidInputError, match="inference_mode rules them out"):
        loop.step()
    loop.step()


def test_inference_mode_does_no_harm_to_chains():
    chain = Chain(U(), table(N), (2,))
    with torch.inference_mode():
        x = chain.sample(Noise(0), 4)
        made = Chain(U(), table(N), (2,), reference=None)
        found = evaluate(chain, reward, Noise(0), starts=2)
    assert torch.equal(x, chain.sample(Noise(0), 4)) and found.path_kl.isfinite().all()
    assert not any(p.is_inference() for p in made.reference.parameters())
    with torch.inference_mode(), pytest.raises(InvalidInputError, match="inference_mode rules them out"):
        next(simulate(ULA(0.1), V(), START, Noise(0), 1))
