r"""Sequential Monte Carlo for the tilted law: particles are steered on their way, by resampling.

Weights at the end alone are wasteful: most trajectories turn out to be unlikely ones when all is paid for. With a
*look-ahead* ψ_k ≈ R(x̂_N(x_k))/β, a guess at the end from the state, weights follow from row to row,

    log w ← log w + ψ_{k+1} − ψ_k − [⟨Δ_k, ξ_k⟩/s_k + ‖Δ_k‖²/(2 s_k²)],        ψ_0 = 0,  ψ_N = R(x_N)/β,

and where fewer than half of the particles are effective they are resampled, systematically, and begin again with equal
weights. The ψ telescope, so that at x_N the particles are weighted for P* whatever the guess was; a good one keeps the
weights even. The product of the mean weights,

    Ẑ = Π (mean w before each resampling) · (mean w at x_N),        E Ẑ = E_{u_0} e^{R/β},

is unbiased for every number of particles (Del Moral, *Feynman–Kac Formulae*, 2004; Wu, Trippe, Naesseth, Blei and
Cunningham, *Practical and Asymptotically Exact Conditional Sampling in Diffusion Models*, arXiv 2306.17775).

For a denoiser that fits its data, the mean of x_N given x_k is affine in the state and the prediction,
x̂_N = A_k x_k + B_k u(x_k, t_k). The two numbers of a row are fitted by least squares to a few trajectories, so no
network is called for a look-ahead, but the reward is, once a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import (
    check_call,
    check_choice,
    check_integer,
    check_number,
    check_type,
    trying,
)
from implicit_diffusion.evaluation.chains import at_once
from implicit_diffusion.evaluation.independence import check_noise, with_condition
from implicit_diffusion.evaluation.tilting import STARTS, Start, TiltedLaw, tilt_of, weighted_law
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives.path import squared_norm
from implicit_diffusion.objectives.reward import Reward, as_reward
from implicit_diffusion.particles import Particles
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.samplers.weighted_state import exhausted, log_mean_exp, systematic
from implicit_diffusion.showing import Shown

RESAMPLING = 2**32 - 4  # key of the numbers that resample, in place of a row's
CHOOSING = 2**32 - 5  # key of those that choose a draw
FITTED = 64  # trajectories that a look-ahead is fitted to


@dataclass(frozen=True, repr=False)
class Steered(Shown):
    """Particles for P*, in populations.

    Args:
        x: x_N of every particle.
        law: the tilted law that they stand for; `law.weights` are theirs.
        reward: R of every particle.
        log_normaliser: log Ẑ of every population; Ẑ is unbiased, its logarithm is low.
        resampled: how often each population was resampled.
        condition: what each population was sampled under; None without a condition.
        evaluations: network calls × samples.
        rewards: those that R is made of (`objectives.WeightedRewards`); None where it is one reward.
    """

    x: Float[Tensor, "populations particles *event"]
    law: TiltedLaw
    reward: Float[Tensor, "populations particles"]
    log_normaliser: Float[Tensor, " populations"]
    resampled: list[int]
    condition: dict[str, Tensor] | None
    evaluations: int
    rewards: Float[Tensor, "populations particles rewards"] | None = None

    def _words(self) -> Iterable[str]:
        populations, particles = self.reward.shape
        yield f"{populations} populations × {particles}"
        yield repr(self.law)
        yield f"resampled={self.resampled[:3]}{'…' * (len(self.resampled) > 3)}"

    def draws(self, noise: Noise) -> Float[Tensor, "populations *event"]:
        """A particle of each population, chosen by its weight: a draw from P*, up to a bias of order 1/particles."""
        check_type("noise", noise, Noise, "use Noise(0), for example")
        n, m = self.reward.shape
        edges = self.law.weights.cumsum(1)
        uniform = torch.rand(n, 1, generator=noise.generator(CHOOSING), dtype=torch.double).to(edges.device)
        chosen = torch.searchsorted(edges, (1 - uniform) * edges[:, -1:]).clamp(
            max=m - 1
        )  # in (0, 1], see `systematic`
        return self.x[torch.arange(n, device=self.x.device), chosen[:, 0]]


@torch.no_grad()
def sequential_monte_carlo(
    chain: Chain,
    reward: Callable[..., Any] | Reward,
    beta: float,
    noise: Noise,
    *,
    particles: int,
    populations: int = 1,
    start: Start = "given",
    look_ahead: bool = True,
    chunk: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Steered:
    """Weighted samples of the tilted law, from particles that are resampled on their way.

    Args:
        chain: the proposal, trained or not; its reference is the pretrained network.
        reward: R, as in `evaluate`; a black box will do.
        beta: KL weight > 0.
        noise: of the particles.
        particles: of every population; their states are kept, activations for a chunk of them at a time.
        populations: each has a condition, and where x_0 is given an x_0, of its own.
        start: whether the particles of a population have the same x_0 ("given"), or each its own ("tilted").
        look_ahead: whether the reward is asked on the way, of predicted samples; otherwise at the end alone.
        chunk: number of particles in one call of the network, or of the reward; by default 256 small ones, fewer if
            they are large.
        progress: called after every row with the number of particles that have made it.

    Raises:
        InvalidInputError: fewer than two particles, no population; beta not positive, or so small that R/β overflows; a
            trained row without noise; rewards that are not one number per sample.
        NonFiniteError: rewards that are NaN or infinite.
    """
    beta = check_number("beta", beta, 0, note=": without a KL nothing is tilted")
    check_choice("start", start, STARTS)
    check_type("look_ahead", look_ahead, bool, "use True or False")
    check_noise(chain)
    check_type("noise", noise, Noise, "use Noise(0), for example")
    check_call("progress", progress, "done")
    n, m, score = check_integer("populations", populations), check_integer("particles", particles, 2), as_reward(reward)
    size = at_once(chain.event_shape) if chunk is None else check_integer("chunk", chunk)
    fixed, condition = with_condition(chain, noise, n)
    each = {name: value.repeat_interleave(m, 0) for name, value in (condition or {}).items()}
    with chain.evaluating(), score.evaluating(), GlobalGenerators(noise, 0, device=chain.device):
        fit = predicted_ends(chain, noise, size) if look_ahead else None
        x = chain.initial(noise, n * m) if start == "tilted" else chain.initial(noise, n).repeat_interleave(m, 0)

        def guess(x: Tensor) -> Float[Tensor, "populations particles"]:
            return tilt_of(_scored(score, x, each, size)[0].view(n, m), beta)

        log_w = torch.zeros(n, m, dtype=torch.double, device=x.device)
        psi, paid, carried = torch.zeros_like(log_w), torch.zeros_like(log_w), log_w[:, 0].clone()
        resampled, evaluations = [0] * n, 0
        for row in range(chain.num_steps):
            at = _predictions(fixed, x, row, each, size)
            evaluations += at.evaluations
            ahead = psi if fit is None or row == 0 else guess(fit.a[row] * x + fit.b[row] * at.u)
            log_w, psi = log_w + ahead - psi - paid, ahead
            uniform = torch.rand(n, generator=noise.generator(row, RESAMPLING), dtype=torch.double).to(x.device)
            chosen = torch.arange(n * m, device=x.device).view(n, m)
            for index in filter(lambda index: exhausted(log_w[index]), range(n)):
                chosen[index] = index * m + systematic(log_w[index], uniform[index])
                carried[index] += log_mean_exp(log_w[index])
                log_w[index], resampled[index] = 0.0, resampled[index] + 1
            x, shift, psi = (part[chosen.flatten()] for part in (at.mean, at.shift, psi.flatten()))
            ratio, xi = squared_norm(shift[None])[0] / 2, fixed.innovation(noise, n * m, [0], [row])
            if xi is not None:
                x, ratio = x + at.s * xi[0], ratio + (shift * xi[0]).flatten(1).sum(1)
            psi, paid = psi.view(n, m), ratio.double().view(n, m)
            progress(n * m)
        if not score.checked:
            score.probe(Particles(x, condition=each or None))
        ends, rewards = _scored(score, x, each, size)
    r = ends.view(n, m)
    log_w = log_w + tilt_of(r, beta) - psi - paid
    law = weighted_law(log_w, r, beta, torch.arange(n, device=x.device), carried)
    log_z = carried + torch.stack([*map(log_mean_exp, log_w)])
    rewards = None if rewards is None else rewards.unflatten(0, (n, m))
    return Steered(x.unflatten(0, (n, m)), law, r, log_z, resampled, condition, evaluations, rewards)


def _scored(
    score: Reward, x: Tensor, condition: dict[str, Tensor], chunk: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n rewards"] | None]:
    """R of many particles in double precision, and the rewards that it is made of, where there are several."""
    scores, each = [], []
    for first in range(0, len(x), chunk):
        part = {name: value[first : first + chunk] for name, value in condition.items()}
        given = Particles(x[first : first + chunk].clone(), condition=part or None)  # a black box may write into it
        with trying("reward", f"samples of shape {tuple(given.x.shape)}"):
            reward, rewards = score.scored(given)
        scores.append(reward.double())
        each += [] if rewards is None else [rewards]
    return torch.cat(scores), torch.cat(each) if each else None


class Predictions(NamedTuple):
    """A row's network call on many particles: the prediction, a x + b u, Δ/s, and s."""

    u: Float[Tensor, "n *event"]
    mean: Float[Tensor, "n *event"]
    shift: Float[Tensor, "n *event"]
    s: Float[Tensor, "..."]
    evaluations: int


def _predictions(chain: Chain, x: Tensor, row: int, condition: dict[str, Tensor], chunk: int) -> Predictions:
    compare = chain.denoiser is not chain.reference and row in chain.trained_rows
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    evaluations = 0
    for first in range(0, len(x), chunk):
        part = {name: value[None, first : first + chunk] for name, value in condition.items()}
        made = chain.transition(x[None, first : first + chunk], [row], reference=compare, condition=part or None)
        shift = torch.zeros_like(made.u) if made.u0 is None else made.shift
        columns.append((made.u[0], made.mean[0], shift[0]))
        evaluations += made.evaluations
    u, mean, shift = map(torch.cat, zip(*columns, strict=True))
    return Predictions(u, mean, shift, made.s[0], evaluations)


class PredictedEnds(NamedTuple):
    """x̂_N = a_k x_k + b_k u(x_k, t_k) for every row k."""

    a: Float[Tensor, " N"]
    b: Float[Tensor, " N"]


@torch.no_grad()
def predicted_ends(chain: Chain, noise: Noise, chunk: int = FITTED) -> PredictedEnds:
    """The coefficients of the predicted clean sample, by least squares on a few trajectories of the chain.

    Args:
        chain: the sampler.
        noise: of the trajectories, those of number 1.
        chunk: the largest number of trajectories in one network call.
    """
    rows = [*_walk(chain, noise, min(FITTED, chunk))]
    end = rows.pop()[0]
    fitted = []
    for x, u in rows:
        columns = torch.stack([x.flatten(), u.flatten()], 1)
        gram, moment = columns.mT @ columns, columns.mT @ end.flatten()
        fitted.append(torch.linalg.lstsq(gram, moment[:, None], driver="gelsd").solution[:, 0])  # where x = 0, A = 0
    a, b = torch.stack(fitted).to(chain.device, chain.dtype).unbind(1)
    return PredictedEnds(a, b)


def _walk(chain: Chain, noise: Noise, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x_k, u_k) of every row in double precision on the CPU, and x_N at the end."""
    x = chain.initial(noise, batch, 1)
    for transition, _, state in chain.walk(x, noise, 1):
        x = state[0]
        yield transition.x[0].double().cpu(), transition.u[0].double().cpu()
    yield x.double().cpu(), x.double().cpu()
