"""No random number of a sampler serves twice: not in another iteration, nor for data, starts or resampling."""

from dataclasses import dataclass, field

import pytest
import torch

from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.loops import NestedParticles, Single, Unrolled
from implicit_diffusion.models.energy_model import Moves
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import ForwardKL, Reward
from implicit_diffusion.potentials import GaussianMixture, Tilted, mlp
from implicit_diffusion.potentials.plane import LAWS, law
from implicit_diffusion.samplers import HMC, MALA, ULA, Underdamped
from implicit_diffusion.samplers.replicas import Replicas, annealed
from implicit_diffusion.samplers.simulation import simulate
from implicit_diffusion.samplers.warmup import warm_up
from tests.helpers import energy_models
from tests.helpers.oracles import affine_chain

F64 = torch.float64
KERNELS = {"ula": ULA, "mala": MALA, "hmc": HMC, "underdamped": Underdamped}


@dataclass(frozen=True)
class Ledger(Noise):
    """Noise that writes down every key it is asked for."""

    keys: list = field(default_factory=list, compare=False)

    def stream(self, *key):
        return Ledger(self.seed, self.prefix + key, self.keys)

    def generator(self, *key, device="cpu"):
        self.keys.append(self.prefix + key)
        return super().generator(*key, device=device)


def gaussian(dtype=F64):
    return Tilted(mlp(2, Noise(9), width=4, depth=1).to(dtype), (2,))


def spread(std):
    return GaussianMixture(torch.zeros(1, 2, dtype=F64), std=std)


def loop(kind, kernel, noise, n=64, objective=None, **settings):
    potential = gaussian()
    objective = Reward(lambda x: x.sin().sum(1)) if objective is None else objective
    sgd = torch.optim.SGD(potential.parameters(), lr=0.0)
    return kind(potential, kernel, objective, sgd, particles=n, noise=noise, **settings)


def steps(made, count=5):
    for _ in range(count):
        made.step()


def data():
    return ForwardKL(torch.randn(9, 2, generator=torch.Generator().manual_seed(1), dtype=F64), batch=4)


SAMPLERS = {
    **{
        f"single, {k}": lambda noise, k=k: steps(loop(Single, KERNELS[k](0.1), noise, objective=data()))
        for k in KERNELS
    },
    "nested": lambda noise: steps(loop(NestedParticles, ULA(0.1), noise, objective=data(), inner_steps=3)),
    "unrolled": lambda noise: steps(loop(Unrolled, Underdamped(0.1), noise, unrolled_steps=3)),
    "annealed": lambda noise: annealed(gaussian().tempered, MALA(0.1), 32, noise, steps=4, groups=4),
    "annealed mixture": lambda noise: annealed(lambda t: spread(1 + t), MALA(0.1), 32, noise, steps=4, groups=4),
    "simulate": lambda noise: list(simulate(Underdamped(0.1), gaussian(), torch.zeros(2**15, 2, dtype=F64), noise, 5)),
    "warm-up": lambda noise: warm_up(MALA(0.1), gaussian(), torch.zeros(8, 2, dtype=F64), noise, steps=20),
    "mixture": lambda noise: GaussianMixture(torch.zeros(3, 2)).sample(8, noise),
    "tilted": lambda noise: gaussian().sample(8, noise),
    "energy model": lambda noise: energy_models.gaussian(moves=Moves("underdamped", 0.1)).sample(8, noise, 3),
    **{name: lambda noise, name=name: law(name).sample(8, noise) for name in LAWS},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_key_serves_twice(name):
    noise = Ledger(0)
    SAMPLERS[name](noise)
    assert noise.keys and len(set(noise.keys)) == len(noise.keys)


def test_trajectories_of_a_chain_share_no_key():
    """Starts, rows and conditions of several trajectories."""
    noise, (plain, _) = Ledger(0), affine_chain(4, 2)
    chain = plain.replace(condition=Drawn("label", torch.arange(3)))
    for index in range(3):
        chain.initial(noise, 2, index)
        chain.conditions(noise, 2, [index])
    for row in range(4):
        chain.innovation(noise, 2, range(3), [row] * 3)
    assert len(set(noise.keys)) == len(noise.keys) == 3 * (1 + 1 + 4)


class Recorded(ULA):
    """Keeps what it is moved by."""

    def __init__(self, h):
        super().__init__(h)
        self.seen = []

    def move(self, step):
        self.seen.append(step.draws[0].clone())
        return super().move(step)


@pytest.mark.parametrize("kind", [Single, NestedParticles, Unrolled, "simulate"])
@pytest.mark.parametrize(("n", "count"), [(2**13, 70), (2**16, 5)], ids=["several to a block", "one to a block"])
def test_steps_have_noise_of_their_own(kind, n, count):
    """All pairs of steps, across blocks and across spans of one generator: correlations of independent numbers."""
    kernel = Recorded(0.1)
    if kind == "simulate":
        for _ in simulate(kernel, gaussian(), torch.zeros(n, 2, dtype=F64), Noise(0), count):
            pass
    else:
        settings = {Single: {}, NestedParticles: {"inner_steps": 1}, Unrolled: {"unrolled_steps": 1}}[kind]
        steps(loop(kind, kernel, Noise(0), n, **settings), count)
    numbers = torch.stack(kernel.seen).flatten(1)
    correlation = numbers @ numbers.mT / numbers.shape[1] - torch.eye(len(numbers), dtype=F64)
    assert len(numbers) == count and correlation.abs().max() < 6 / numbers.shape[1] ** 0.5


class Normal(ForwardKL):
    """Data drawn from N(0, I), and kept."""

    def __init__(self, n):
        super().__init__(torch.zeros(2, 2, dtype=F64))
        self.n, self.seen = n, []

    def draw(self, generator):
        self.seen.append(torch.randn(self.n, 2, generator=generator, dtype=F64))
        return self.seen[-1]


@pytest.mark.parametrize("n", [64, 2**16])
@pytest.mark.parametrize("kind", [Single, NestedParticles])
def test_data_starts_and_moves_share_no_number(kind, n):
    kernel, term = Recorded(0.1), Normal(n)
    made = loop(kind, kernel, Noise(0), n, term, **({"inner_steps": 1} if kind is NestedParticles else {}))
    start = made.weighted_state.x.flatten()
    steps(made, 3)
    numbers = torch.cat([start, *(x.flatten() for x in (*kernel.seen, *term.seen))])
    assert len(numbers.unique()) == len(numbers) == 7 * 2 * n


def test_replicas_start_and_move_by_different_numbers():
    kernel, starts = Recorded(0.1), []

    class Keeps(Tilted):
        def sample(self, n, noise, *key):
            starts.append(super().sample(n, noise, *key))
            return starts[-1]

    path = Keeps(gaussian().network, (2,))
    annealed(lambda t: path, kernel, 64, Noise(0), steps=3, groups=4)
    numbers = torch.cat([starts[0].flatten(), *(x.flatten() for x in kernel.seen)])
    assert len(numbers.unique()) == len(numbers) == 4 * 128


def test_groups_of_replicas_are_resampled_independently():
    """Groups with the same particles under the same weights: a number in common would choose the same ones in all."""
    start = GaussianMixture(torch.zeros(1, 2, dtype=F64))
    end = GaussianMixture(torch.full((1, 2), 0.8, dtype=F64))
    n, groups = 200, 16
    x = start.sample(n, Noise(1))
    found = Replicas(ULA(1e-12), start, x.repeat(groups, 1), Noise(0), groups=groups)
    found.step(end)  # moves by 10⁻⁶, so that a particle is where the chosen one was
    counts = [torch.cdist(group.x, x).argmin(1).bincount(minlength=n) for group in found.groups]
    assert all(kept.sum() == n and kept.max() > 1 for kept in counts)  # all were resampled
    assert len({tuple(kept.tolist()) for kept in counts}) > groups / 2
