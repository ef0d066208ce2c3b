"""Constructors and functions about particles: whatever is wrong is refused by the name of the argument, in one line."""

import pytest
import torch

import implicit_diffusion as idf
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops.diagnostics import advice, ess_in_time, r_hat, signal_to_noise
from implicit_diffusion.objectives import Functional, gaussian_kernel
from implicit_diffusion.particles import Particles
from implicit_diffusion.potentials import Guided, Posterior, Tilted, check_normalised, conv, mlp
from implicit_diffusion.samplers.replicas import annealed
from implicit_diffusion.samplers.simulation import simulate
from tests.helpers.oracles_gibbs import Banana
from tests.helpers.potentials import NormalNormal

pytestmark = pytest.mark.usefixtures("as_users_run")

F64 = torch.float64
X = torch.linspace(-1, 1, 24, dtype=F64).view(12, 2) ** 3
NOISE, KERNEL = idf.Noise(0), idf.ULA(0.1)
NUMBERS = (None, "1", [1.0], float("nan"), True, torch.ones(2))
POSITIVE = (*NUMBERS, 0.0, -1.0, float("inf"))
COUNTS = (None, "1", 1.5, True, 0, -1)
DATA = (
    None,
    "data",
    [1.0, 2.0],
    3,
    X.numpy(),
    X[0],
    X[:0],
    X[:, :0],
    X.long(),
    X * float("nan"),
    X.to_sparse(),
    X.cfloat(),
)
FUNCTIONS = (None, "f", 3, lambda: 1, torch.nn.Module)


def loop(kind=idf.Single, objective=None, **changes):
    potential = Banana()
    given = {"particles": X, "noise": NOISE} | changes
    sgd = torch.optim.SGD(potential.parameters())
    return kind(potential, given.pop("kernel", KERNEL), objective or idf.Reward(lambda x: x.sum(1)), sgd, **given)


CALLS = {
    ("data", "MMD"): (idf.MMD, DATA),
    ("data", "Sinkhorn"): (lambda data: idf.objectives.Sinkhorn(data, 1.0), DATA),
    ("data", "ForwardKL"): (idf.ForwardKL, DATA),
    ("epsilon", "Sinkhorn"): (lambda e: idf.objectives.Sinkhorn(X, e), POSITIVE),
    ("bandwidth", ""): (gaussian_kernel, POSITIVE),
    ("kernel", "MMD"): (
        lambda k: idf.MMD(X, k),
        (
            *FUNCTIONS[1:],
            lambda x, y: None,
            lambda x, y: x[:, 0],
            lambda x, y: x @ y.mT * float("nan"),
            lambda x, y: 1 / 0,
        ),
    ),
    ("function", "Functional"): (Functional, (*FUNCTIONS, lambda x: x)),
    ("batch", "ForwardKL"): (lambda b: idf.ForwardKL(X, b), COUNTS[1:]),
    ("potential", "ReverseKL"): (idf.ReverseKL, FUNCTIONS),
    ("log_z", "ReverseKL"): (lambda z: idf.ReverseKL(Banana(), log_z=z), NUMBERS[1:]),
    ("name", "MMD"): (lambda name: idf.MMD(X, name=name), (None, 3)),
    ("name", "Sinkhorn"): (lambda name: idf.objectives.Sinkhorn(X, 1.0, name=name), (None, 3)),
    ("name", "ForwardKL"): (lambda name: idf.ForwardKL(X, name=name), (None, 3)),
    ("name", "ReverseKL"): (lambda name: idf.ReverseKL(Banana(), name), (None, 3)),
    ("name", "Functional"): (lambda name: Functional(lambda x, w: w.sum(), name), (None, 3)),
    ("step_size", "ULA"): (idf.ULA, POSITIVE),
    ("step_size", "HMC"): (idf.HMC, POSITIVE),
    ("step_size", "a schedule"): (lambda h: idf.MALA(lambda k: h), POSITIVE),
    ("leapfrogs", "HMC"): (lambda n: idf.HMC(0.1, n), COUNTS),
    ("friction", "Underdamped"): (lambda f: idf.samplers.Underdamped(0.1, f), POSITIVE),
    ("scale", "power_law"): (lambda c: idf.samplers.power_law(c, 0.5), POSITIVE),
    ("exponent", "power_law"): (lambda e: idf.samplers.power_law(0.5, e), NUMBERS),
    ("means", "GaussianMixture"): (idf.GaussianMixture, DATA),
    ("logits", "GaussianMixture"): (lambda z: idf.GaussianMixture(X, z), (3, "z", X, X[:, 0].long(), X[:3, 0])),
    ("std", "GaussianMixture"): (lambda s: idf.GaussianMixture(X, std=s), POSITIVE),
    ("n", "GaussianMixture.sample"): (lambda n: idf.GaussianMixture(X).sample(n, NOISE), COUNTS),
    ("noise", "GaussianMixture.sample"): (lambda noise: idf.GaussianMixture(X).sample(2, noise), (None, 0, "0")),
    ("network", "Tilted"): (lambda f: Tilted(f, (2,)), FUNCTIONS),
    ("event_shape", "Tilted"): (lambda shape: Tilted(mlp(2, NOISE), shape), (None, 2, (), (0,), (1.5,), ("a",))),
    ("model", "Posterior"): (lambda model: Posterior(model, X), FUNCTIONS),
    ("data", "Posterior"): (lambda data: Posterior(NormalNormal(), data), (None, "data", [1.0], 3, X.numpy(), X[:0])),
    ("t", "Posterior.tempered"): (Posterior(NormalNormal(), X.float().repeat(2, 1)).tempered, NUMBERS),
    ("simulated", "check_normalised"): (lambda f: check_normalised(f, NormalNormal(), NOISE), FUNCTIONS),
    ("model", "check_normalised"): (lambda model: check_normalised(NormalNormal().simulated, model, NOISE), FUNCTIONS),
    ("n", "check_normalised"): (
        lambda n: check_normalised(NormalNormal().simulated, NormalNormal(), NOISE, n=n),
        (*COUNTS, 19),
    ),
    ("dimension", "mlp"): (lambda n: mlp(n, NOISE), COUNTS),
    ("noise", "mlp"): (lambda noise: mlp(2, noise), (None, 0)),
    ("width", "mlp"): (lambda n: mlp(2, NOISE, width=n), COUNTS),
    ("depth", "mlp"): (lambda n: mlp(2, NOISE, depth=n), COUNTS),
    ("event", "conv"): (lambda shape: conv(shape, NOISE), (None, 3, (2,), (1, 0, 8), (1, 8.0, 8))),
    ("reward", "Guided"): (lambda r: Guided(Banana(), r, 1.0), FUNCTIONS),
    ("potential", "Guided"): (lambda v: Guided(v, lambda x: x.sum(1), 1.0), FUNCTIONS),
    ("weight", "Guided"): (lambda w: Guided(Banana(), lambda x: x.sum(1), w), NUMBERS),
    ("particles", "Single"): (lambda x: loop(particles=x), (*DATA, 1, True, X[:1])),
    ("particles", "warm_up"): (lambda x: idf.samplers.warm_up(idf.MALA(0.1), Banana(), x, NOISE), DATA),
    ("particles", "simulate"): (lambda x: next(simulate(KERNEL, Banana(), x, NOISE, 1)), DATA),
    ("particles", "Replicas"): (lambda x: idf.samplers.Replicas(KERNEL, Banana(), x, NOISE), DATA),
    ("particles", "refresh"): (lambda x: loop().refresh(x), (None, X)),
    ("refresh", "x"): (lambda x: loop().refresh(Particles(x)), (X[:5], X.float(), X.long(), X * float("nan"))),
    ("log_weights", "Particles"): (lambda a: Particles(X, a), (X[:5, 0], X, X[:, 0].long())),
    ("weights", "refresh"): (
        lambda a: loop(weighted=True).refresh(Particles(X, a)),
        (X[:, 0] * float("nan"), X[:, 0] + float("inf"), X[:, 0] - float("inf")),
    ),
    ("weighted", "Single"): (lambda v: loop(weighted=v), (None, 1, "yes")),
    ("lag", "Single"): (lambda v: loop(lag=v), (None, 1, "yes")),
    ("compiled", "Single"): (lambda v: loop(compiled=v), (None, 1, "yes")),
    ("iterations", "Single"): (lambda n: loop(iterations=n), COUNTS),
    ("order", "Single"): (lambda o: loop(order=o), (None, 1, [], "theta-first")),
    ("inner_steps", "NestedParticles"): (lambda n: loop(idf.loops.NestedParticles, inner_steps=n), COUNTS),
    ("begin", "NestedParticles"): (
        lambda b: loop(idf.loops.NestedParticles, inner_steps=1, begin=b),
        (None, [], "middle"),
    ),
    ("unrolled_steps", "Unrolled"): (lambda n: loop(idf.loops.Unrolled, unrolled_steps=n), COUNTS),
    ("steps", "warm_up"): (lambda n: idf.samplers.warm_up(idf.MALA(0.1), Banana(), X, NOISE, steps=n), (*COUNTS, 19)),
    ("target", "warm_up"): (
        lambda t: idf.samplers.warm_up(idf.MALA(0.1), Banana(), X, NOISE, target=t),
        (*POSITIVE[1:], 1.0),
    ),
    ("potential", "warm_up"): (lambda v: idf.samplers.warm_up(idf.MALA(0.1), v, X, NOISE), FUNCTIONS),
    ("potential", "Replicas"): (lambda v: idf.samplers.Replicas(KERNEL, v, X, NOISE, groups=2), FUNCTIONS),
    ("groups", "Replicas"): (lambda n: idf.samplers.Replicas(KERNEL, Banana(), X, NOISE, groups=n), COUNTS),
    ("log_z", "Replicas"): (lambda z: idf.samplers.Replicas(KERNEL, Banana(), X, NOISE, groups=2, log_z=z), NUMBERS),
    ("path", "annealed"): (lambda path: annealed(path, KERNEL, 8, NOISE), (None, 3, "path")),
    ("steps", "annealed"): (lambda n: annealed(lambda t: idf.GaussianMixture(X), KERNEL, 8, NOISE, steps=n), COUNTS),
    ("steps", "simulate"): (lambda n: next(simulate(KERNEL, Banana(), X, NOISE, n)), COUNTS[:4]),
    ("groups", "signal_to_noise"): (lambda n: signal_to_noise(loop(), n), (*COUNTS, 1, 7)),
    ("loop", "advice"): (lambda it: advice(it, {}), (None, 3)),
    ("values", "r_hat"): (r_hat, (None, X[:, 0], X.long())),
    ("values", "ess_in_time"): (ess_in_time, (None, X[:, 0], X.long())),
}


@pytest.mark.parametrize("call", CALLS, ids=" of ".join)
def test_what_is_wrong_is_refused_by_name(call):
    (name, _), (make, values) = call, CALLS[call]
    for value in values:
        with pytest.raises(InvalidInputError) as caught:
            make(value)
        message = str(caught.value)
        assert name in message and "\n" not in message, (value, message)


class Breaks(Banana):
    def forward(self, x):
        return super().forward(x) @ torch.zeros(3)


def test_what_a_potential_or_objective_raises_is_one_line_about_it():
    with pytest.raises(InvalidInputError, match=r"potential fails on particles of shape \(2, 2\).*: RuntimeError"):
        idf.samplers.warm_up(idf.MALA(0.1), Breaks(), X, NOISE)
    with pytest.raises(InvalidInputError, match=r"functional fails on the initial particles: RuntimeError"):
        loop(objective=Functional(lambda x, w: w @ torch.zeros(3)))
    with pytest.raises(InvalidInputError, match=r"kl fails on the initial particles: RuntimeError"):
        loop(objective=idf.ReverseKL(lambda x: x @ torch.zeros(3), "kl"))


def test_numbers_of_other_libraries_are_numbers():
    import numpy as np

    assert idf.ULA(np.float32(0.5)).step_size_at(0) == idf.ULA(torch.tensor(0.5)).step_size_at(0) == 0.5
    assert idf.HMC(0.1, np.int64(3)).leapfrogs == 3 and idf.objectives.Sinkhorn(X, np.float64(1.0)).epsilon == 1.0
