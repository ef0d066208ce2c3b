"""Gradients at a fixed θ, beside the exact one.

A loop at the learning rate zero hands out its Γ. For n of them, with A_j the exact gradient g (or, where g is a mean
over trajectories, the adjoint's gradient of other batches or of the same trajectories) and d_j = Γ_j − A_j,

    bias along g        mean_j ⟨d_j, ĝ⟩/‖g‖²
    squared bias        Σ_{i≠j} ⟨d_i, d_j⟩ / (n (n−1) ‖g‖²),    unbiased for ‖E Γ − g‖²/‖g‖²
    variance            Σ_j ‖Γ_j − mean Γ‖² / ((n−1) ‖g‖²)
    cosine              mean_j ⟨Γ_j, ĝ⟩/(‖Γ_j‖ ‖g‖)

ĝ is a mean over further batches of the adjoint, independent of all d_j, and ‖g‖² comes from it without the part that is
its noise. The adjoint on the same trajectories takes the noise out of the bias of every estimator that follows paths.

In a queue, the gradients of two updates share trajectories unless N updates lie between them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.compare.methods import make_loop
from implicit_diffusion.commands.compare.problems import Problem, network_of
from implicit_diffusion.commands.compare.summary import Quality
from implicit_diffusion.evaluation.chains import Estimate, mean_and_error
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.loops.memory import predict_memory
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown

AWAY, REFERENCE, SHARED = 1, 2, 3  # streams of noise
UPDATES_AWAY = 10  # by which θ has left the pretrained network, where the path KL has no gradient


@dataclass(frozen=True, repr=False)
class Exact(Shown):
    """The exact gradient at θ.

    Args:
        chain: at θ.
        paired: A_j, whose mean is g: g itself, or the adjoint on the noise that methods use.
        mean: ĝ.
        squared_norm: ‖g‖².
    """

    chain: Chain
    paired: Float[Tensor, "n parameters"]
    mean: Float[Tensor, " parameters"]
    squared_norm: float


def exact(problem: Problem, batch: int, count: int, noise: Noise) -> Exact:
    """θ, some updates of the adjoint away from the pretrained network, and the exact gradient there.

    Args:
        problem: one with a smooth reward.
        batch: samples per gradient.
        count: number of gradients that methods are measured by.
        noise: of the measurement.
    """
    chain = problem.chain()
    objective = problem.objective(problem.smooth)
    adam = torch.optim.Adam(network_of(chain).parameters(), lr=problem.rate)
    update = Update(adam, max_grad_norm=problem.deviation)
    for _ in Nested(chain, objective, update, batch=batch, noise=noise.stream(AWAY)).run(UPDATES_AWAY):
        pass
    known = problem.exact(chain)
    if known is not None:
        return Exact(chain, known.expand(count, -1), known, known.square().sum().item())
    shared, reference = (
        collect(Nested(chain, objective, still(chain), batch=batch, noise=noise.stream(key)), count)[0]
        for key in (SHARED, REFERENCE)
    )
    return Exact(chain, shared, reference.mean(0), squared_norm_of_mean(reference).mean().item())


def measure(problem: Problem, method: str, at: Exact, batch: int, depth: int, noise: Noise) -> Quality:
    """The quality of a method's gradients at θ; arguments as in `exact` and `make_loop`."""
    loop = make_loop(method, problem, at.chain, still(at.chain), batch=batch, depth=depth, noise=noise.stream(SHARED))
    gradients, seconds, evaluations = collect(loop, len(at.paired))
    memory = predict_memory(loop)
    off, norm = gradients - at.paired, math.sqrt(at.squared_norm)
    spread = (gradients - gradients.mean(0)).square().sum() / (len(gradients) - 1)
    lengths = gradients.norm(dim=1).clamp_min(1e-300)
    return Quality(
        problem=problem.name,
        method=method,
        bias=mean_and_error(off @ at.mean / at.squared_norm),
        squared_bias=squared_bias(off, at.squared_norm),
        variance=(spread / at.squared_norm).item(),
        cosine=mean_and_error(gradients @ at.mean / (lengths * norm)),
        seconds=seconds,
        predicted_memory_bytes=memory.states + memory.activations,
        evaluations=evaluations,
    )


def still(chain: Chain) -> Update:
    """An update that leaves θ where it is."""
    return Update(torch.optim.SGD(network_of(chain).parameters(), lr=0.0))


def collect(loop: ChainLoop, count: int) -> tuple[Float[Tensor, "count parameters"], float, float]:
    """Independent gradients of a loop that does not move θ, processor seconds for one, network evaluations for one."""
    every = loop.chain.num_steps if isinstance(loop, Queue) else 1
    gradients: list[Tensor] = []
    seconds: list[float] = []
    evaluations, full = 0, 0
    while len(gradients) < count:
        begin, spent, made = time.process_time(), loop.evaluations, loop.update.updates
        metrics = loop.step()
        if "grad_norm" not in metrics or metrics.get("phase") == "filling":
            continue
        updates = loop.update.updates - made
        seconds.append((time.process_time() - begin) / updates)
        evaluations += loop.evaluations - spent
        if full % every == 0:
            gradients.append(torch.cat([_filled(p) for p in loop.update.parameters]))
        full += updates
    return torch.stack(gradients), median(seconds), evaluations / full


def squared_norm_of_mean(values: Float[Tensor, "n parameters"]) -> Float[Tensor, " n"]:
    """⟨v_i, mean of the others⟩: each is an unbiased estimate of ‖E v‖², and their mean is the best of these."""
    total = values.sum(0)
    return (values @ total - values.square().sum(1)) / (len(values) - 1)


def squared_bias(off: Float[Tensor, "n parameters"], squared_norm: float) -> Estimate:
    """‖E d‖²/‖g‖² without bias, and its standard error.

    The statistic is a mean over pairs, h(d, d′) = ⟨d, d′⟩, whose variance has a part of the first order, zero where
    there is no bias, and one of the second, v = 2 Var h/(n (n − 1)). The jackknife estimates the first and 2 v, and
    where d̄ is near zero by chance it is far too small.
    """
    n, off = len(off), off.double() / math.sqrt(squared_norm)
    each = squared_norm_of_mean(off)
    jackknife = 4 * (n - 1) / n * (each - each.mean()).square().sum().item() / max(n - 2, 1) ** 2
    centred = off - off.mean(0)
    products = (centred @ centred.T).square()
    second = 2 * (products.sum() - products.trace()).item() / (n * (n - 1)) ** 2
    return Estimate(each.mean().item(), math.sqrt(max(jackknife - second, second)))


def _filled(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    return torch.zeros_like(parameter).flatten() if gradient is None else gradient.detach().flatten().clone()
