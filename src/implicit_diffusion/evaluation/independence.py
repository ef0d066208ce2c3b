r"""Draws from the tilted law by independence Metropolis–Hastings, with a chain as the proposal.

A state is a whole trajectory. A new one is drawn, independently of it, and replaces it with probability

    min(1, w′/w),        log w = R(x_N)/β − log dP_θ/dP_0     (`tilting`)

which leaves P* invariant, exactly (Tierney, *Markov chains for exploring posterior distributions*, 1994). The more
nearly constant w is, the more often: a trained chain is a good proposal, the pretrained one steers without training.
Of a trajectory only its end is kept, while it is the state, and the numbers that weigh it: memory does not grow with
the number of rows, and by a few numbers with that of proposals. All proposals, accepted or not, estimate averages over
P* by their weights (`tilting`), at no further cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

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
from implicit_diffusion.evaluation.chains import Evaluation, at_once, joined, mapped, travelled
from implicit_diffusion.evaluation.tilting import STARTS, Start, tilt_of
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives.reward import Reward, as_reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown

ACCEPTANCE = 2**32 - 3  # key of the numbers that decide, in place of a row's: no chain has as many rows


@dataclass(frozen=True, repr=False)
class Draws(Shown):
    """Draws from P*, each the last state of a Markov chain of its own.

    Args:
        x: the draws.
        reward: R of the state of every Markov chain after each of its steps; the last ones are those of the draws.
        condition: what each was sampled under; None without a condition.
        acceptance: the share of proposals that were accepted.
        proposals: all trajectories that were offered, (draws, steps), without their samples; for `tilted_law`.
    """

    x: Float[Tensor, "draws *event"]
    reward: Float[Tensor, "steps draws"]
    condition: dict[str, Tensor] | None
    acceptance: float
    proposals: Evaluation

    def _words(self) -> Iterable[str]:
        yield f"{len(self.x)} draws after {len(self.reward)} steps"
        yield f"reward={self.reward[-1].mean():.3g}"
        yield f"acceptance={self.acceptance:.2f}"
        yield f"autocorrelation_time={self.autocorrelation_time:.3g}"

    @property
    def autocorrelation_time(self) -> float:
        """τ = 1 + 2 Σ_t ρ_t of the reward: so many steps are worth one independent draw.

        ρ_t is averaged over the Markov chains, about the mean of each, and summed as long as pairs of neighbours are
        positive (Geyer, *Practical Markov chain Monte Carlo*, 1992).
        """
        r = self.reward.double() - self.reward.double().mean(0)
        steps, variance = len(r), r.square().mean()
        if not variance > 0:
            return float(steps)
        rho = [((r[: steps - t] * r[t:]).sum(0).mean() / steps / variance).item() for t in range(steps)]
        pairs = [rho[t] + rho[t + 1] for t in range(0, steps - 1, 2)]
        positive = next((i for i, pair in enumerate(pairs) if pair <= 0), len(pairs))
        return max(1.0, 2 * sum(pairs[:positive]) - 1)


@torch.no_grad()
def metropolis(
    chain: Chain,
    reward: Callable[..., Any] | Reward,
    beta: float,
    noise: Noise,
    *,
    draws: int,
    steps: int,
    start: Start = "given",
    chunk: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Draws:
    """So many draws from the tilted law, each after so many proposals.

    The first state is a trajectory of the chain itself. The bias that this leaves falls like (1 − 1/w_max)^steps.

    Args:
        chain: the proposal, trained or not; its reference is the pretrained network.
        reward: R, as in `evaluate`; a black box will do.
        beta: KL weight > 0.
        noise: of the draws.
        draws: Markov chains, each with an x_0 and a condition of its own.
        steps: trajectories that each of them is offered, the first state included.
        start: whether its x_0 is kept ("given"), or every proposal brings a new one ("tilted"). Conditions are kept.
        chunk: number of trajectories in one network call; by default 256 small ones, fewer if they are large.
        progress: called with the number of trajectories just completed.

    Raises:
        InvalidInputError: draws or steps below one; beta not positive, or so small that R/β overflows; a trained row
            without noise; rewards that are not one number per sample.
        NonFiniteError: rewards that are NaN or infinite.
    """
    beta = check_number("beta", beta, 0, note=": without a KL nothing is tilted")
    check_choice("start", start, STARTS)
    check_noise(chain)
    check_type("noise", noise, Noise, "use Noise(0), for example")
    check_call("progress", progress, "done")
    draws, steps, score = check_integer("draws", draws), check_integer("steps", steps), as_reward(reward)
    chunk = at_once(chain.event_shape) if chunk is None else check_integer("chunk", chunk)
    parts = [
        _chains(chain, score, beta, noise.stream(first), min(chunk, draws - first), steps, start, progress)
        for first in range(0, draws, chunk)
    ]
    conditions = [part.condition for part in parts if part.condition is not None]
    condition = {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]} if conditions else None
    acceptance = sum(part.acceptance * len(part.x) for part in parts) / draws
    x, states = torch.cat([part.x for part in parts]), torch.cat([part.reward for part in parts], 1)
    return Draws(x, states, condition, acceptance, joined([part.proposals for part in parts]))


def _chains(
    chain: Chain,
    score: Reward,
    beta: float,
    noise: Noise,
    count: int,
    steps: int,
    start: Start,
    progress: Callable[[int], None],
) -> Draws:
    """Markov chains that are computed together."""
    fixed, condition = with_condition(chain, noise, count)
    rewards: list[Tensor] = []
    proposals: list[Evaluation] = []
    accepted = torch.zeros((), dtype=torch.double)
    x = r = log_w = torch.empty(0)
    with fixed.evaluating(), score.evaluating():
        for step in range(steps):
            with GlobalGenerators(noise, step, device=chain.device):
                begun = fixed.initial(noise, count, step if start == "tilted" else 0)
                new, kl, log_ratio = travelled(fixed, begun, noise, step, repeats=1)
                end = fixed.endpoint(new.clone(), noise, step)  # a black box may write into it
                with nullcontext() if step else trying("reward", f"samples of shape {tuple(new.shape)}"):
                    if step == 0 and not score.checked:
                        score.probe(end)
                    offered, each = score.scored(end)
            none, made_of = new.new_zeros(count, 1, 0), None if each is None else each[:, None]
            proposals.append(Evaluation(offered[:, None], kl[:, None], log_ratio[:, None], none, made_of))
            offered = offered.double()
            log_offered = tilt_of(offered, beta) - log_ratio.double()
            if step == 0:
                x, r, log_w = new, offered, log_offered
            else:
                uniform = torch.rand(count, generator=noise.generator(step, ACCEPTANCE), dtype=torch.double)
                taken = uniform.log().to(log_w.device) < log_offered - log_w
                x = torch.where(taken.view(-1, *[1] * (x.ndim - 1)), new, x)
                r, log_w = torch.where(taken, offered, r), torch.where(taken, log_offered, log_w)
                accepted += taken.double().mean().cpu()
            rewards.append(r)
            progress(count)
    offers = mapped(lambda *columns: torch.cat(columns, 1), *proposals)
    return Draws(x, torch.stack(rewards), condition, accepted.item() / max(1, steps - 1), offers)


def check_noise(chain: Chain) -> None:
    """Raise `InvalidInputError` where a trained row has no noise: its trajectories have no weights."""
    check_type("chain", chain, Chain, "use Chain(denoiser, table, event_shape)")
    if chain.denoiser is not chain.reference:
        wanting = "the weights of trajectories need noise on every trained row, or there is no density"
        chain.table.check_noise(chain.trained_rows, wanting, "sample the pretrained chain, chain.pretrained()")


def with_condition(chain: Chain, noise: Noise, count: int) -> tuple[Chain, dict[str, Tensor] | None]:
    """The chain under `count` conditions that stay the same for every trajectory, and these."""
    drawn = chain.conditions(noise, count, [0])
    if drawn is None:
        return chain, None
    condition = {name: value[0] for name, value in drawn.items()}
    return chain.replace(condition=lambda noise, batch, index: condition), condition
