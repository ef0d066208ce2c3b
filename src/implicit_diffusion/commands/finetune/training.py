"""The training of a fine-tuning run: the loop, what watches it, and what stops it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.commands.finetune.problem.estimators import estimator_of
from implicit_diffusion.commands.finetune.problem.setup import DURING, ESTIMATOR, SHOWN, Setup
from implicit_diffusion.commands.finetune.specs import TrainingSpec
from implicit_diffusion.commands.shared.pictures import PICTURED, PLANE, displayed, image_pixels, plane_pixels
from implicit_diffusion.evaluation.chains import Evaluation
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.loops import Nested, Queue, Update
from implicit_diffusion.loops.chain_loop import ChainLoop
from implicit_diffusion.models.own_models.opened import OwnModel
from implicit_diffusion.objectives import DriftPenalty, Objective, PathKL, Reward, Sum
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.callbacks.held_out import HeldOut
from implicit_diffusion.runs.callbacks.judges import Judges
from implicit_diffusion.runs.callbacks.rise import Rise
from implicit_diffusion.runs.callbacks.targets import AdaptKL, StopAtKL
from implicit_diffusion.runs.callbacks.track import Pictures
from implicit_diffusion.runs.callbacks.watch import Runaway
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.fit import Callback, Fit, fit
from implicit_diffusion.runs.trackers.tracking import Pixels
from implicit_diffusion.samplers.chain import Chain

SHOWN_OF_COURSE = 6  # samples of the held-out noise that are stored at each look of the judges


@part("loading")
def make_loop(spec: TrainingSpec, setup: Setup, beta: float | None = None) -> ChainLoop:
    """The loop before the plan has decided β and the clip, which `scale` sets.

    Args:
        spec: of the training.
        setup: what is trained.
        beta: the KL weight, where it is known already.
    """
    penalty: Objective = PathKL() if spec.penalty == "path-kl" else DriftPenalty()
    objective = setup.reward + (1.0 if beta is None else beta) * penalty
    trained = [p for p in setup.pretrained.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=spec.lr)
    update = Update(
        optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, spec.updates),
        ema_decay=spec.ema,
        accumulate=spec.accumulate,
    )
    noise, chain = setup.spec.noise, setup.chain
    estimator = estimator_of(setup.estimator.name, chain, noise.stream(ESTIMATOR), spec.depth)
    given: dict[str, Any] = {"batch": spec.batch, "noise": noise, "estimator": estimator}
    if spec.loop == "nested":
        return Nested(chain, objective, update, **given)
    return Queue(chain, objective, update, **given, stride=spec.stride)


def scale(loop: ChainLoop, reward: Reward, beta: float, max_grad_norm: float) -> None:
    """Set what the plan decides: the units of several rewards, β, and the clip, as the norm of Γ is in those units."""
    terms = ((1.0, reward) if isinstance(term, Reward) else (beta, term) for _, term in loop.objective.terms)
    loop.objective = Sum(tuple(terms))
    loop.update.max_grad_norm = max_grad_norm


def weight_of_penalty(loop: ChainLoop, penalty: str) -> float:
    """The present weight β of the penalty, which may have been adapted."""
    return loop.objective.weight(DriftPenalty if penalty == "drift" else PathKL)


def held_out_checks(spec: TrainingSpec, setup: Setup) -> HeldOut:
    """Checks of reward and path KL on noise that training never sees, ten times in a run."""
    noise, every = setup.spec.noise.stream(DURING), max(1, spec.updates // 10)
    shown = SHOWN_OF_COURSE if spec.judged_by else 0
    untrained = setup.untrained
    return HeldOut(setup.measured, noise, every=every, starts=spec.held_out, shown=shown, untrained=untrained)


def judges_of(spec: TrainingSpec, setup: Setup, held_out: HeldOut) -> list[Judges]:
    """The callback that asks the judges, if there are any; it stores images, where samples are such."""
    decoder = setup.pretrained.decoder
    pictured = _pictured(setup)

    @torch.no_grad()
    def pixels(x: Tensor) -> Tensor:
        return ((displayed(x, decoder).float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    return [Judges(held_out, pixels if pictured else None)] if spec.judged_by else []


def callbacks(
    spec: TrainingSpec,
    loop: ChainLoop,
    held_out: HeldOut,
    samples: Evaluation,
    reward_std: float,
    judges: list[Judges],
) -> list[Callback]:
    """What looks at the run after every update.

    Args:
        spec: of the training.
        loop: that is trained; where its steps report no path KL, `Rise` alone watches it, on held-out noise.
        held_out: checks on held-out noise.
        samples: of the pretrained chain, that the plan is made of.
        reward_std: standard deviation of the pretrained reward.
        judges: from `judges_of`.
    """
    begins = held_out if held_out.untrained is not None else None
    runaway: list[Callback] = [] if loop.unreported else [Runaway(reward_std, held_out=begins)]
    checks: list[Callback] = [held_out, *judges]
    if spec.penalty == "drift":
        return [*checks, *runaway]

    def rate(factor: int) -> str:
        return f"--lr {spec.lr / factor:.1g}, {factor} times smaller"

    rise = Rise(held_out, pretrained=samples, rate=rate)
    if spec.target_kl is None:
        return [*checks, rise, *runaway]
    if spec.stop_at_target:
        return [*checks, StopAtKL(spec.target_kl, held_out=held_out), rise, *runaway]
    return [AdaptKL(spec.target_kl), *checks, rise, *runaway]


def _pictured(setup: Setup) -> bool:
    """Whether samples are images, or decoded to images or frames."""
    pretrained = setup.pretrained
    if isinstance(pretrained, OwnModel):
        return len(pretrained.image_shape) == 3
    return pretrained.decoder is not None or len(setup.chain.event_shape) == 3


def pictures(setup: Setup) -> list[Callback]:
    """Samples of the chain as it is, always from the same noise and under the same conditions.

    None where they are neither images nor points of the plane.
    """
    noise, pretrained = setup.spec.noise.stream(SHOWN), setup.pretrained
    points = isinstance(pretrained, OwnModel) and pretrained.image_shape == PLANE

    def sampled(chain: Chain) -> Tensor:
        with GlobalGenerators(noise, 0, device=chain.device):
            return displayed(chain.sample(noise, PICTURED), pretrained.decoder)

    @torch.no_grad()
    def draw(fit: Fit) -> Pixels:
        if _pictured(setup):
            return image_pixels(sampled(fit.chain), low=-1, high=1)
        before, now = (sampled(chain).cpu() for chain in (fit.chain.pretrained(), fit.chain))
        return plane_pixels(now, beside=before, words="pretrained", points_are="fine-tuned")

    return [Pictures(draw)] if points or _pictured(setup) else []


def train(
    spec: TrainingSpec,
    loop: ChainLoop,
    held_out: HeldOut,
    samples: Evaluation,
    reward_std: float,
    directory: RunDirectory,
    shown: list[Callback],
    judges: list[Judges],
) -> Fit:
    """Train until all updates are made, or a callback stops the run.

    Args:
        spec: of the training.
        loop: from `make_loop`, scaled.
        held_out: checks on held-out noise.
        samples: as in `callbacks`.
        reward_std: as in `callbacks`.
        directory: of the run.
        shown: what hands pictures to its trackers.
        judges: from `judges_of`.

    Raises:
        KeyboardInterrupt: the training was interrupted; its checkpoint is in the directory.
    """
    watching: list[Callback] = [*shown, *callbacks(spec, loop, held_out, samples, reward_std, judges)]
    state = fit(loop, spec.updates, callbacks=watching, directory=directory, keep=spec.keep)
    if state.stopped == "interrupted":
        raise KeyboardInterrupt
    if spec.best and state.kept is None:  # else what stopped the run has chosen another model, since this one is worse
        for each in judges:
            each.put_back_best(state)
    return state
