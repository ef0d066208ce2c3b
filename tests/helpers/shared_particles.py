"""Loops over particles, kernels and objectives as each of several processes runs them, or a single one, the reference.

Results are plain tensors and numbers of the whole: what processes share is gathered here.
"""

import copy
import importlib
import math
import warnings

import pytest
import torch

from implicit_diffusion import processes
from implicit_diffusion.design import InformationGain, PosteriorKernel
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.gradients.fused import fused_pass, own_points
from implicit_diffusion.loops import Single
from implicit_diffusion.loops.diagnostics import advice, distance, signal_to_noise
from implicit_diffusion.models.energy_model import Architecture, Moves
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import Density, ForwardKL, Reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs.callbacks.adapt import AdaptStep
from implicit_diffusion.samplers import MALA, ULA, annealed
from implicit_diffusion.samplers.weighted_state import systematic
from tests.helpers.experiments import linear_experiment
from tests.helpers.gibbs_loops import build, wave
from tests.helpers.oracles_gibbs import Banana

F64 = torch.float64
N = 24  # particles, which two and three processes share


def trained(loop):
    return torch.cat([p.detach().flatten().clone() for p in loop.model.parameters()])


def numbers_of(loop, k):
    """The random numbers of an iteration, of all particles."""
    with processes.sharing():
        parts, count = loop._draws(k), len(loop._state.x)
        return [processes.gathered(part) if part.ndim and len(part) == count else part for part in parts]


def training(loop, steps, adapt=None):
    """Start and noise, the metrics and Γ of every step, and where it ends."""
    start, noise, records = loop.weighted_state, numbers_of(loop, 0), []
    for _ in range(steps):
        metrics = loop.step()
        if adapt is not None:
            metrics["step_size"] = adapt.move(loop, metrics)
        gamma = torch.cat([p.grad.flatten() for p in loop.parameters if p.grad is not None]).clone()
        records.append(({name: float(value) for name, value in metrics.items()}, gamma))
    return {"start": start, "noise": noise, "records": records, "end": loop.weighted_state, "theta": trained(loop)}


def agree(each, one, tolerance=1e-12):
    """Start and noise to the bit; Γ, metrics and the end up to rounding; all processes alike."""
    for result in each:
        for a, b in zip((*result["start"], *result["noise"]), (*one["start"], *one["noise"]), strict=True):
            assert a is b is None or torch.equal(a, b)
        assert torch.equal(result["theta"], each[0]["theta"])
        for (metrics, gamma), (expected, whole), (first, _) in zip(
            result["records"], one["records"], each[0]["records"], strict=True
        ):
            assert (gamma - whole).abs().max() <= tolerance * whole.abs().max()
            assert metrics == first  # to the bit, so that all decide alike
            assert metrics == pytest.approx(expected, rel=10 * tolerance, abs=tolerance)
        for a, b in zip(result["end"], one["end"], strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=100 * tolerance, atol=100 * tolerance)
        torch.testing.assert_close(result["theta"], one["theta"], rtol=10 * tolerance, atol=10 * tolerance)


def named(names, steps=4, dtype=F64):
    """Trainings of loops that `gibbs_loops.BUILDS` names."""
    return {name: training(build(name, n=N, dtype=dtype), steps) for name in names}


def single(kernel=None, objective=None, lr=0.05, **settings):
    """The single loop on a banana, by gradient descent."""
    potential = Banana()
    x = potential.draw(N, torch.Generator().manual_seed(3))
    sgd = torch.optim.SGD(potential.parameters(), lr=lr)
    objective = Reward(wave) if objective is None else objective
    return Single(potential, kernel or ULA(0.1), objective, sgd, particles=x, noise=Noise(4), **settings)


def resampled():
    """θ moves so far that weighted particles are resampled."""
    return training(single(MALA(0.2), lr=1.0, weighted=True), 8)


def energy_network(weighted=True, steps=6):
    """As the ebm command makes it: a tilted network, HMC of three leapfrogs, data in batches, an adapted step size."""
    potential = Architecture("mlp", (2,), width=16, depth=2).build(Noise(5)).double()
    data = Noise(6).normal((300, 2), dtype=F64) * torch.tensor([0.5, 1.2], dtype=F64) + 1
    adam = torch.optim.AdamW(potential.parameters(), lr=0.05, betas=(0.9, 0.99), weight_decay=0.01)
    x = Noise(7).normal((N, 2), dtype=F64)
    kernel = Moves("hmc", 0.4, 3).kernel()
    objective = ForwardKL(data, batch=N)
    loop = Single(potential, kernel, objective, adam, particles=x, noise=Noise(8), weighted=weighted)
    return training(loop, steps, AdaptStep())


def one_kernel(kernel):
    """A kernel in the single loop, weighted where it can be."""
    return training(single(kernel, weighted=kernel.weighted), 3)


def one_term(module, name):
    """A term of a contract's test class on shares of its law, uniform and weighted: F, F′, charges, and Γ."""
    contract = getattr(importlib.import_module(module), name)()
    found = {}
    for weighted in (False, True):
        term, potential = contract.make(), Banana()
        particles, density = contract.law(term, weighted)
        with processes.sharing():
            own = Particles(processes.share(particles.x), particles.log_weights, particles.log_z)
            points, values = own_points(term, density.points), density.energy_at_points
            if points is not None and len(points) < len(values):
                values = processes.share(values)
            variation = term.shared_variation(own, Density(processes.share(density.energy), points, values))
            terms = [(0.7, term)]
            fused = fused_pass(potential, [potential.theta], terms, own.x, [density.points], lambda here, own=own: own)
            processes.sum_gradients(fused.gradients)
            function, on_points = variation.function, variation.on_points
            found |= {
                f"value, {weighted}": variation.value,
                f"function, {weighted}": None if function is None else processes.gathered(function),
                f"on points, {weighted}": None if on_points is None else processes.total(on_points @ points.sin()),
                f"charges, {weighted}": processes.gathered(fused.charges),
                f"gamma, {weighted}": fused.gradients[0],
            }
    return found


def handed_over(first, state, then):
    """Steps from a state, or from the start; the state after them; and where further steps lead."""
    loop = build("weighted mala", n=N, lr=0.1)
    if state is not None:
        loop.load_state_dict(copy.deepcopy(state))  # processes that are sent it share its memory, as optimizers do
    for _ in range(first):
        loop.step()
    saved = copy.deepcopy(loop.state_dict())
    for _ in range(then):
        loop.step()
    return saved, {"end": loop.weighted_state, "theta": trained(loop)}


class Poisonable(Banana):
    """Turns NaN beyond a bound."""

    bound = math.inf

    def forward(self, x):
        return torch.where(x[:, 0] > self.bound, math.nan, super().forward(x))


def poisoned(where):
    """What a loop says where V, or the reward, turns NaN at one particle."""
    potential, bound = Poisonable(), [math.inf]
    x = potential.draw(N, torch.Generator().manual_seed(0))
    reward = Reward(lambda x: torch.where(x[:, 0] > bound[0], math.nan, wave(x)))
    sgd = torch.optim.SGD(potential.parameters(), lr=1e-9)
    loop = Single(potential, ULA(1e-9), reward, sgd, particles=x, noise=Noise(0))
    loop.step()
    bound[0] = x[:, 0].topk(2).values.mean().item()
    if where == "potential":
        potential.bound, bound[0] = bound[0], math.inf
    before = trained(loop)
    try:
        loop.step()
    except NonFiniteError as error:
        return str(error), torch.equal(trained(loop), before)
    return "not noticed", False


def eager(iterations):
    """A loop that several processes ask to compile: what it says, and its training."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loop = single(weighted=True, compiled=processes.world_size() > 1, iterations=iterations)
    return [str(warning.message) for warning in seen], repr(loop), training(loop, 12 // iterations)


def particles_from(rank):
    potential = Banana()
    x = potential.draw(N, torch.Generator().manual_seed(rank))
    sgd = torch.optim.SGD(potential.parameters(), lr=0.1)
    return Single(potential, ULA(0.1), Reward(wave), sgd, particles=x, noise=Noise(0))


def refused(number):
    """What is said of particles that cannot be shared equally, that differ, or that the main process asks for alone."""
    said = []
    loop = build("ula", n=N)
    for function in (
        lambda: build("ula", n=number),
        lambda: build("ula", n=N, seed=processes.rank()),
        lambda: particles_from(processes.rank()),
        lambda: processes.from_main(lambda: loop.particles),
        lambda: processes.from_main(lambda: loop.weighted_state),
    ):
        try:
            function()
        except InvalidInputError as error:
            said.append(str(error))
    return said


def read():
    """What is read of a loop between its steps, and how it goes on from other particles."""
    loop = build("weighted mala", n=N, lr=0.1)
    for _ in range(3):
        metrics = loop.step()
    particles = loop.particles
    found = {"n": loop.n, "x": particles.x, "weights": particles.weights, "ess": particles.ess, "repr": repr(loop)}
    found |= {"distance": distance(loop), "noise": signal_to_noise(loop, 2), "advice": len(advice(loop, metrics))}
    found |= {name: value.clone() for name, value in loop.weighted_state._asdict().items() if value is not None}
    chosen = systematic(particles.log_weights, torch.tensor(0.3, dtype=F64))
    loop.refresh(Particles(particles.x[chosen], log_z=torch.tensor(0.7, dtype=F64)), gradient_evaluations=5)
    for _ in range(2):
        metrics = loop.step()
    return found | {f"then {name}": float(value) for name, value in metrics.items()}


def traffic(name, steps=10):
    """Collective calls, and bytes that this process adds to them, of an iteration after the first."""
    loop = {"plain": single, "plain weighted": lambda: single(weighted=True)}[name]()
    loop.step()
    before = processes.traffic.calls, processes.traffic.bytes
    for _ in range(steps):
        loop.step()
    now = processes.traffic.calls, processes.traffic.bytes
    return (now[0] - before[0]) / steps, (now[1] - before[1]) / steps


def annealing(groups):
    """What annealed replicas find of a network, some of them resampled; and how many groups this process has."""
    potential = Architecture("mlp", (2,), width=16, depth=2).build(Noise(5)).double()
    potential.network[-1].weight.data = 6 * Noise(2).normal((1, 16), dtype=F64)
    found = annealed(potential.tempered, MALA(0.2), 2 * N, Noise(9), steps=5, groups=groups)
    acceptance, particles = found.step(potential), found.particles(potential)
    read = {"log z": particles.log_z, "mean and error": torch.tensor(found.log_z(potential)), "acceptance": acceptance}
    read |= {"x": particles.x, "weights": particles.weights}
    return read, repr(found), any(group.log_z != 0 for group in found.groups), len(found.groups)


def of_an_experiment(steps=5):
    """The loop of a design, whose pairs are moved and replaced."""
    experiment = linear_experiment()
    kernel = PosteriorKernel(MALA(0.2), experiment, 0.2)
    sgd = torch.optim.SGD(experiment.signal.parameters(), lr=0.1)
    loop = Single(experiment, kernel, InformationGain(experiment), sgd, particles=N, noise=Noise(3))
    result = training(loop, steps)
    return result | {"records": result["records"][1:]}  # at first z′ = z, and Γ is rounding
