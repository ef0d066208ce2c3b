"""How good a trained energy-based model is: log Z by annealing, held-out likelihood, and whether to believe them.

Likelihoods are compared with those of a Gaussian of the same mean and covariance, on the same held-out data. Of
dequantised data they are lower bounds of the log-probabilities of the discrete values (see `lattice`), in both.

Annealing errs low: where the weights have a heavy tail, the rare large ones are missing from estimate and error alike.
Less so with more steps, so an estimate at half the steps that is lower by more than the errors says that both are low.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.ebm.config import DEFAULTS
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.ebm.training import Trained
from implicit_diffusion.commands.shared.ranges import WORDS
from implicit_diffusion.loops.diagnostics import advice
from implicit_diffusion.models.energy_model import EnergyModel, Moves
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs import RunDirectory, clock, progress
from implicit_diffusion.runs.clock import part
from implicit_diffusion.samplers.followers import annealed
from implicit_diffusion.showing import with_error

FOLLOWERS = {"vectors": 1600, "images": 400}  # particles of the annealing
MOST_SEEN = 5000  # training data whose likelihood is taken
LARGEST_COVARIANCE = 2048  # coordinates
LEAST = 0.01  # deviations, that a Gaussian has at least
OVERFIT = 0.1  # nats per datum, that are not worth a word
JUDGE = 7  # a stream of noise beside those of data and training


def log_z_by_annealing(
    model: EnergyModel, noise: Noise, steps: int, description: str = "annealing"
) -> tuple[float, float]:
    """Log Z of a potential and its standard error over replicate runs, by annealed importance sampling."""
    moves, kind = model.moves, "images" if len(model.architecture.event_shape) == 3 else "vectors"
    if moves.sampler != "hmc":  # which cannot explode
        moves = Moves("hmc", DEFAULTS[kind]["step_size"])
    with progress(steps, description) as bar:
        path, kernel = model.potential.tempered, moves.kernel()
        followers = annealed(path, kernel, FOLLOWERS[kind], noise, steps=steps, progress=bar.advance)
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
    scores, seen = (known.log_density(x) + data.log_cell for x in (data.held_out, data.once[:MOST_SEEN]))
    simple = gaussian_scores(data) + data.log_cell
    for name, values, of_log_z in (
        ("nll_held_out", -scores, known.log_z_se or 0.0),
        ("nll_train", -seen, known.log_z_se or 0.0),
        ("nll_gaussian", -simple, 0.0),
        ("gain_over_gaussian", scores - simple, known.log_z_se or 0.0),
    ):
        summary |= {name: values.mean().item(), f"{name}_se": math.hypot(_error(values), of_log_z)}
    summary["overfit"] = summary["nll_held_out"] - summary["nll_train"]
    summary["overfit_se"] = math.hypot(_error(scores), _error(seen))  # log Z is the same in both
    if data.law is not None:
        best = -data.law.log_density(data.held_out)
        summary |= {"nll_law": best.mean().item(), "nll_law_se": _error(best)}
    if len(data.event_shape) == 3:
        nats = math.prod(data.event_shape) * math.log(2)
        summary |= {"bits_per_dimension": summary["nll_held_out"] / nats}
    return summary


def _error(values: Float[Tensor, " n"]) -> float:
    """Standard error of a mean."""
    return values.std().item() / math.sqrt(len(values))


def gaussian_scores(data: Data) -> Float[Tensor, " l"]:
    """Log-densities of the held-out data under the Gaussian of the training data's mean and covariance.

    The covariance is shrunk (Ledoit & Wolf 2004), so that it exists for fewer data than coordinates, and that of more
    than 2048 coordinates is diagonal; no deviation is below a hundredth of a coordinate's own.
    """
    from sklearn.covariance import LedoitWolf

    train, held_out = (((x - data.shift) / data.scale).flatten(1).double() for x in (data.once, data.held_out))
    z, d = held_out - train.mean(0), train.shape[1]
    if d <= LARGEST_COVARIANCE:
        covariance = torch.from_numpy(LedoitWolf().fit(train.numpy()).covariance_)
        root = torch.linalg.cholesky(covariance + LEAST**2 * torch.eye(d, dtype=covariance.dtype))
        z, deviations = torch.linalg.solve_triangular(root, z.mT, upper=False).mT, root.diagonal()
    else:
        deviations = (train.var(0) + LEAST**2).sqrt()
        z = z / deviations
    log_volume = deviations.log().sum() + data.scale.double().expand(data.event_shape).log().sum()
    return -z.square().sum(1) / 2 - d / 2 * math.log(2 * math.pi) - log_volume


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
    sentences = advice(loop, metrics, words=WORDS)
    if summary.get("gain_over_gaussian", 0.0) < -2 * summary.get("gain_over_gaussian_se", 0.0):
        sentences.insert(
            0,
            f"held-out data are less likely than under a Gaussian of the same mean and covariance, by "
            f"{with_error(-summary['gain_over_gaussian'], summary['gain_over_gaussian_se'])} nats each: the training "
            "failed, or was too short. Take more --steps, or a smaller --lr",
        )
    if summary.get("overfit", 0.0) > max(3 * summary.get("overfit_se", 0.0), OVERFIT):
        sentences.append(
            "data of the training are more likely than held-out ones, by "
            f"{with_error(summary['overfit'], summary['overfit_se'])} nats each: they are learned by heart in part. "
            "Take fewer --steps, a smaller --width, or add --weight-decay"
        )
    estimate, half = summary["log_z_estimate"], summary["log_z_half"]
    error = math.hypot(summary["log_z_estimate_se"], summary["log_z_half_se"])
    if "log_z" not in summary and half < estimate - 2 * error:
        sentences.append(
            f"log Z rises from {half:.4g} to {estimate:.4g} ± {error:.2g} when the annealing takes twice the steps: it "
            "is still too low, and the likelihoods too high. Take more --judge-steps"
        )
    return sentences


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
    print(
        f"held out  nll {summary['nll_held_out']:.4f} ± {summary['nll_held_out_se']:.4f} nats, of a Gaussian "
        f"{summary['nll_gaussian']:.4f} ± {summary['nll_gaussian_se']:.4f}"
    )
    for line in summary["advice"]:
        print(f"advice    {line}")
    work = f"{summary['updates']} updates, {summary['gradient_evaluations']} pulls through V at all particles"
    spent = clock.seconds(directory.path) or {"training": summary["seconds"]}
    print(f"cost      {clock.in_words(spent)}; {work}")
    print(f"run       {directory.path}")
