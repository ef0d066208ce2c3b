"""Every public function and constructor with one argument that is wrong: it works all the same, or says what is wrong.

A call may return something that can be used as the right one is, or raise an error of ours. A bare error from somewhere
inside says neither which argument it was nor what would work.
"""

import math
import random
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import implicit_diffusion as idf
from implicit_diffusion.errors import ImplicitDiffusionError
from implicit_diffusion.evaluation import captured, gain, memory_of_start, possible
from implicit_diffusion.evaluation.chains import mean_and_error
from implicit_diffusion.loops.memory import check_memory
from implicit_diffusion.objectives import Sum
from implicit_diffusion.potentials.energy import check_potential
from implicit_diffusion.samplers.simulation import simulate
from tests.helpers import tiny
from tests.helpers.potentials import Gaussian, NormalNormal
from tests.helpers.stops import limited

CALLS, SEED, SECONDS = 1200, 0, 20

X = torch.linspace(-1, 1, 48).view(24, 2) ** 3
NOISE = idf.Noise(0)
NORMAL = NormalNormal()


class Net(nn.Module):
    """u(x, t), small."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-0.5, 0.3]))

    def forward(self, x, t, **condition):
        return self.weight * x


def reward(x):
    return -(x - 1).square().flatten(1).sum(1)


def table():
    return idf.tables.ou_reverse_sde(3, 1.0)


def chain():
    return idf.Chain(Net(), table(), (2,))


def objective():
    return idf.Reward(reward) + 0.1 * idf.PathKL()


def interaction(x, y):
    return torch.cdist(x, y)


def coupling(particles, charges):
    return charges


def evaluation():
    return idf.evaluate(chain(), reward, NOISE, starts=4, repeats=2)


def repeated():
    return idf.evaluate(chain(), reward, NOISE, starts=4, repeats=4)


def steps(loop):
    loop.step(), loop.step(), next(loop.run(3), None)
    return loop


class Call(NamedTuple):
    """A function, its right arguments, and what is done with what it returns."""

    function: Callable[..., Any]
    arguments: dict[str, Callable[[], Any]]
    use: Callable[[Any], Any] = lambda result: result


def sgd(module):
    """An optimizer of a module, or of another where there is none."""
    own = list(module.parameters()) if isinstance(module, nn.Module) else []
    return torch.optim.SGD(own or Net().parameters(), lr=0.01)


def on_chain(kind, **more):
    """A loop over a chain: the optimizer has to fit the network, so both are made together."""

    def make(network, table, objective, optimizer, **rest):
        chain = idf.Chain(network, table, (2,))
        update = sgd(network) if isinstance(optimizer, str) else optimizer
        return kind(chain, objective, update, **rest)

    own = {"network": Net, "table": table, "objective": objective, "optimizer": lambda: "sgd"}
    return Call(make, own | {"batch": lambda: 4, "noise": lambda: NOISE} | more, steps)


def on_particles(kind, **more):
    def make(potential, optimizer, **rest):
        update = sgd(potential) if isinstance(optimizer, str) else optimizer
        return kind(potential=potential, update=update, **rest)

    own = {
        "potential": Gaussian,
        "optimizer": lambda: "sgd",
        "kernel": lambda: idf.ULA(0.1),
        "objective": lambda: idf.Reward(reward),
        "particles": lambda: X,
        "noise": lambda: NOISE,
    }
    return Call(make, own | more, steps)


def method(make, name, use=lambda result: result, **arguments):
    """A method of a fresh object."""
    return Call(lambda **given: getattr(make(), name)(**given), arguments, use)


def single(**more):
    net = Gaussian()
    return idf.Single(net, idf.ULA(0.1), idf.Reward(reward), sgd(net), particles=X, noise=NOISE, **more)


def queue():
    made = chain()
    return idf.Queue(made, objective(), sgd(made.denoiser), batch=4, noise=NOISE)


def kernel(kind, **more):
    def use(made):
        return [state.x for state, _ in simulate(made, Gaussian(), X, NOISE, 2)]

    return Call(kind, {"step_size": lambda: 0.1} | more, use)


def term(kind, arguments, name="term"):
    """A term of a stationary law, on the particles and under a loop."""

    def use(made):
        net = Gaussian()
        return steps(idf.Single(net, idf.ULA(0.1), made, sgd(net), particles=X, noise=NOISE))

    return Call(kind, arguments | {"name": lambda: name}, use)


def denoise(made):
    idf.Chain(made, table(), (2,)).sample(NOISE, 2)


def of_pixels():
    from diffusers import DDPMPipeline

    return DDPMPipeline(tiny.unet(**tiny.PLAIN), ddpm())


def ddpm():
    from diffusers import DDPMScheduler

    return DDPMScheduler(clip_sample=False)


def flow():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def column(value):
    return lambda: torch.full((3,), value, dtype=torch.float64)


def labelled(**condition):
    made = idf.denoisers.Drawn(**condition)
    made(NOISE, 2, 0)
    return made


def guided(made):
    idf.Chain(made, table(), (2,), condition=idf.denoisers.Drawn("which", torch.arange(3))).sample(NOISE, 2)


def line():
    return idf.design.GaussianExperiment(torch.nn.Linear(2, 1), idf.GaussianMixture(torch.zeros(1, 2)), 0.5)


LINE = line()
JUDGED = {"experiment": line, "noise": lambda: NOISE, "outcomes": lambda: 4, "contrasts": lambda: 3}


def designed(objective=None, kernel=None):
    """One step of a loop over the pairs of an experiment."""
    experiment = LINE if objective is None else objective.experiment
    pool = idf.design.Pool() if objective is None else objective.pool
    kernel = idf.design.PosteriorKernel(idf.ULA(0.1), experiment, 0.1, pool) if kernel is None else kernel
    objective = idf.design.InformationGain(experiment) if objective is None else objective
    optimizer = torch.optim.SGD(experiment.signal.parameters(), lr=0.0)
    idf.Single(experiment, kernel, objective, optimizer, particles=8, noise=NOISE).step()


WHICH = {"columns": torch.zeros(3, 2)}
TABLES = {
    "a": column(1.0),
    "b": column(0.1),
    "s": column(0.2),
    "m": column(1.0),
    "t": lambda: torch.arange(3),
    "h": column(0.1),
    "initial_std": lambda: 1.0,
    "name": lambda: "mine",
}
PREDICTION = {"mean": lambda: torch.zeros(2), "variance": lambda: 0.5, "prediction": lambda: "score"}
SCHEDULED = {"scheduler": ddpm, "sampler": lambda: "ddpm"}
TUNED = {"potential": Gaussian, "x": lambda: X, "noise": lambda: NOISE}
PLAIN = {"batch": lambda: 2, "index": lambda: 0, "noise": lambda: NOISE}
BOUND = {"evaluation": evaluation, "beta": lambda: 0.5, "conditional": lambda: True}
TILTED = {"chain": chain, "reward": lambda: reward, "beta": lambda: 0.5, "noise": lambda: NOISE}
TILTED |= {"start": lambda: "given", "chunk": lambda: 4}
BEFORE = {"before": evaluation, "after": evaluation, "beta": lambda: 0.5}

PUBLIC = {
    "HMC": kernel(idf.HMC, leapfrogs=lambda: 2),
    "MALA": kernel(idf.MALA),
    "ULA": kernel(idf.ULA),
    "Underdamped": kernel(idf.samplers.Underdamped, friction=lambda: 1.0),
    "power_law": Call(
        idf.samplers.power_law,
        {"scale": lambda: 0.1, "exponent": lambda: 0.3},
        lambda made: kernel(idf.ULA).use(idf.ULA(made)),
    ),
    "MMD": term(idf.MMD, {"data": lambda: X + 1, "kernel": lambda: None}),
    "Sinkhorn": term(idf.objectives.Sinkhorn, {"data": lambda: X + 1, "epsilon": lambda: 1.0}),
    "ForwardKL": term(idf.ForwardKL, {"data": lambda: X + 1, "batch": lambda: 4}),
    "ReverseKL": term(idf.ReverseKL, {"potential": Gaussian, "log_z": lambda: 0.0}),
    "ReverseKL.to_initial": term(idf.ReverseKL.to_initial, {"potential": Gaussian}),
    "Evidence": term(idf.objectives.Evidence, {}),
    "GaussianExperiment": Call(
        idf.design.GaussianExperiment,
        {
            "signal": lambda: torch.nn.Linear(2, 1),
            "prior": lambda: idf.GaussianMixture(torch.zeros(1, 2)),
            "std": lambda: 0.5,
        },
        lambda made: made(made.sample(3, NOISE)),
    ),
    "InformationGain": Call(
        idf.design.InformationGain, {"experiment": line, "name": lambda: "gain"}, lambda made: designed(objective=made)
    ),
    "Pool": Call(
        idf.design.Pool,
        {"outcomes": lambda: 2, "samples": lambda: 2},
        lambda made: made.weights(X.flatten()[: made.size]),
    ),
    "PooledInformationGain": Call(
        idf.design.PooledInformationGain,
        {"experiment": line, "pool": lambda: idf.design.Pool(2, 2), "name": lambda: "gain"},
        lambda made: designed(objective=made),
    ),
    "PosteriorKernel": Call(
        idf.design.PosteriorKernel,
        {
            "kernel": lambda: idf.MALA(0.1),
            "experiment": lambda: LINE,
            "renewal": lambda: 0.1,
            "pool": lambda: idf.design.Pool(1, 2),
        },
        lambda made: designed(kernel=made),
    ),
    "contrastive_bounds": Call(idf.design.contrastive_bounds, JUDGED),
    "information_gain": Call(idf.design.information_gain, JUDGED, lambda made: made.advice()),
    "lag": Call(idf.design.lag, {"experiment": line, "particles": lambda: idf.Particles(line().sample(4, NOISE))}),
    "Reward": term(idf.Reward, {"function": lambda: reward}),
    "WeightedRewards": term(
        idf.objectives.WeightedRewards,
        {"functions": lambda: {"a": reward, "b": reward}, "coefficients": lambda: (1.0, -0.5)},
    ),
    "Functional": term(idf.objectives.Functional, {"function": lambda: lambda x, w: (w @ x - 1).square().sum()}),
    "gaussian_kernel": Call(idf.objectives.gaussian_kernel, {"bandwidth": lambda: 1.0}, lambda made: made(X, X)),
    "Objective": Call(Sum, {"terms": lambda: ((1.0, idf.Reward(reward)),)}, repr),
    "Objective.with_weight": method(objective, "with_weight", repr, kind=lambda: idf.PathKL, weight=lambda: 0.3),
    "Objective.weight": method(objective, "weight", kind=lambda: idf.PathKL),
    "sum": Call(lambda other: idf.PathKL() + other, {"other": lambda: idf.Reward(reward)}, repr),
    "product": Call(lambda weight: weight * idf.PathKL(), {"weight": lambda: 0.5}, repr),
    "Adjoint": Call(
        lambda **given: idf.gradients.Adjoint()(**given),
        {"chain": chain, "objective": objective, "noise": lambda: NOISE, "batch": lambda: 2, "index": lambda: 0},
    ),
    "AdjointMatching": Call(
        lambda **given: idf.gradients.AdjointMatching()(**given),
        {"chain": chain, "objective": objective, "noise": lambda: NOISE, "batch": lambda: 2, "index": lambda: 0},
    ),
    "FullBackprop": Call(
        lambda **given: idf.gradients.FullBackprop()(**given),
        {"chain": chain, "objective": objective, "noise": lambda: NOISE, "batch": lambda: 2, "index": lambda: 0},
    ),
    "Queue": on_chain(idf.Queue, stride=lambda: 1, estimator=lambda: None),
    "Nested": on_chain(idf.Nested, estimator=lambda: None),
    "ScoreFunction": Call(
        idf.gradients.ScoreFunction,
        {"clip": lambda: 0.2},
        lambda made: made(chain(), objective(), NOISE, 2),
    ),
    "Surrogate": Call(
        idf.gradients.Surrogate,
        {
            "network": lambda: None,
            "clip": lambda: 0.2,
            "pairs": lambda: 8,
            "steps": lambda: 2,
            "learning_rate": lambda: 1e-3,
            "noise": lambda: NOISE,
        },
        lambda made: made(chain(), objective(), NOISE, 2),
    ),
    "Surrogate.learn": method(
        idf.gradients.Surrogate, "learn", x=lambda: X, rewards=lambda: X[:, 0], condition=lambda: None
    ),
    "TruncatedBackprop": Call(
        idf.gradients.TruncatedBackprop,
        {"depth": lambda: 2, "random": lambda: True},
        lambda made: made(chain(), objective(), NOISE, 2),
    ),
    "Single": on_particles(
        idf.Single,
        order=lambda: "paper",
        compiled=lambda: False,
        iterations=lambda: 1,
        weighted=lambda: False,
        lag=lambda: False,
        min_ess=lambda: None,
    ),
    "ScoreMatching": Call(
        lambda potential, update, **rest: idf.loops.ScoreMatching(
            potential, update=sgd(potential) if isinstance(update, str) else update, **rest
        ),
        {
            "potential": Gaussian,
            "update": lambda: "sgd",
            "data": lambda: X,
            "noise_std": lambda: 0.5,
            "noise": lambda: NOISE,
            "batch": lambda: 4,
        },
        steps,
    ),
    "NestedParticles": on_particles(idf.loops.NestedParticles, inner_steps=lambda: 2, begin=lambda: "initial"),
    "Unrolled": on_particles(idf.loops.Unrolled, unrolled_steps=lambda: 2),
    "Vectorized": Call(idf.loops.Vectorized, {"loops": lambda: [single() for _ in range(2)]}, lambda made: made.step()),
    "refresh": method(single, "refresh", particles=lambda: idf.Particles(X)),
    "load_state_dict": method(single, "load_state_dict", state=lambda: single().state_dict()),
    "load_state_dict of a queue": method(queue, "load_state_dict", state=lambda: queue().state_dict()),
    "run": method(queue, "run", lambda steps: next(steps, None), updates=lambda: 2),
    "Update": Call(
        lambda optimizer, **given: idf.Update(sgd(Net()) if isinstance(optimizer, str) else optimizer, **given),
        {
            "optimizer": lambda: "sgd",
            "schedule": lambda: None,
            "max_grad_norm": lambda: 1.0,
            "ema_decay": lambda: 0.9,
            "accumulate": lambda: 2,
        },
    ),
    "Update in a loop": on_particles(
        lambda update, max_grad_norm, ema_decay, accumulate, **rest: idf.Single(
            update=idf.Update(update, max_grad_norm=max_grad_norm, ema_decay=ema_decay, accumulate=accumulate), **rest
        ),
        max_grad_norm=lambda: 1.0,
        ema_decay=lambda: 0.9,
        accumulate=lambda: 1,
    ),
    "predict_memory": Call(idf.loops.predict_memory, {"loop": queue}, str),
    "check_memory": Call(
        check_memory,
        {"memory": lambda: idf.loops.predict_memory(queue()), "device": lambda: "cpu", "available": lambda: 10**9},
    ),
    "evaluate": Call(
        idf.evaluate,
        {
            "chain": chain,
            "reward": lambda: reward,
            "noise": lambda: NOISE,
            "starts": lambda: 4,
            "repeats": lambda: 2,
            "chunk": lambda: 4,
        },
        lambda made: made.objective(0.5),
    ),
    "Evaluation.objective": method(evaluation, "objective", beta=lambda: 0.5),
    "mean_and_error": Call(mean_and_error, {"values": lambda: torch.rand(4, 2)}),
    "bound": Call(idf.evaluation.bound, BOUND),
    "gain": Call(gain, {"pretrained": evaluation, "beta": lambda: 0.5, "conditional": lambda: True}),
    "captured": Call(captured, BEFORE),
    "captured from another start": Call(captured, BEFORE | {"untrained": BEFORE["before"]}),
    "captured_by_weights": Call(
        idf.evaluation.captured_by_weights, {"before": repeated, "after": repeated, "beta": lambda: 0.5}
    ),
    "reweighted": Call(idf.evaluation.reweighted, BEFORE),
    "weighed": Call(idf.evaluation.weighed, {"evaluation": evaluation, "reward": lambda: reward}, repr),
    "possible": Call(possible, BEFORE),
    "MeanField": Call(
        idf.potentials.MeanField,
        {
            "potential": lambda: idf.GaussianMixture(torch.eye(2)),
            "interaction": lambda: interaction,
            "temperature": lambda: 0.5,
        },
    ),
    "ConjugateGradients": Call(
        idf.gradients.ConjugateGradients,
        {"coupling": lambda: coupling, "tolerance": lambda: 1e-6, "steps": lambda: 9},
        lambda made: made(idf.objectives.FirstVariation(X[:, 0]), idf.Particles(X)),
    ),
    "tilted_law": Call(
        idf.evaluation.tilted_law,
        {"evaluation": evaluation, "beta": lambda: 0.5, "start": lambda: "tilted", "condition": lambda: None},
        lambda made: made.average(torch.ones_like(made.weights)),
    ),
    "metropolis": Call(
        idf.evaluation.metropolis,
        TILTED | {"draws": lambda: 4, "steps": lambda: 2},
        lambda made: made.autocorrelation_time,
    ),
    "sequential_monte_carlo": Call(
        idf.evaluation.sequential_monte_carlo,
        TILTED | {"particles": lambda: 4, "populations": lambda: 2, "look_ahead": lambda: True},
    ),
    "memory_of_start": Call(memory_of_start, {"values": lambda: torch.rand(4, 2)}),
    "advice": Call(
        idf.loops.advice,
        {"loop": single, "metrics": dict, "history": lambda: torch.rand(20, 4)},
    ),
    "signal_to_noise": Call(idf.loops.signal_to_noise, {"loop": single, "groups": lambda: 4}),
    "r_hat": Call(idf.loops.r_hat, {"values": lambda: torch.rand(20, 4)}),
    "ess_in_time": Call(idf.loops.ess_in_time, {"values": lambda: torch.rand(20, 4)}),
    "Noise": Call(idf.Noise, {"seed": lambda: 1, "prefix": lambda: (1, 2)}, lambda made: made.normal((2,), 1)),
    "Noise.normal": Call(
        lambda shape, key, device, dtype: NOISE.normal(shape, key, device=device, dtype=dtype),
        {"shape": lambda: (2, 3), "key": lambda: 1, "device": lambda: "cpu", "dtype": lambda: torch.float32},
    ),
    "Noise.stream": Call(lambda key: NOISE.stream(key), {"key": lambda: 1}, lambda made: made.normal((2,))),
    "Noise.generator": Call(
        lambda key, device: NOISE.generator(key, device=device), {"key": lambda: 1, "device": lambda: "cpu"}
    ),
    "Particles": Call(
        idf.Particles, {"x": lambda: X, "log_weights": lambda: torch.zeros(24)}, lambda made: (made.weights, made.ess)
    ),
    "Chain": Call(
        idf.Chain,
        {
            "denoiser": Net,
            "table": table,
            "event_shape": lambda: (2,),
            "reference": Net,
            "pretrained_rows": lambda: (0,),
            "condition": lambda: None,
        },
        lambda made: (made.sample(NOISE, 2), made.pretrained().trajectory(NOISE, 2)),
    ),
    "Chain under a condition": Call(
        lambda **given: idf.Chain(Net(), table(), (2,), **given),
        {"condition": lambda: idf.denoisers.Drawn("label", torch.arange(3))},
        lambda made: made.sample(NOISE, 2),
    ),
    "Chain.sample": method(chain, "sample", **PLAIN),
    "Chain.trajectory": method(chain, "trajectory", **PLAIN),
    "Chain.initial": method(chain, "initial", **PLAIN),
    "Chain.endpoint": method(chain, "endpoint", x=lambda: X, noise=lambda: NOISE, index=lambda: 0, repeats=lambda: 1),
    "Chain.replace": method(
        chain, "replace", lambda made: made.sample(NOISE, 2), denoiser=Net, pretrained_rows=lambda: (1,)
    ),
    "ChainTable": Call(idf.ChainTable, TABLES, lambda made: (made.unscaled(), made.noiseless(), made.to_dict())),
    "ChainTable.from_dict": Call(
        idf.ChainTable.from_dict, {"saved": lambda: table().to_dict()}, lambda made: made.unscaled()
    ),
    "ChainTable.agrees_with": method(table, "agrees_with", other=table, tolerance=lambda: 1e-3),
    "ChainTable.noiseless": method(table, "noiseless", tolerance=lambda: 1e-4),
    "ou_reverse_sde": Call(
        idf.tables.ou_reverse_sde, {"num_steps": lambda: 3, "horizon": lambda: 1.0, "prediction": lambda: "score"}
    ),
    "ou_probability_flow": Call(
        idf.tables.ou_probability_flow, {"num_steps": lambda: 3, "horizon": lambda: 1.0, "prediction": lambda: "score"}
    ),
    "GaussianDenoiser.ornstein_uhlenbeck": Call(idf.denoisers.GaussianDenoiser.ornstein_uhlenbeck, PREDICTION, denoise),
    "GaussianDenoiser.from_scheduler": Call(
        idf.denoisers.GaussianDenoiser.from_scheduler,
        PREDICTION | {"scheduler": ddpm, "prediction": lambda: "epsilon"},
        denoise,
    ),
    "GaussianDenoiser": Call(
        idf.denoisers.GaussianDenoiser,
        PREDICTION | {"marginal": lambda: lambda t: (torch.exp(-t), torch.exp(-t))},
        denoise,
    ),
    "read_table": Call(idf.read_table, {"scheduler": ddpm, "num_steps": lambda: 3, "mu": lambda: None}),
    "read_table with options": Call(
        lambda option: idf.read_table(idf.tables.scheduler_for(ddpm(), "ddim"), 3, eta=option), {"option": lambda: 1.0}
    ),
    "memoryless_flow": Call(
        idf.tables.memoryless_flow, {"scheduler": flow, "num_steps": lambda: 3, "mu": lambda: None}
    ),
    "default_sampler": Call(idf.tables.default_sampler, {"scheduler": ddpm}),
    "scheduler_for": Call(
        idf.tables.scheduler_for,
        SCHEDULED | {"clip": lambda: False, "spacing": lambda: "trailing"},
        lambda made: idf.read_table(made, 3),
    ),
    "table_for": Call(idf.tables.table_for, SCHEDULED | {"num_steps": lambda: 3, "eta": lambda: 1.0}),
    "Drawn": Call(labelled, {"name": lambda: "label", "values": lambda: torch.arange(3)}),
    "Embedded": Call(
        idf.denoisers.Embedded, {"denoiser": Net, "table": lambda: dict(WHICH), "name": lambda: "which"}, guided
    ),
    "ClassifierFree": Call(
        idf.denoisers.ClassifierFree, {"denoiser": Net, "scale": lambda: 2.0, "null": lambda: {"which": 0}}, guided
    ),
    "DiffusersDenoiser": Call(
        idf.denoisers.DiffusersDenoiser,
        {"model": lambda: tiny.unet(**tiny.PLAIN)},
        lambda made: idf.Chain(made, table(), (1, 8, 8)).sample(NOISE, 2),
    ),
    "add_lora": Call(
        idf.denoisers.add_lora,
        {
            "network": lambda: tiny.unet(**tiny.PLAIN),
            "rank": lambda: 2,
            "noise": lambda: NOISE,
            "targets": lambda: None,
            "alpha": lambda: 2.0,
        },
    ),
    "WithoutAdapter": Call(idf.denoisers.WithoutAdapter, {"denoiser": Net}, denoise),
    "merged": Call(
        idf.denoisers.merged, {"denoiser": lambda: idf.denoisers.DiffusersDenoiser(tiny.unet(**tiny.PLAIN))}
    ),
    "whole_copy": Call(idf.denoisers.whole_copy, {"denoiser": Net}, denoise),
    "checkpoint_activations": Call(idf.denoisers.checkpoint_activations, {"network": lambda: tiny.unet(**tiny.PLAIN)}),
    "DiffusionModel": Call(
        idf.DiffusionModel,
        {
            "denoiser": Net,
            "schedule": table,
            "event_shape": lambda: (2,),
            "decoder": lambda: lambda z: z[:, None],
            "num_classes": lambda: None,
        },
        lambda made: idf.Chain(made.denoiser, table(), made.event_shape).sample(NOISE, 2),
    ),
    "load_pretrained": Call(idf.load_pretrained, {"model": lambda: "digits"}),
    "load_pipeline": Call(idf.load_pipeline, {"model": lambda: "digits"}),
    "read_pipeline": Call(
        idf.read_pipeline,
        {
            "pipeline": of_pixels,
            "num_steps": lambda: 2,
            "prompts": lambda: None,
            "size": lambda: None,
            "sampler": lambda: "own",
        },
        lambda made: made.chain().sample(NOISE, 2),
    ),
    "save_pipeline": Call(
        lambda **given: idf.save_pipeline(**given),
        {
            "folder": lambda: "folder",
            "denoiser": lambda: idf.denoisers.DiffusersDenoiser(tiny.unet(**tiny.PLAIN)),
            "scheduler": ddpm,
            "card": lambda: "Mine.",
            "original": lambda: None,
        },
    ),
    "cut_prompts": Call(
        idf.models.cut_prompts,
        {"pipeline": dict, "prompts": lambda: ["a"], "max_sequence_length": lambda: None},
    ),
    "embed_prompts": Call(
        idf.models.embed_prompts,
        {
            "checkpoint": lambda: idf.load_pretrained("digits").checkpoint,
            "network": Net,
            "prompts": lambda: ["a"],
            "device": lambda: torch.device("cpu"),
        },
    ),
    "GaussianMixture": Call(
        idf.GaussianMixture,
        {"means": lambda: torch.eye(2), "logits": lambda: torch.zeros(2), "std": lambda: 1.0},
        lambda made: (made(X), made.sample(3, NOISE)),
    ),
    "GaussianMixture.sample": method(
        lambda: idf.GaussianMixture(torch.eye(2)), "sample", n=lambda: 3, noise=lambda: NOISE
    ),
    "Guided": Call(
        idf.potentials.Guided,
        {"potential": Gaussian, "reward": lambda: reward, "weight": lambda: 0.5},
        lambda made: check_potential(made, X),
    ),
    "Tilted": Call(
        idf.potentials.Tilted,
        {"network": lambda: idf.potentials.mlp(2, NOISE, width=4), "event_shape": lambda: (2,)},
        lambda made: (check_potential(made, X), made.sample(3, NOISE)),
    ),
    "Posterior": Call(
        idf.potentials.Posterior,
        {"model": NormalNormal, "data": lambda: X},
        lambda made: made(made.tempered(0.0).sample(3, NOISE)),
    ),
    "Posterior.tempered": method(
        lambda: idf.potentials.Posterior(NormalNormal(), X), "tempered", lambda made: made(X[:, :2]), t=lambda: 0.5
    ),
    "check_normalised": Call(
        idf.potentials.check_normalised,
        {"simulated": lambda: NORMAL.simulated, "model": lambda: NORMAL, "noise": lambda: NOISE, "n": lambda: 200},
    ),
    "Tilted.sample": method(
        lambda: idf.potentials.Tilted(idf.potentials.mlp(2, NOISE, width=4), (2,)),
        "sample",
        n=lambda: 3,
        noise=lambda: NOISE,
    ),
    "Tilted.tempered": method(
        lambda: idf.potentials.Tilted(idf.potentials.mlp(2, NOISE, width=4), (2,)),
        "tempered",
        lambda made: made(X),
        t=lambda: 0.5,
    ),
    "mlp": Call(
        idf.potentials.mlp,
        {"dimension": lambda: 2, "noise": lambda: NOISE, "width": lambda: 4, "depth": lambda: 2},
        lambda made: made(torch.zeros(3, made[0].in_features)),
    ),
    "conv": Call(
        idf.potentials.conv,
        {"event_shape": lambda: (1, 8, 8), "noise": lambda: NOISE, "width": lambda: 2},
        lambda made: made(torch.zeros(2, 1, 8, 8)),
    ),
    "warm_up": Call(
        idf.samplers.warm_up, {"kernel": lambda: idf.MALA(0.1)} | TUNED | {"steps": lambda: 20, "target": lambda: 0.5}
    ),
    "Replicas": Call(
        idf.samplers.Replicas,
        {"kernel": lambda: idf.ULA(0.1)} | TUNED | {"groups": lambda: 4, "log_z": lambda: 0.0},
        lambda made: (made.step(Gaussian()), made.log_z(Gaussian())),
    ),
    "annealed": Call(
        idf.samplers.annealed,
        {
            "path": lambda: lambda t: Gaussian(),
            "kernel": lambda: idf.ULA(0.1),
            "n": lambda: 16,
            "noise": lambda: NOISE,
            "steps": lambda: 3,
            "groups": lambda: 4,
        },
        lambda made: made.log_z(Gaussian()),
    ),
    "simulate": Call(simulate, {"kernel": lambda: idf.ULA(0.1)} | TUNED | {"steps": lambda: 3}, list),
    "check_potential": Call(check_potential, {"potential": Gaussian, "x": lambda: X}),
}

# Public names that are no calls of their own: errors, results, and terms without arguments.
NAMESPACES = [idf, *(value for name in idf.__all__ if isinstance(value := getattr(idf, name), ModuleType))]
NAMES = {name for space in NAMESPACES for name in space.__all__ if not isinstance(getattr(space, name), ModuleType)}
RESULTS = {
    *idf.errors.__all__,
    *("Bound", "ClippingEffect", "Estimate", "Evaluation", "Judgement", "Plan", "PlanRow", "Pretrained"),
    *("CutPrompt", "ProbedPipeline"),
    *("Draws", "Gain", "Pairs", "RewardJudgement", "RewardPlan", "Reweighted", "Steered", "TiltedLaw", "Untrained"),
    *("DriftPenalty", "EnergyModel", "Fit", "PathKL"),
}
CONTRACTS = {  # users fulfil them with classes of their own
    *(
        "Estimator",
        "Experiment",
        "GibbsObjective",
        "InnerProblem",
        "Kernel",
        "MetropolisKernel",
        "RowEstimator",
        "RunningCost",
        "TerminalObjective",
    ),
}
PARTS = {  # for those who write such a class, or look inside a loop
    *(
        "AdjointMeasure",
        "AdjointSolver",
        "Density",
        "Energy",
        "FirstVariation",
        "Footprint",
        "Fused",
        "Gibbs",
        "Info",
        "Pulled",
        "RowStates",
        "State",
        "Step",
        "Sum",
        "Term",
        "TrajectoryResult",
    ),
    *("bytes_of", "end_activations", "row_activations", "variation_activations"),
    *("NAMED_SAMPLERS", "Timetable", "Transition", "alpha", "energy_of", "fused_pass"),
    *("ou_marginal", "pull_back", "systematic", "terminal_adjoint", "statistics", "eval_mode", "frozen_copy"),
}
OF_RUNS = {  # with wrong arguments in the tests of runs, models and evaluation
    *("AdaptKL", "AdaptStep", "HeldOut", "Progress", "Rise", "RunDirectory", "Runaway", "Stop", "StopAtKL", "Stored"),
    *("Watch", "distance", "effect_of_clipping", "evaluate_pretrained", "fit", "gain_of_j", "graceful", "judge"),
    *("judge_rewards",),
    *("load_energy_model", "load_reward", "load_state", "make_plan", "most_kl", "Scorer"),
    *(
        "pipeline_for",
        "progress",
        "load_adapter",
        "save_adapter",
        "save_comfyui_adapter",
        "shard",
        "save_state",
        "sharpest",
        "tracked",
    ),
}


def raises(x, *more):
    raise KeyError("broken")


ANY = {
    "None": lambda: None,
    "word": lambda: "nonsense",
    "empty word": lambda: "",
    "bytes": lambda: b"x",
    "3": lambda: 3,
    "0": lambda: 0,
    "-1": lambda: -1,
    "0.5": lambda: 0.5,
    "1e300": lambda: 1e300,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "2**70": lambda: 2**70,
    "True": lambda: True,
    "1j": lambda: 1j,
    "[]": list,
    "[1, 2]": lambda: [1, 2],
    "['a']": lambda: ["a"],
    "{}": dict,
    "{'a': 1}": lambda: {"a": 1},
    "(-1, 0)": lambda: (-1, 0),
    "class": lambda: idf.ULA,
    "module": lambda: math,
    "object": object,
    "noise": lambda: idf.Noise(1),
    "array": lambda: np.ones((4, 2)),
    "numpy number": lambda: np.float64(0.5),
    "nn.Module()": nn.Module,
    "layer": lambda: nn.Linear(7, 5),
    "identity": nn.Identity,
    "f()": lambda: lambda: 0,
    "f → None": lambda: lambda *given, **named: None,
    "f → word": lambda: lambda *given, **named: "nonsense",
    "f → argument": lambda: lambda given, *more, **named: given,
    "f → number": lambda: lambda *given, **named: 1.0,
    "f raises": lambda: raises,
    "tensor": lambda: torch.ones(5, 7, 1),
    "tensor of one": lambda: torch.tensor(1.0),
    "empty tensor": lambda: torch.zeros(0, 2),
    "vector": lambda: torch.ones(4),
    "double": lambda: torch.ones(4, 2, dtype=torch.float64),
    "half": lambda: torch.ones(4, 2).half(),
    "integers": lambda: torch.ones(4, 2, dtype=torch.long),
    "complex": lambda: torch.ones(4, 2, dtype=torch.complex64),
    "meta": lambda: torch.ones(4, 2, device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "nan tensor": lambda: torch.full((4, 2), math.nan),
}
OF_TENSORS = {  # of the right argument itself
    "half of itself": lambda x: x.half(),
    "double of itself": lambda x: x.double() if x.dtype != torch.float64 else x.float(),
    "integers of itself": lambda x: x.long() if x.is_floating_point() else x.float(),
    "itself on meta": lambda x: x.to("meta"),
    "one more dimension": lambda x: x[None],
    "one less dimension": lambda x: x[0],
    "nothing of itself": lambda x: x[:0],
    "one of itself": lambda x: x[:1],
    "itself with NaN": lambda x: x * math.nan if x.is_floating_point() else -x,
    "itself with a gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x.bool(),
}


def cases():
    for name, call in PUBLIC.items():
        for argument, right in call.arguments.items():
            for kind, wrong in ANY.items():
                yield name, argument, kind, wrong
            value = right()
            if isinstance(value, torch.Tensor) and value.ndim:
                for kind, change in OF_TENSORS.items():
                    yield name, argument, kind, lambda change=change, value=value: change(value)


def outcome(name, argument, wrong):
    """None where the call works or is refused by us; else what came out of it."""
    call = PUBLIC[name]
    given = {key: (wrong if key == argument else right)() for key, right in call.arguments.items()}
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.use(call.function(**given))
    except ImplicitDiffusionError as error:
        return None if "\n" not in str(error) else f"{type(error).__name__} of several lines"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:120]}"
    return None


def test_the_table_holds_all_that_is_public():
    assert set(PUBLIC) & NAMES == NAMES - RESULTS - CONTRACTS - PARTS - OF_RUNS


@pytest.mark.parametrize("name", PUBLIC)
def test_the_right_arguments_are_right(name, as_users_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = PUBLIC[name]
    if name == "embed_prompts":  # digits have no prompts
        return
    call.use(call.function(**{key: right() for key, right in call.arguments.items()}))


@pytest.mark.slow
def test_wrong_arguments_are_refused_by_name(as_users_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = random.Random(SEED).sample(list(cases()), CALLS)
    results = {f"{name}({argument}={kind})": outcome(name, argument, wrong) for name, argument, kind, wrong in chosen}
    assert {call: error for call, error in results.items() if error} == {}
