"""How good a trained energy-based model is: log Z by annealing, held-out likelihood, and whether these can be trusted.

Likelihoods are compared with those of a Gaussian of the same mean and covariance, on the same held-out data. Of
dequantised data both are lower bounds of the log-probabilities of the discrete values (see `models.lattice`).

Annealing underestimates log Z: where the weights have a heavy tail, the rare large ones are missing from estimate and
error alike. The more steps, the less so: an estimate at half the steps that is lower by more than the errors says that
both are too low.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.commands.ebm.config import IMAGES, VECTORS
from implicit_diffusion.commands.ebm.data import Data
from implicit_diffusion.commands.ebm.summary import Summary
from implicit_diffusion.commands.ebm.training import Trained
from implicit_diffusion.commands.shared.ranges import WORDS
from implicit_diffusion.extras import require
from implicit_diffusion.loops.diagnostics import advice
from implicit_diffusion.models.energy_model import EnergyModel, Moves
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import MMD
from implicit_diffusion.particles import Particles
from implicit_diffusion.runs import clock, progress
from implicit_diffusion.runs.clock import part
from implicit_diffusion.samplers.replicas import annealed
from implicit_diffusion.showing import with_error

PARTICLES = {"vectors": 1600, "images": 400}  # of the annealing
MOST_SEEN = 5000  # training data whose likelihood is computed
LARGEST_COVARIANCE = 2048  # coordinates
LEAST = 0.01  # deviations, that a Gaussian has at least
OVERFIT = 0.1  # nats per datum, below which nothing is said
JUDGE = 7  # a stream of noise beside those of data and training


def log_z_by_annealing(
    model: EnergyModel, noise: Noise, steps: int, description: str = "annealing"
) -> tuple[float, float]:
    """Log Z of a potential and its standard error over replicate runs, by annealed importance sampling.

    Args:
        model: whose potential it is.
        noise: of the annealing.
        steps: of the annealing.
        description: for the progress line.
    """
    moves, of_images = model.moves, len(model.architecture.event_shape) == 3
    if moves.sampler != "hmc":  # which cannot explode
        moves = Moves("hmc", (IMAGES if of_images else VECTORS).step_size)
    n = PARTICLES["images" if of_images else "vectors"]
    with progress(steps, description) as bar:
        replicas = annealed(model.potential.tempered, moves.kernel(), n, noise, steps=steps, progress=bar.advance)
    return replicas.log_z(model.potential)


@part("judging")
def judge(trained: Trained, data: Data, steps: int) -> Summary:
    """The headline numbers of a training, still without advice.

    Args:
        trained: the training.
        data: that it was trained on.
        steps: of the annealing for log Z; half of them are the comparison.
    """
    _, held_out = data.standardised()
    model, loop = trained.model, trained.loop
    seed = trained.settings.seed
    log_z, log_z_se = log_z_by_annealing(model, Noise(seed).stream(JUDGE), steps)
    half, half_se = log_z_by_annealing(model, Noise(seed).stream(JUDGE, 1), steps // 2, "annealing, half as long")
    mmd2 = MMD(held_out[:2000]).value(Particles(model.particles[:2000])).item()
    particles = loop.particles if loop.weighted else None
    exact = trained.curve[-1] if trained.curve else None
    best, images = None if data.law is None else -data.law.log_density(data.held_out), len(data.event_shape) == 3

    known = model.with_log_z(log_z, log_z_se) if exact is None else model.with_log_z(exact.log_z, 0.0)
    scores, seen = (known.log_density(x) + data.log_cell for x in (data.held_out, data.once[:MOST_SEEN]))
    of_gaussian = gaussian_scores(data) + data.log_cell
    of_log_z = known.log_z_se or 0.0
    nll_held_out, nll_train = -scores.mean().item(), -seen.mean().item()
    return Summary(
        seconds=trained.fit.seconds,
        updates=trained.fit.updates,
        gradient_evaluations=loop.cost()["gradient_evaluations"],
        log_z_estimate=log_z,
        log_z_estimate_se=log_z_se,
        log_z_half=half,
        log_z_half_se=half_se,
        mmd2=mmd2,
        nll_held_out=nll_held_out,
        nll_held_out_se=math.hypot(_error(scores), of_log_z),
        nll_train=nll_train,
        nll_train_se=math.hypot(_error(seen), of_log_z),
        nll_gaussian=-of_gaussian.mean().item(),
        nll_gaussian_se=_error(of_gaussian),
        gain_over_gaussian=(scores - of_gaussian).mean().item(),
        gain_over_gaussian_se=math.hypot(_error(scores - of_gaussian), of_log_z),
        overfit=nll_held_out - nll_train,
        overfit_se=math.hypot(_error(scores), _error(seen)),  # log Z is the same in both
        advice=[],
        log_z_particles=None if particles is None or particles.log_z is None else particles.log_z.item(),
        ess=None if particles is None else particles.ess.item(),
        log_z=None if exact is None else exact.log_z,
        nll=None if exact is None else exact.nll,
        kl=None if exact is None else exact.kl,
        mode_masses=None if exact is None else exact.mode_masses,
        mode_error=None if exact is None else exact.mode_error,
        nll_law=None if best is None else best.mean().item(),
        nll_law_se=None if best is None else _error(best),
        bits_per_dimension=nll_held_out / (math.prod(data.event_shape) * math.log(2)) if images else None,
        start=trained.started,
    )


def _error(values: Float[Tensor, " n"]) -> float:
    """Standard error of a mean."""
    return values.std().item() / math.sqrt(len(values))


def gaussian_scores(data: Data) -> Float[Tensor, " l"]:
    """Log-densities of the held-out data under the Gaussian of the training data's mean and covariance.

    The covariance is shrunk (Ledoit & Wolf 2004), so that it exists for fewer data than coordinates, and that of more
    than 2048 coordinates is diagonal; no deviation is below a hundredth of a coordinate's own.
    """
    require("sklearn")
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


def what_to_change(trained: Trained, summary: Summary, *, step_size_given: bool) -> list[str]:
    """Sentences on what looks wrong, in terms of the options.

    Args:
        trained: with its loop.
        summary: from `judge`.
        step_size_given: whether the step size is not the default, which is made for a trained model, and of which a
            short training accepts every proposal.
    """
    metrics, loop = dict(trained.fit.metrics), trained.loop
    if not step_size_given and float(metrics.get("acceptance", 0.0)) > 0.5:
        del metrics["acceptance"]
    if summary.ess is not None:
        metrics["ess"] = summary.ess
    sentences = advice(loop, metrics, words=WORDS)
    if summary.gain_over_gaussian < -2 * summary.gain_over_gaussian_se:
        sentences.insert(
            0,
            f"held-out data are less likely than under a Gaussian of the same mean and covariance, by "
            f"{with_error(-summary.gain_over_gaussian, summary.gain_over_gaussian_se)} nats each: the training "
            "failed, or was too short. Use more --steps, or a smaller --lr",
        )
    if summary.overfit > max(3 * summary.overfit_se, OVERFIT):
        sentences.append(
            "data of the training are more likely than held-out ones, by "
            f"{with_error(summary.overfit, summary.overfit_se)} nats each: the model has partly memorised them. "
            "Use fewer --steps, a smaller --width, or add --weight-decay"
        )
    estimate, half = summary.log_z_estimate, summary.log_z_half
    error = math.hypot(summary.log_z_estimate_se, summary.log_z_half_se)
    if summary.log_z is None and half < estimate - 2 * error:
        sentences.append(
            f"log Z rises from {half:.4g} to {estimate:.4g} ± {error:.2g} when the annealing has twice the steps: it "
            "is still too low, and the likelihoods too high. Use more --judge-steps"
        )
    return sentences


def show(summary: Summary, folder: Path) -> None:
    """Print the headline numbers, and the folder of the run."""
    if summary.kl is not None:
        print(f"exact     KL(data‖model) {summary.kl:.4f} nats, nll {summary.nll:.4f}, log Z {summary.log_z:.4f}")
    if summary.mode_error is not None:
        print(f"modes     total variation of their masses {summary.mode_error:.3f}")
    half = f"{summary.log_z_half:.4f} ± {summary.log_z_half_se:.4f} at half the steps"
    print(f"annealing log Z {summary.log_z_estimate:.4f} ± {summary.log_z_estimate_se:.4f}, {half}")
    if summary.log_z_particles is not None:
        print(f"training  log Z {summary.log_z_particles:.4f} by its weights, {summary.ess:.0f} of them effective")
    if (start := summary.start) is not None:
        print(
            f"start     {start.updates} updates of score matching in {start.seconds:.0f} s; log Z {start.log_z:.4f} ± "
            f"{start.log_z_se:.4f} when particles took over, {start.ess:.0f} of them effective"
        )
    print(
        f"held out  nll {summary.nll_held_out:.4f} ± {summary.nll_held_out_se:.4f} nats, of a Gaussian "
        f"{summary.nll_gaussian:.4f} ± {summary.nll_gaussian_se:.4f}"
    )
    for line in summary.advice:
        print(f"advice    {line}")
    work = f"{summary.updates} updates, {summary.gradient_evaluations} pulls through V at all particles"
    spent = clock.seconds(folder) or {"training": summary.seconds}
    print(f"cost      {clock.in_words(spent)}; {work}")
    print(f"run       {folder}")
