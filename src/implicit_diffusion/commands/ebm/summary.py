"""The numbers of a training of an energy-based model: on its way, at its end, and of a comparison of several."""

from __future__ import annotations

from dataclasses import dataclass

from implicit_diffusion.evaluation.quadrature import ExactFit


@dataclass(frozen=True, kw_only=True)
class CurvePoint(ExactFit):
    """Exact figures on the way of a training.

    Args:
        updates: of θ so far.
        seconds: of the training so far.
        gradient_evaluations: pulls through V at all particles so far.
        log_z_particles: log Z by the weights of the particles, which have to be weighted.
        log_z_estimate, log_z_estimate_se: log Z by annealing and its standard error, at the end of some trainings.
    """

    updates: int
    seconds: float
    gradient_evaluations: int
    log_z_particles: float | None = None
    log_z_estimate: float | None = None
    log_z_estimate_se: float | None = None


@dataclass(frozen=True)
class Baseline:
    """The held-out likelihood of a simple model of images.

    Args:
        nll: −log-likelihood in nats per datum, and `nll_se`, its standard error.
        chosen: its one free number, chosen on a part of the training data.
        bits_per_dimension: `nll` over dimensions and log 2.
    """

    nll: float
    nll_se: float
    chosen: int | float
    bits_per_dimension: float


@dataclass(frozen=True)
class Started:
    """What a start by score matching was, and what its particles took over.

    Args:
        updates: of θ.
        seconds: of these, and of the annealing that drew the particles.
        gradient_evaluations: pulls through V at as many data as there are particles, two an update, and those of the
            annealing.
        score_matching: the loss in its last update.
        log_z, log_z_se: log Z of its result by that annealing, and its standard error.
        ess: effective number of the particles.
    """

    updates: int
    seconds: float
    gradient_evaluations: int
    score_matching: float
    log_z: float
    log_z_se: float
    ess: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The headline numbers of a training, in nats and per datum where nothing else is said; `…_se` are standard errors.

    Args:
        seconds, updates, gradient_evaluations: the work; pulls through V at all particles are what is counted. Seconds
            and pulls include those of a start, whose updates are its own.
        log_z_estimate, log_z_half: log Z by annealing, and by an annealing of half the steps.
        mmd2: MMD² of the particles to held-out data.
        nll_held_out, nll_train: −log-likelihood of data that the training did not see, and of data that it saw.
        nll_gaussian, gain_over_gaussian: the same of a Gaussian of mean and covariance, and what the model gains.
        overfit: nll_held_out − nll_train.
        advice: what looks wrong, and what to change.
        log_z_particles, ess: log Z by the weights of the particles, and their effective number; of weighted ones.
        log_z, nll, kl, mode_masses, mode_error: exact figures, where the law of the data is known.
        nll_law: −log-likelihood of held-out data under that law.
        bits_per_dimension: of images.
        auroc: of −log p between held-out digits and other images, by name.
        baselines: held-out likelihoods of simple models of the digits, by name.
        data_confidence: of the digits' classifier, on held-out data.
        chain_steps, chain_energy: of long chains, where the particles were looked at, and their mean energies there.
        chain_confidence: of the digits' classifier, there.
        start: the start by score matching, if there was one.
    """

    seconds: float
    updates: int
    gradient_evaluations: int
    log_z_estimate: float
    log_z_estimate_se: float
    log_z_half: float
    log_z_half_se: float
    mmd2: float
    nll_held_out: float
    nll_held_out_se: float
    nll_train: float
    nll_train_se: float
    nll_gaussian: float
    nll_gaussian_se: float
    gain_over_gaussian: float
    gain_over_gaussian_se: float
    overfit: float
    overfit_se: float
    advice: list[str]
    log_z_particles: float | None = None
    ess: float | None = None
    log_z: float | None = None
    nll: float | None = None
    kl: float | None = None
    mode_masses: list[float] | None = None
    mode_error: float | None = None
    nll_law: float | None = None
    nll_law_se: float | None = None
    bits_per_dimension: float | None = None
    auroc: dict[str, float] | None = None
    baselines: dict[str, Baseline] | None = None
    data_confidence: float | None = None
    chain_steps: list[int] | None = None
    chain_energy: list[float] | None = None
    chain_confidence: list[float] | None = None
    start: Started | None = None


@dataclass(frozen=True)
class ComparedTraining:
    """One training of a comparison, a line of metrics.jsonl.

    Args:
        arm, lr, seed: which one.
        updates: of θ.
        diverged: the message of the error that ended it; None where it came through.
        seconds, curve: of a training that came through, its time and its exact figures.
    """

    arm: str
    lr: float
    seed: int
    updates: int
    diverged: str | None
    seconds: float | None = None
    curve: list[CurvePoint] | None = None


@dataclass(frozen=True)
class ComparedArm:
    """One arm of a comparison: means over the seeds that came through.

    Args:
        lr: the best rate of the grid.
        diverged: number of seeds that did not come through.
        kl, kl_std, kls: exact KL(data‖model) in nats, its deviation over seeds, and that of every seed.
        nll: exact −E log π.
        seconds: of a training.
        gradient_evaluations: pulls through V at all particles.
        mode_error: total variation of the masses of modes.
        log_z_z_scores, log_z_errors: errors of log Z by annealing, over its standard error and as they are.
    """

    lr: float
    diverged: int
    kl: float | None
    kl_std: float | None
    kls: list[float] | None = None
    nll: float | None = None
    seconds: float | None = None
    gradient_evaluations: int | None = None
    mode_error: float | None = None
    log_z_z_scores: list[float] | None = None
    log_z_errors: list[float] | None = None


@dataclass(frozen=True)
class Paired:
    """Mean over seeds of log(our KL/their KL), and its standard error."""

    log_ratio: float
    se: float


@dataclass(frozen=True)
class Comparison:
    """All arms on one law.

    Args:
        data: its name.
        grid: exact KL by rate, for every arm; None for a rate that diverges.
        arms: by name.
        advice: what the grid does not cover.
        paired: weighted against every other arm; None where a seed is missing.
    """

    data: str
    grid: dict[str, dict[str, float | None]]
    arms: dict[str, ComparedArm]
    advice: list[str]
    paired: dict[str, Paired | None]
