"""How good a trained energy-based model is: log Z by annealing, held-out likelihood, and whether to believe them.

Annealing errs low: where the weights have a heavy tail, the rare large ones are missing from estimate and error alike.
Less so with more steps, so an estimate at half the steps that is lower by more than the errors says that both are low.
"""

from __future__ import annotations

import math
from typing import Any

from implicit_diffusion.experiments.ebm_config import DEFAULTS
from implicit_diffusion.experiments.ebm_data import Data
from implicit_diffusion.experiments.ebm_training import Trained
from implicit_diffusion.experiments.energy_model import EnergyModel, Moves
from implicit_diffusion.experiments.ranges import WORDS
from implicit_diffusion.loops.diagnostics import advice
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs import RunDirectory, clock, progress
from implicit_diffusion.runs.clock import part
from implicit_diffusion.samplers.followers import annealed

FOLLOWERS = {"vectors": 1600, "images": 400}  # particles of the annealing
JUDGE = 7  # a stream of noise beside those of data and training


def log_z_by_annealing(
    model: EnergyModel, noise: Noise, steps: int, description: str = "annealing"
) -> tuple[float, float]:
    """Log Z of a potential and its standard error over replicate runs, by annealed importance sampling."""
    moves, kind = model.moves, "images" if len(model.architecture.event_shape) == 3 else "vectors"
    if moves.sampler != "hmc":  # which cannot explode
        moves = Moves("hmc", DEFAULTS[kind]["step_size"])
    with progress(steps, description) as bar:
        tick = lambda done: bar.update(advance=done)  # noqa: E731
        path, kernel = model.potential.tempered, moves.kernel()
        followers = annealed(path, kernel, FOLLOWERS[kind], noise, steps=steps, progress=tick)
    return followers.log_z(model.potential)


@part("judging")
def judge(trained: Trained, data: Data, steps: int) -> dict[str, Any]:
    """The headline numbers of a training, log Z by `steps` of annealing and, to compare with, by half of them."""
    _, held_out = data.standardised()
    model, loop = trained.model, trained.loop
    seed = trained.settings.seed
    estimate, error = log_z_by_annealing(model, Noise(seed).stream(JUDGE), steps)
    half = log_z_by_annealing(model, Noise(seed).stream(JUDGE, 1), steps // 2, "annealing, half as long")
    summary: dict[str, Any] = {
        "seconds": trained.fit.seconds,
        "updates": trained.fit.updates,
        **loop.cost(),
        "log_z_estimate": estimate,
        "log_z_estimate_se": error,
        "log_z_half": half[0],
        "log_z_half_se": half[1],
        "mmd2": MMD(held_out[:2000]).value(Particles(model.particles[:2000])).item(),
    }
    if loop.weighted:
        held = loop.particles
        assert held.log_z is not None
        summary |= {"log_z_particles": held.log_z.item(), "ess": held.ess.item()}
    known = model.with_log_z(estimate, error)
    if trained.curve:
        exact = {k: v for k, v in trained.curve[-1].items() if k in ("log_z", "nll", "kl", "mode_masses", "mode_error")}
        summary |= exact
        known = model.with_log_z(exact["log_z"], 0.0)
    scores = known.log_density(data.held_out)
    spread = math.hypot(scores.std().item() / math.sqrt(len(scores)), known.log_z_se or 0.0)
    return summary | {"nll_held_out": -scores.mean().item(), "nll_held_out_se": spread}


def what_to_change(trained: Trained, summary: dict[str, Any], *, chosen: bool) -> list[str]:
    """Sentences on what looks wrong, in terms of the options.

    Args:
        trained: with its loop.
        summary: from `judge`.
        chosen: whether the step size was; the default one is for a trained model, and short trainings accept all of it.
    """
    metrics, loop = dict(trained.fit.metrics), trained.loop
    if not chosen and float(metrics.get("acceptance", 0.0)) > 0.5:
        del metrics["acceptance"]
    if loop.weighted:
        metrics |= {"ess": summary["ess"]}
    found = advice(loop, metrics, words=WORDS)
    estimate, half = summary["log_z_estimate"], summary["log_z_half"]
    error = math.hypot(summary["log_z_estimate_se"], summary["log_z_half_se"])
    if "log_z" not in summary and half < estimate - 2 * error:
        found.append(
            f"log Z rises from {half:.4g} to {estimate:.4g} ± {error:.2g} when the annealing takes twice the steps: it "
            "is still too low, and the likelihoods too high. Take more --judge-steps"
        )
    return found


def show(summary: dict[str, Any], directory: RunDirectory) -> None:
    """Print the headline numbers."""
    if "kl" in summary:
        print(
            f"exact     KL(data‖model) {summary['kl']:.4f} nats, nll {summary['nll']:.4f}, log Z {summary['log_z']:.4f}"
        )
    if "mode_error" in summary:
        print(f"modes     total variation of their masses {summary['mode_error']:.3f}")
    half = f"{summary['log_z_half']:.4f} ± {summary['log_z_half_se']:.4f} at half the steps"
    print(f"annealing log Z {summary['log_z_estimate']:.4f} ± {summary['log_z_estimate_se']:.4f}, {half}")
    if "log_z_particles" in summary:
        print(
            f"training  log Z {summary['log_z_particles']:.4f} by its weights, {summary['ess']:.0f} of them effective"
        )
    print(f"held out  nll {summary['nll_held_out']:.4f} ± {summary['nll_held_out_se']:.4f} nats")
    for line in summary["advice"]:
        print(f"advice    {line}")
    work = f"{summary['updates']} updates, {summary['gradient_evaluations']} pulls through V at all particles"
    spent = clock.seconds(directory.path) or {"training": summary["seconds"]}
    print(f"cost      {clock.told(spent)}; {work}")
    print(f"run       {directory.path}")
