"""Several runs at once against the same runs one by one; what cannot run together is refused."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from implicit_diffusion.commands.shared.hexagon_problem import mixture, smooth_reward
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.loops import NestedParticles, Single, Unrolled, Update, Vectorized
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD, ForwardKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers import HMC, MALA, ULA

F64, RUNS = torch.float64, 3
REWARD = Reward(smooth_reward)


class Well(nn.Module):
    """A network in a quadratic well, with a scalar parameter of its own for every run, and a buffer."""

    def __init__(self, seed, depth=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=F64))
        self.scale = nn.Parameter(torch.rand((), generator=generator, dtype=F64))
        self.register_buffer("centre", torch.full((2,), seed // 2 + 0.5, dtype=F64))  # that of two runs is the same
        self.depth = depth

    def forward(self, x):
        return self.depth * (x - self.centre).square().sum(1) + self.scale * (x @ self.weight.T).tanh().sum(1)


def black_box(x):
    return torch.from_numpy(x.numpy().sum(1) * 0.1)


def hexagon(seed, objective=REWARD, optimizer=torch.optim.SGD, kernel=0.2, kind=Single, n=40, clip=None, **options):
    potential = mixture(None, 1.0, F64)
    update = Update(optimizer([potential.logits], lr=0.3), max_grad_norm=clip)
    objective = objective(seed) if not isinstance(objective, Reward) else objective
    kernel = ULA(kernel) if isinstance(kernel, float) else kernel
    x = potential.sample(n, Noise(seed), 0)
    return kind(potential, kernel, objective, update, particles=x, noise=Noise(seed).stream(1), **options)


def well(seed, lr=0.01, optimizer=torch.optim.Adam, depth=1.0, frozen=False, **options):
    potential = Well(seed, depth)
    potential.scale.requires_grad_(not frozen)
    x = Noise(seed).normal((30, 2), 0, dtype=F64)
    update = optimizer(potential.parameters(), lr=lr)
    return Single(potential, ULA(0.05), REWARD, update, particles=x, noise=Noise(seed).stream(1), **options)


def annealed_well(seed, **options):
    """With another log Z for every run, known from weighted draws."""
    loop = well(seed, **options)
    log_z = torch.tensor(0.3 * seed - 1, dtype=F64)
    loop.refresh(Particles(loop.weighted_state.x, 0.1 * Noise(seed).normal((30,), 1, dtype=F64), log_z))
    return loop


def with_data(seed):
    return REWARD + 0.2 * ForwardKL(Noise(seed).normal((20, 2), 5, dtype=F64), batch=8)


def to_samples(seed):
    return REWARD + 0.2 * MMD(Noise(seed).normal((20, 2), 5, dtype=F64))


CASES = {
    "plain": {},
    "lag": {"lag": True},
    "weighted": {"weighted": True, "optimizer": torch.optim.Adam},
    "x-first": {"weighted": True, "order": "x-first"},
    "MALA": {"weighted": True, "kernel": MALA(0.2)},
    "HMC": {"kernel": HMC(0.3, 2)},
    "clipped": {"clip": 0.003},
    "data": {"objective": with_data, "weighted": True},
    "MMD": {"objective": to_samples},
    "black box": {"objective": Reward(black_box)},
    "several iterations": {"iterations": 3},
    "nested": {"kind": NestedParticles, "inner_steps": 3},
    "unrolled": {"kind": Unrolled, "unrolled_steps": 3},
    "network": {"make": well, "weighted": True},
    "frozen parameter": {"make": well, "frozen": True},
    "known log Z": {"make": annealed_well, "weighted": True},
}


def same(one, other, tolerance):
    """Whether two states are the same, but for rounding."""
    for p, q in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        if isinstance(p, torch.Tensor):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        else:
            assert p == (pytest.approx(q, rel=1e-12) if isinstance(p, float) else q)


@pytest.mark.parametrize("name", CASES)
def test_runs_at_once_are_the_runs_one_by_one(name):
    """In double precision to 1e-11 after 20 steps, which hold resamplings where particles have weights."""
    options = dict(CASES[name])
    make = options.pop("make", hexagon)
    singles = [make(seed, **options) for seed in range(RUNS)]
    together = Vectorized([make(seed, **options) for seed in range(RUNS)])
    for _ in range(20):
        each, metrics = [loop.step() for loop in singles], together.step()
        assert metrics.keys() == each[0].keys()
        for key in metrics:
            expected = torch.tensor([float(own[key]) for own in each], dtype=F64)
            actual = torch.as_tensor(metrics[key], dtype=F64).expand(RUNS)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11, msg=lambda text, key=key: key + text)
    for own, loop in zip(singles, together.loops, strict=True):
        same(own.state_dict(), loop.state_dict(), 1e-11)
    assert together.loops[0].weighted_state.x.ne(together.loops[1].weighted_state.x).all()


def test_a_run_continues_to_the_bit():
    def make():
        return Vectorized([hexagon(seed, weighted=True, optimizer=torch.optim.Adam) for seed in range(RUNS)])

    whole, first, second = make(), make(), make()
    for _ in range(7):
        first.step()
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        second.step()
    for _ in range(13):
        whole.step()
    same(whole.state_dict(), second.state_dict(), 0.0)
    alone = hexagon(1, weighted=True, optimizer=torch.optim.Adam)
    alone.load_state_dict(first.state_dict()["loops"][1])  # a run leaves the others, and goes on by itself
    for _ in range(6):
        alone.step()
    same(alone.state_dict(), whole.state_dict()["loops"][1], 1e-11)


def test_a_run_that_diverges_is_named():
    loops = [well(seed) for seed in range(RUNS)]
    together = Vectorized(loops)
    together.step()
    with torch.no_grad():
        loops = together.loops
        state = together.state_dict()
        state["loops"][2]["weighted_state"]["x"].fill_(1e200)
    together.load_state_dict(state)
    with pytest.raises(NonFiniteError, match="run 2: "):
        together.step()
    torch.testing.assert_close(together.loops[0].model.weight, state["loops"][0]["model"]["weight"])


class Normalised(torch.optim.SGD):
    """Steps of the length lr: the norm is over all entries."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad / p.grad.norm()


class Branching(Well):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x.sum(1)


def shared_potential():
    one = hexagon(0)
    other = hexagon(1)
    other.model = one.model
    return [one, other]


def branching():
    loops = []
    for seed in range(2):
        potential = Branching(seed)
        x = Noise(seed).normal((30, 2), 0, dtype=F64)
        sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
        loops.append(Single(potential, ULA(0.05), REWARD, sgd, particles=x, noise=Noise(seed)))
    return loops


REFUSED = {
    "at least two": lambda: [hexagon(0)],
    "all be Single": lambda: [hexagon(0), hexagon(1, kind=Unrolled, unrolled_steps=2)],
    "share theirs": shared_potential,
    "differ in kernel": lambda: [hexagon(0), hexagon(1, kernel=0.1)],
    "differ in particles": lambda: [hexagon(0), hexagon(1, n=41)],
    "differ in weighted": lambda: [hexagon(0), hexagon(1, weighted=True)],
    "same settings": lambda: [well(0), well(1, lr=0.02)],
    "more than parameters": lambda: [well(0), well(1, depth=2.0)],
    "not elementwise": lambda: [well(s, optimizer=Normalised) for s in range(2)],
    "all runs at once": branching,
    "min_ess shortens": lambda: [hexagon(s, weighted=True, min_ess=0.3) for s in range(2)],
}


@pytest.mark.parametrize("message", REFUSED)
def test_loops_that_cannot_run_together_are_refused(message):
    with pytest.raises(InvalidInputError, match=message):
        Vectorized(REFUSED[message]())


def test_updates_with_more_than_a_step_are_refused():
    loops = []
    for seed in range(2):
        potential = mixture(None, 1.0, F64)
        update = Update(torch.optim.SGD([potential.logits], lr=0.1), ema_decay=0.9)
        x = potential.sample(10, Noise(seed))
        loops.append(Single(potential, ULA(0.2), REWARD, update, particles=x, noise=Noise(seed)))
    with pytest.raises(InvalidInputError, match="one by one"):
        Vectorized(loops)


def test_states_of_other_loops_are_refused():
    together = Vectorized([hexagon(seed) for seed in range(2)])
    with pytest.raises(InvalidInputError, match="2 loops, got 3"):
        together.load_state_dict({"loops": [{}, {}, {}]})
