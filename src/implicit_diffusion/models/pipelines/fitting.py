"""From recorded rows to numbers: roles of arguments, output of answers, and the verification of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import NonAffineError
from implicit_diffusion.models.pipelines.arguments import FEW, bound, differing, filled, read_roles, time_in
from implicit_diffusion.models.pipelines.denoiser import as_event
from implicit_diffusion.models.pipelines.recording import Step, first_draws
from implicit_diffusion.tables.table import ChainTable

TOLERANCE = 1e-5  # relative, of single precision; of lower ones 4 units of rounding


def roles_of(steps: list[Step], wide: Step) -> list[dict[str, Any]]:
    """The roles of the arguments of every call of a row."""
    for row, step in enumerate((*steps, wide)):
        if len(step.calls) != len(steps[0].calls):
            raise NonAffineError(
                f"pipeline: row 0 calls the network {len(steps[0].calls)} times, row {row} {len(step.calls)} times; "
                "guidance must be the same on all rows"
            )
    states = [step.x for step in steps]
    return [read_roles([step.calls[i] for step in steps], call, states) for i, call in enumerate(wide.calls)]


def outputs_of(steps: list[Step]) -> tuple[Tensor, list[tuple[float, ...]]]:
    """(d_k, κ_k) of every row, and the weights c of the parts of every call."""
    fits = []
    for row, step in enumerate(steps):
        event = step.x.shape[1:]
        parts = [
            as_event(torch.stack(answers), event)
            for call in step.calls
            for answers in (call.answers[i : i + FEW] for i in range(0, len(call.answers), FEW))
        ]
        basis = torch.stack([term.double().flatten() for term in (step.x, *parts)], 1)
        if step.output.shape != step.x.shape:
            raise NonAffineError(
                f"pipeline: on row {row} its output has shape {tuple(step.output.shape)}, its state "
                f"{tuple(step.x.shape)}; a learned variance, say, which no table expresses"
            )
        wanted = step.output.double().flatten()
        fit = torch.linalg.lstsq(basis, wanted[:, None]).solution[:, 0]
        residual = (wanted - basis @ fit).abs().max() / (basis * fit).abs().max()
        if not residual <= _tolerance(step):
            raise NonAffineError(
                f"pipeline: on row {row} its output is not affine in the state and the network's answers: relative "
                f"residual {residual:.1e}. Guidance that rescales or normalises, thresholds and the like have no row "
                "in a table; switch them off"
            )
        fits.append(fit)
    fit = torch.stack(fits)
    fit = torch.where((fit - fit.round()).abs() <= _tolerance(steps[0]), fit.round(), fit)
    d, c = fit[:, :1], fit[:, 1:]
    scale = c.sum(1, keepdim=True)
    shares = c / scale
    apart = (shares - shares[0]).abs().amax(1)
    if not (apart <= 10 * _tolerance(steps[0]) * shares.abs().max()).all():
        row = int(apart.argmax())
        raise NonAffineError(
            f"pipeline: guidance weighs the network's answers by {c[0].tolist()} on row 0 and by {c[row].tolist()} on "
            f"row {row}; it must be the same on all rows"
        )
    weights, mean = [], shares[0].tolist()
    for call in steps[0].calls:
        count = len(call.answers) // FEW
        weights.append(tuple(mean[:count]))
        mean = mean[count:]
    return torch.cat([d, scale], 1), weights


def verify(table: ChainTable, steps: list[Step], roles: list[dict[str, Any]]) -> None:
    """Raise `NonAffineError` where a row or an argument of the pipeline is not that of the chain."""
    for row, step in enumerate(steps):
        a, b, s, m = (float(column[row]) for column in (table.a, table.b, table.s, table.m))
        terms = [a * step.x.double(), b * step.output.double(), s * step.xi.double()]
        residual = (step.y.double() - sum(terms)).abs().max() / max(term.abs().max() for term in terms)
        if not residual <= _tolerance(step):
            raise NonAffineError(
                f"pipeline: row {row} is not that of its scheduler's table: relative residual {residual:.1e}; the "
                "step draws noise that its generator does not control, or depends on the rows before it"
            )
        which = torch.arange(FEW)
        for i, (role, call) in enumerate(zip(roles, step.calls, strict=True)):
            x, t = (m * step.x), torch.full((FEW,), time_in(role, call.arguments) or 0.0, dtype=torch.float64)
            plan = bound(role, dict(steps[0].calls[i].arguments), FEW)
            ours = filled(plan, x, t, which, len(call.answers) // FEW)
            if (name := differing(role, ours, dict(call.arguments))) is not None:
                raise NonAffineError(
                    f"pipeline: on row {row} its network's argument {name} is not what the row's state, time and "
                    "condition make it"
                )


def initial_std_of(x: Tensor) -> float:
    """σ_0: the initial state must be σ_0 times the first numbers that the run drew, in any order."""
    ours, drawn = x.double().flatten().sort()[0], first_draws(x).double().sort()[0]
    std = float((ours * drawn).sum() / drawn.square().sum())
    tolerance = max(TOLERANCE, 4 * torch.finfo(x.dtype).eps)
    if not (std > 0 and (ours - std * drawn).abs().max() <= tolerance * std * drawn.abs().max()):
        raise NonAffineError(
            "pipeline: its initial state is not noise drawn from its generator, up to a factor; image-to-image and "
            "inpainting start elsewhere than the chain"
        )
    return round(std, 6) if abs(std - round(std, 6)) <= 1e-6 * std else std


def _tolerance(step: Step) -> float:
    dtypes = [step.x.dtype, step.output.dtype, *(answer.dtype for call in step.calls for answer in call.answers[:1])]
    return max(TOLERANCE, *(4 * torch.finfo(dtype).eps for dtype in dtypes))
