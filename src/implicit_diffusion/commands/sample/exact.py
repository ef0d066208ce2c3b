"""Draw from the tilted law itself, P* ∝ e^{R/β} P_0 given x_0, by the weights of a chain's trajectories.

    metropolis   each image is the last state of a Markov chain whose proposals are trajectories
    smc          each image is one of a population of particles, chosen by its weight

For every image there are as many trajectories, from an x_0 and under a prompt or label of its own. All of them,
weighed, estimate the averages over P* that are written beside the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.finetune.finished import Tilt, TiltSpec, load_tilt
from implicit_diffusion.commands.sample.config import Config
from implicit_diffusion.commands.sample.grid import check_pictures, in_turn, parts_of, write_samples
from implicit_diffusion.commands.shared.formatting import number
from implicit_diffusion.commands.shared.summaries import to_json
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.evaluation import Estimate, TiltedLaw, metropolis, sequential_monte_carlo, tilted_law
from implicit_diffusion.evaluation.chains import at_once, evaluate, joined
from implicit_diffusion.evaluation.tilting import ENOUGH, weighted_law
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import WeightedRewards
from implicit_diffusion.runs import progress, records
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.scorers import closing

EXACT = 7  # stream of the noise, apart from those of `finetune`
PARTICLES = 64
STARTS, TRIED = 4, 64  # trajectories of each of a few starts, by which a hopeless β shows
LEAST = 2.0  # effective trajectories for an image: with fewer, one has all the weight
STATES = 2**22  # numbers in the states of the populations that are moved together


@dataclass(frozen=True)
class OfReward:
    """One of several rewards under the tilted law.

    Args:
        name: short, for people.
        reward: E* R_j, in its own units.
    """

    name: str
    reward: Estimate


@dataclass(frozen=True)
class Exact:
    """What is written beside the picture.

    Args:
        method: by which the images were drawn.
        particles: trajectories for each image.
        kl_weight: β.
        effective_share: (Σw)²/(M Σw²) of the M trajectories for an image, averaged over the images.
        trusted: whether that is enough; see `TiltedLaw`.
        acceptance: share of the proposals that were accepted; None without any.
        reward: E* R, of several rewards in deviations.
        path_kl: KL(P*‖P_0) given x_0, in nats.
        log_normaliser: E log E_{u_0}[e^{R/β}|x_0].
        rewards: each of several rewards; None where it is one.
    """

    method: str
    particles: int
    kl_weight: float
    effective_share: float
    trusted: bool
    acceptance: float | None
    reward: Estimate
    path_kl: Estimate
    log_normaliser: Estimate
    rewards: list[OfReward] | None = None


class Drawn(NamedTuple):
    """Draws from the tilted law.

    Args:
        law: by the weights of all trajectories.
        acceptance: share of the proposals that were accepted; None without any.
        rewards: those that R is made of, of every trajectory; None where it is one reward.
    """

    law: TiltedLaw
    acceptance: float | None
    rewards: Float[Tensor, "images particles rewards"] | None


Show = Callable[[Tensor], None]  # takes the next draws
Count = Callable[[int], None]  # takes a number of steps that are done


def sample_exactly(config: Config, steps: int) -> Path:
    """Write the grid and the numbers beside it; returns the path of the grid.

    Args:
        config: the options, checked.
        steps: N of a model that no run has fine-tuned, by default.

    Raises:
        InvalidInputError: from `load_tilt`; samples that are no pictures; a β at which nothing would be effective.
    """
    noise, particles = Noise(config.seed).stream(EXACT), config.particles or PARTICLES
    draw = _by_populations if config.method == "smc" else _by_metropolis
    with closing():
        spec = TiltSpec(
            config.model,
            config.reward,
            config.reward_python,
            config.prompts,
            config.kl_weight,
            config.num_steps,
            noise,
            config.device,
            config.trust_reward,
            config.trust_model,
            config.size,
            config.frames,
        )
        tilt = load_tilt(spec, steps)
        check_pictures(tilt.setup.pretrained, config.model, config.out)
        if config.method != "smc" and particles >= TRIED:
            _check_hope(tilt, particles, config, noise.stream(0))
        images: list[Any] = []
        with progress(config.num * particles * tilt.setup.chain.num_steps, "sampling") as bar:
            drawn = draw(
                tilt,
                config.num,
                particles,
                noise.stream(1),
                lambda x: images.extend(parts_of(tilt.setup.pretrained, x, config.out)),
                bar.advance,
            )
    exact = _summary(tilt, drawn, config.method or "metropolis", particles)
    write_samples(images, config.out)
    content = {name: None if value != value else value for name, value in to_json(exact).items()}  # NaN: of one image
    records.write(config.numbers, content)
    _say(exact, tilt, config)
    return config.out


def _by_metropolis(tilt: Tilt, num: int, particles: int, noise: Noise, show: Show, count: Count) -> Drawn:
    """Independence Metropolis–Hastings."""
    chain, parts, accepted = tilt.setup.chain, [], 0.0
    size = at_once(chain.event_shape)
    for first in range(0, num, size):
        draws = metropolis(
            _under(tilt, first),
            tilt.setup.reward,
            tilt.beta,
            noise.stream(first),
            draws=min(size, num - first),
            steps=particles,
            chunk=size,
            progress=lambda done: count(done * chain.num_steps),
        )
        show(draws.x)
        parts.append(draws.proposals)
        accepted += draws.acceptance * len(draws.x)
    proposals = joined(parts)
    return Drawn(tilted_law(proposals, tilt.beta), accepted / num, proposals.rewards)


def _by_populations(tilt: Tilt, num: int, particles: int, noise: Noise, show: Show, count: Count) -> Drawn:
    """Sequential Monte Carlo."""
    event = tilt.setup.chain.event_shape
    size = max(1, STATES // (particles * math.prod(event)))
    log_weights, reward, log_normaliser, rewards = [], [], [], []
    for first in range(0, num, size):
        made = sequential_monte_carlo(
            _under(tilt, first),
            tilt.setup.reward,
            tilt.beta,
            noise.stream(first),
            particles=particles,
            populations=min(size, num - first),
            progress=count,
        )
        show(made.draws(noise.stream(first)))
        log_weights.append(made.law.weights.log())
        reward.append(made.reward)
        log_normaliser.append(made.log_normaliser)
        rewards += [] if made.rewards is None else [made.rewards]
    population = torch.arange(num, device=reward[0].device)
    law = weighted_law(torch.cat(log_weights), torch.cat(reward), tilt.beta, population, torch.cat(log_normaliser))
    return Drawn(law, None, torch.cat(rewards) if rewards else None)


def _under(tilt: Tilt, first: int) -> Chain:
    """The chain under the prompts or labels of the images from number `first` on."""
    given = tilt.setup.conditioning
    if given.drawn is None:
        return tilt.setup.chain
    return tilt.setup.chain.replace(condition=lambda noise, batch, index: in_turn(given, range(first, first + batch)))


def _check_hope(tilt: Tilt, particles: int, config: Config, noise: Noise) -> None:
    """Refuse, by a few trajectories, a β at which a single one of those for an image would have all the weight."""
    chain = tilt.setup.chain
    few = min(TRIED, at_once(chain.event_shape))
    tried = evaluate(chain, tilt.setup.reward, noise, starts=STARTS, repeats=max(2, few))
    share = tilted_law(tried, tilt.beta).effective_share
    if share * particles < LEAST:
        raise InvalidInputError(
            f"--kl-weight {tilt.beta:g}: of {particles} trajectories for an image, hardly more than one would count "
            f"(effective share {share:.2g}), and the images would not have the law that was asked for; "
            f"{_advice(tilt, share, config)}"
        )


def _advice(tilt: Tilt, share: float, config: Config) -> str:
    """What to do about an effective share that is too small."""
    ways = [f"use --particles {math.ceil(ENOUGH / share)} or more", *["--method smc"] * (config.method != "smc")]
    if tilt.trained == tilt.beta:
        ways.append("a larger --kl-weight, or a model that was fine-tuned for longer")
    else:
        other = f"a --kl-weight nearer to the {tilt.trained:g} of the run" if tilt.trained else "a larger --kl-weight"
        ways.append(f"{other}, or a model that was fine-tuned with --kl-weight {tilt.beta:g}")
    return ", ".join(ways)


def _summary(tilt: Tilt, drawn: Drawn, method: str, particles: int) -> Exact:
    law, each = drawn.law, None
    if drawn.rewards is not None:
        assert isinstance(tilt.setup.reward, WeightedRewards)
        columns = zip(tilt.setup.reward.names, drawn.rewards.unbind(-1), strict=True)
        each = [OfReward(name, law.average(values)) for name, values in columns]
    return Exact(
        method=method,
        particles=particles,
        kl_weight=tilt.beta,
        effective_share=law.effective_share,
        trusted=law.trusted,
        acceptance=drawn.acceptance,
        reward=law.reward,
        path_kl=law.path_kl,
        log_normaliser=law.log_normaliser,
        rewards=each,
    )


def _say(exact: Exact, tilt: Tilt, config: Config) -> None:
    """Print what was drawn, where it is, and what to do where it is not to be trusted."""
    accepted = "" if exact.acceptance is None else f", accepted {exact.acceptance:.2f}"
    averages = f"reward {number(*exact.reward)}, path KL {number(*exact.path_kl)} nats"
    print(
        f"exact     KL weight {exact.kl_weight:g}: effective share {exact.effective_share:.2g}{accepted}, {averages}, "
        f"log normaliser {number(*exact.log_normaliser)}"
    )
    for each in exact.rewards or ():
        print(f"reward    {each.name} {number(*each.reward)}")
    if not exact.trusted:
        effective, enough = exact.effective_share * exact.particles, min(ENOUGH, exact.particles / 2)
        print(
            f"warning   not to be trusted: of {exact.particles} trajectories for an image about {effective:.1f} are "
            f"effective, and {enough:g} would do; {_advice(tilt, exact.effective_share, config)}"
        )
    print(config.numbers)
    print(config.out)
