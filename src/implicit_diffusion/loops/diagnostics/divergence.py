"""Whether particles can still represent π_θ, from the loop alone: V, the particles, and the data where there are any.

For the law p of the particles, with mean weights and variances σ_j² of its d coordinates,

    KL(p‖π_θ) = E_p V + log Z − H(p),     H(p) ≤ ½ Σ_j log(2πe σ_j²)

since independent Gaussians have the largest entropy. And for points y ~ q, Ẑ = mean e^{−V(y)}/q(y) has the mean Z,
so that log Ẑ > log Z + t has probability e^{−t} at most (Markov). So

    E_p V + log Ẑ − ½ Σ_j log(2πe σ_j²)  −  t   ≤   KL(p‖π_θ)

with probability 1 − e^{−t}: the left-hand side cannot be large by chance, whatever q is. It is the same for V + const,
and in any units of x. (The particles' own noise, of E_p V and σ_j², is small beside the limit.) q is a mixture of
Gaussians around the particles' mean, from an eighth of their deviations to sixty-four of them: where a network is low
outside of the data, where no particle has come, log Ẑ says so. Contrastive divergence, whose particles start at data,
is blind to such places, and so are the energies of its particles. In many dimensions q hits few of them: the bound
holds, but detects less.

Where the objective is maximum likelihood alone, more signs are checked, which need no log Z: particles more than ten
times as far out as any datum, mean energies of data and particles that differ by more than ten of their deviations, a Γ
that is exactly zero, and a V that hardly depends on θ at the data. The last is what units that have died leave, whose
gradients are tiny but need not be zero (SiLU).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.design.experiment import Experiment
from implicit_diffusion.errors import check_type
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.loops.particle_loop import CHECK, ParticleLoop
from implicit_diffusion.objectives import ForwardKL
from implicit_diffusion.potentials.energy import COARSE, value_of

SCALES = tuple(2.0**k for k in range(-3, 7))  # of the particles' deviations
EACH = 64  # points of each scale
ENOUGH = 16  # effective particles, to know their variances
MOST_DATA = 1000  # at most, to compare with
DIFFERENTIATED = 16  # data at most, one by one

WORDS = {  # what messages call the things to change, from Python
    "weigh": "weighted=True",
    "rate": "learning rate",
    "particles": "particles",
    "step": "step size",
    "tune": "tune it with warm_up, or while training with AdaptStep",
    "decay": "weight decay",
}


def limit(loop: ParticleLoop) -> float:
    """Nats beyond which particles do not represent π_θ: ten, and one for every number of an event.

    They allow for a bias or a lag of √2 deviations in every coordinate, and masses of modes that are off by e^{10}.
    """
    return 10.0 + math.prod(loop.weighted_state.x.shape[1:])


@torch.no_grad()
def distance(loop: ParticleLoop) -> float:
    """A lower bound of KL(particles‖π_θ) in nats, up to chance: by t too large with probability e^{−t} at most.

    It is −∞ where nothing can be said, e.g. where fewer than 16 particles are effective. Its noise is the loop's, by
    iteration, and nothing changes there.

    Raises:
        InvalidInputError: a loop without a potential.
    """
    check_type("loop", loop, ParticleLoop, "loops over chains have no potential")
    if isinstance(loop.model, Experiment):  # its pairs are not draws from e^{−V}/Z
        return -math.inf
    particles = loop.particles
    x = particles.x.flatten(1).double()
    w = particles.weights.double()
    if not particles.ess >= ENOUGH:
        return -math.inf
    mean = w @ x
    deviation = (w @ (x - mean).square()).sqrt()
    if not (deviation > 0).all():
        return -math.inf
    generator = loop.noise.generator(CHECK, loop.iteration, device=x.device)
    xi = torch.randn((len(SCALES), EACH, x.shape[1]), generator=generator, device=x.device, dtype=x.dtype)
    scales = x.new_tensor(SCALES)
    radii = scales[:, None, None] * xi  # (y − mean)/deviation
    squares = radii.square().sum(2).flatten()
    log_q = torch.logsumexp(-squares[:, None] / (2 * scales**2) - x.shape[1] * scales.log(), 1) - math.log(len(SCALES))
    y = (mean + radii.flatten(0, 1) * deviation).view(-1, *particles.x.shape[1:]).to(particles.x)
    with eval_mode(loop.model):
        at_particles = particles.mean(value_of(loop.model, particles.x)).double()
        there = value_of(loop.model, y).double().nan_to_num(math.inf, posinf=math.inf, neginf=-math.inf)
    log_z = torch.logsumexp(-there - log_q, 0) - math.log(len(y))  # each less ½ Σ log 2πσ_j²
    return (at_particles + log_z - x.shape[1] / 2).item()


def data_of(loop: ParticleLoop) -> Tensor | None:
    """The data, a thousand at most, where maximum likelihood is the loop's only objective; None elsewhere."""
    terms = [term for weight, term in loop.objective.stationary if weight != 0]
    data = [term.data for term in terms if isinstance(term, ForwardKL)]
    return data[0][:MOST_DATA] if data and len(data) == len(terms) else None


def diverged(
    loop: ParticleLoop,
    metrics: Mapping[str, Any] = MappingProxyType({}),
    *,
    data: Float[Tensor, "m *event"] | None = None,
    nats: float | None = None,
    words: Mapping[str, str] = WORDS,
) -> str | None:
    """What has gone wrong, in plain words with what to change; None where nothing has.

    Args:
        loop: in its present state.
        metrics: of its last step, where there are any.
        data: to compare with; by default those of the objective, where it is maximum likelihood alone.
        nats: what `distance` returned, where it is known already.
        words: what to call the things to change, with the keys of `WORDS`.
    """
    data = data_of(loop) if data is None else data
    reason = None if data is None else _against(loop, data, words)
    if reason is None and data is not None:
        reason = _dead(loop, data, float(metrics.get("grad_norm", 1.0)), words)
    nats = distance(loop) if nats is None else nats
    if reason is None and nats > limit(loop):
        reason = (
            f"the particles are at least {nats:.3g} nats from the law of V (KL): V is low where none of them "
            f"are, or they have left the place where it is low. Use a smaller {words['rate']}, more sampler steps per "
            f"update, or {words['decay']}"
        )
    return reason


@torch.no_grad()
def _against(loop: ParticleLoop, data: Tensor, words: Mapping[str, str]) -> str | None:
    """Particles and their energies against data and theirs."""
    x = loop.weighted_state.x
    radius = data.flatten(1).norm(dim=1).amax()
    far = int((x.flatten(1).norm(dim=1) > 10 * radius).sum())
    if far > 0.01 * len(x):
        return (
            f"{far} of {len(x)} particles are more than ten times as far out as any datum: V is not bounded below, or "
            f"the sampler is unstable. Use a smaller {words['rate']} or {words['step']}, or add {words['decay']}"
        )
    with eval_mode(loop.model):
        at_data, at_particles = value_of(loop.model, data), value_of(loop.model, x)
    gap = at_data.mean() - loop.particles.mean(at_particles)
    usual = math.sqrt(math.prod(x.shape[1:]) / 2)  # deviation of −log p under p, of a Gaussian of that dimension
    spread = min(max(at_data.std().item(), usual), 10 * usual)  # of a sound model; that of a run-away one would hide it
    if not gap.abs() < 10 * spread:
        return (
            f"the mean energy of the data is {gap:.3g} from that of the particles, {gap.abs() / spread:.0f} times its "
            f"spread: particles are not where the model is. Use a smaller {words['rate']}, {words['weigh']}, or more "
            f"{words['particles']}"
        )
    return None


def _dead(loop: ParticleLoop, data: Tensor, grad_norm: float, words: Mapping[str, str]) -> str | None:
    """Whether V still depends on θ; by single data, since means of ∇_θ V vanish for a normalised model that fits."""
    advised = f"as where all units of a network have died. Start again with a smaller {words['rate']}"
    if grad_norm == 0:
        return f"Γ is exactly zero: V no longer depends on θ at particles and data, {advised}"
    theta = [p for p in loop.model.parameters() if p.requires_grad]
    with eval_mode(loop.model), torch.enable_grad():
        value = value_of(loop.model, data[:DIFFERENTIATED])
        slope = max(_norm(torch.autograd.grad(v, theta, retain_graph=True, allow_unused=True)) for v in value)
    radius = data.flatten(1).norm(dim=1).amax()
    size = max(_norm(theta), float(radius), float(1 / radius))  # of places or slopes, where θ begins at zero
    if slope * size < COARSE:
        return f"V hardly depends on θ at the data: it changes by {slope * size:.1g} nats if θ doubles, {advised}"
    return None


def _norm(parts: Iterable[Tensor | None]) -> float:
    """Of several tensors as one vector."""
    return math.hypot(*(part.detach().double().norm().item() for part in parts if part is not None))
