"""Whether the particles follow π_θ, and whether Γ is more than noise: numbers, and advice in plain words.

- *divergence*: whether the particles can still represent π_θ, see `divergence`;
- *lag*: by how many deviations the mean of V (or of the charges) over the particles is off, according to the weights;
- *signal-to-noise* of Γ: its norm over its standard error, from groups of particles;
- *effective samples in time* and *R-hat* of a statistic recorded along the run (Vehtari et al., arXiv 1903.08008):
  whether chains that started apart have come together.

Diagnostics evaluate V, but nothing in a loop changes, its count of gradient evaluations included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_integer, check_tensor, check_type
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.gradients.fused import fused_pass
from implicit_diffusion.loops.diagnostics.divergence import WORDS, diverged
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.potentials.energy import coarse, energy_of, precision
from implicit_diffusion.potentials.inner_problem import field_at

LAG, NOISE, EFFECTIVE, MIXED, ACCEPTED = 0.2, 1.0, 0.1, 1.1, (0.15, 0.98)  # beyond these `advice` says something
SOLVED = 1e-2  # the residual of a solve for the charges: Γ is off by about this share


GROUPS = 8  # of particles, for the noise of Γ


def signal_to_noise(loop: ParticleLoop, groups: int = GROUPS) -> float:
    """‖E Γ‖ over the standard error of Γ, from `groups` groups of the present particles, without their weights.

    ‖mean‖² holds the squared error besides ‖E Γ‖², so it is subtracted; 0 where nothing is left, or Γ is zero. Below
    one, the step on θ is mostly noise. Every group has its own draw of data.

    Raises:
        InvalidInputError: a loop without particles; fewer than two particles per group.
    """
    check_type("loop", loop, ParticleLoop, "loops over chains have no particles")
    x = loop.weighted_state.x
    if len(x) < 2 * check_integer("groups", groups, 2):
        raise InvalidInputError(f"groups must be at most half of the {len(x)} particles, got {groups}")
    solver, terms, estimates = loop.solver, loop.objective.stationary, []
    begins_with = solver.state_dict()
    with loop.evaluating():
        for i, part in enumerate(x[: len(x) // groups * groups].chunk(groups)):
            points, field = loop._points(loop.iteration + i), field_at(loop.model, part)
            fused = fused_pass(field, loop.parameters, terms, part, points, solver=solver)
            estimates.append(torch.cat([g.flatten() for g in fused.gradients if g is not None]))
    solver.load_state_dict(begins_with)
    solver.take_info()
    stacked = torch.stack(estimates).double()
    squared_error = stacked.var(0).sum() / groups
    return (stacked.mean(0).square().sum() / squared_error - 1).nan_to_num(0.0, math.inf).clamp(min=0).sqrt().item()


def statistics(loop: ParticleLoop) -> dict[str, float]:
    """Mean ‖x‖ and mean V of the particles, without their weights."""
    x = loop.weighted_state.x
    with eval_mode(loop.model):
        energy = energy_of(loop.model, x).value
    return {"mean_norm": x.flatten(1).norm(dim=1).mean().item(), "mean_energy": energy.mean().item()}


def r_hat(values: Float[Tensor, "time chains"]) -> float:
    """Split R-hat of a statistic: the deviation over all chains against that within them; 1 where they agree.

    Raises:
        InvalidInputError: fewer than four times of at least one chain.
    """
    _check_record(values)
    halves = torch.cat(values.double()[: len(values) // 2 * 2].chunk(2), 1)
    within = halves.var(0).mean()
    return ((halves.mean(0).var() + within * (1 - 1 / len(halves))) / within).sqrt().item()


def ess_in_time(values: Float[Tensor, "time chains"]) -> float:
    """Effective number of independent draws in each chain's `time` values, by Geyer's initial positive sequence.

    Raises:
        InvalidInputError: fewer than four times of at least one chain.
    """
    _check_record(values)
    centred = values.double() - values.double().mean()
    time = len(centred)
    spectrum = torch.fft.rfft(centred, n=2 * time, dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, dim=0)[:time].mean(1) / time
    rho = covariance / covariance[0]
    pairs = rho[0 : 2 * (time // 2) : 2] + rho[1::2]
    negative = (pairs <= 0).nonzero()
    kept = pairs[: int(negative[0])] if len(negative) else pairs
    return time / max(1e-12, (2 * kept.sum() - 1).item())


def _check_record(values: Any) -> None:
    """Raise `InvalidInputError` for less than four times of at least one chain."""
    if len(check_tensor("values", values, "time chains")) < 4:
        raise InvalidInputError(f"values must hold at least 4 times, got shape {tuple(values.shape)}")


def advice(
    loop: ParticleLoop,
    metrics: dict[str, Any],
    history: Float[Tensor, "time chains"] | None = None,
    *,
    words: Mapping[str, str] = WORDS,
) -> list[str]:
    """What looks wrong, in plain words with what to change; empty where nothing does.

    Args:
        loop: in its present state.
        metrics: of its last step.
        history: a statistic of some particles along the run, for R-hat; resampling breaks chains, so weighted loops
            have none.
        words: what to call the things to change, with the keys of `WORDS`; a command line names its options.

    Raises:
        InvalidInputError: a loop without particles; metrics that are not a mapping.
    """
    check_type("loop", loop, ParticleLoop, "advice is for loops over particles")
    check_type("metrics", metrics, Mapping, "use what the last step returned")
    messages = []
    if divergence := diverged(loop, metrics, words=words):
        messages.append(divergence)
    with eval_mode(loop.model):
        value = energy_of(loop.model, loop.weighted_state.x).value
    rounding = coarse(value, precision(loop.model, loop.weighted_state.x))
    if rounding and loop.values_matter:
        messages.append(rounding)
    if float(metrics.get("negative_curvature", 0.0)):
        messages.append(
            "the particles are at no minimum of their inner problem: attraction outweighs noise (negative curvature), "
            "and Γ means nothing. It may pass while they settle; if it stays, use a higher temperature or a weaker "
            "interaction"
        )
    elif (residual := float(metrics.get("solve_residual", 0.0))) > SOLVED:
        messages.append(
            f"the solve for the charges did not converge (relative residual {residual:.1e}), and Γ is off by about "
            "that share. Use a solver with more steps"
        )
    if float(metrics.get("lag", 0.0)) > LAG:
        messages.append(
            f"the particles lag behind θ: weighted and plain means differ by {float(metrics['lag']):.2f} deviations. "
            f"Use {words['weigh']}, a smaller {words['rate']}, or more sampler steps per update"
        )
    if loop.weighted and float(metrics["ess"]) < EFFECTIVE * loop.n:
        messages.append(
            f"{float(metrics['ess']):.0f} of {loop.n} particles carry the weight: θ moves too far per step. Use a "
            f"smaller {words['rate']} or more {words['particles']}"
        )
    if "acceptance" in metrics and (acceptance := acceptance_advice(float(metrics["acceptance"]), words)):
        messages.append(acceptance)
    noise = signal_to_noise(loop) if loop.n >= 2 * GROUPS and not divergence else math.inf
    if math.isfinite(noise) and noise < NOISE:
        messages.append(
            f"Γ is mostly noise (signal-to-noise {noise:.2f}): θ may have arrived. If not, use more "
            f"{words['particles']} or a smaller {words['rate']}"
        )
    if history is not None and not loop.weighted and r_hat(history) > MIXED:
        messages.append(
            f"chains have not come together (R-hat {r_hat(history):.2f}): either the record is short, or particles "
            "stay in the modes where they began. If a longer run says the same, use "
            f"{words['weigh']} with X_0 from π_θ"
        )
    return messages


def acceptance_advice(acceptance: float, words: Mapping[str, str] = WORDS, *, low: bool = False) -> str | None:
    """Advice on a step size from the share of its proposals that are accepted; None where it fits.

    Args:
        acceptance: the share.
        words: what to call the things to change.
        low: only object to a share that is too low; one that is too high costs nothing but time.
    """
    if ACCEPTED[0] < acceptance and (low or acceptance < ACCEPTED[1]):
        return None
    change = "smaller" if acceptance < ACCEPTED[0] else "larger"
    return f"{acceptance:.0%} of the proposals are accepted: use a {change} {words['step']}, or {words['tune']}"
