"""What loops must have in common to step together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from implicit_diffusion import processes
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients.fused import GIBBS
from implicit_diffusion.loops.baselines import NestedParticles, Unrolled
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.loops.single import Single
from implicit_diffusion.loops.vectorized.stack import ONE_BY_ONE
from implicit_diffusion.potentials.energy import value_of
from implicit_diffusion.potentials.stacked import StackedPotential

OWN = ("seed", "stream")  # what a run has for itself


def check_loops(loops: Sequence[ParticleLoop]) -> list[ParticleLoop]:
    """The loops, checked.

    Raises:
        InvalidInputError: as `Vectorized` says.
    """
    if not isinstance(loops, Sequence) or len(loops) < 2:
        raise InvalidInputError("loops must be a list of at least two, e.g. [loop(seed) for seed in range(10)]")
    first = loops[0]
    if type(first) not in (Single, NestedParticles, Unrolled) or any(type(loop) is not type(first) for loop in loops):
        kinds = ", ".join(sorted({type(loop).__name__ for loop in loops}))
        raise InvalidInputError(f"loops must all be Single, all NestedParticles or all Unrolled, got {kinds}")
    if processes.world_size() > 1:
        raise InvalidInputError(f"several runs at once are made by one process, not by several; {ONE_BY_ONE}")
    if len({id(loop.model) for loop in loops}) < len(loops):
        raise InvalidInputError("every loop needs a potential of its own, and some share theirs; build one for each")
    for loop in loops:
        if loop.solver is not GIBBS:
            raise InvalidInputError(
                f"{type(loop.solver).__name__} solves for the charges of one run; only potentials without interaction "
                f"can run together; {ONE_BY_ONE}"
            )
        update = loop.update
        if update.schedule is not None or update.ema is not None or update.accumulate > 1 or update.parametrized:
            raise InvalidInputError(
                "several runs at once take updates without schedule, average, accumulation and parametrizations; "
                f"{ONE_BY_ONE}"
            )
        if isinstance(loop, Single) and loop.min_ess is not None:
            raise InvalidInputError(f"min_ess shortens the step of one run by its own weights; {ONE_BY_ONE}")
        own = {id(p) for p in loop.model.parameters()}
        if any(id(p) not in own for p in update.parameters):
            raise InvalidInputError(f"the optimizer moves more than the potential's parameters; {ONE_BY_ONE}")
    for s, loop in enumerate(loops[1:], 1):
        for name, (one, other) in differences(first, loop).items():
            raise InvalidInputError(
                f"loops differ in {name}: {one} in the first, {other} in loop {s}; build them alike, of the same "
                f"objects where these are functions, or {ONE_BY_ONE}"
            )
    return list(loops)


def differences(one: ParticleLoop, other: ParticleLoop) -> dict[str, tuple[Any, Any]]:
    """What two loops do not have in common, by name."""
    ours, theirs = _alike(one), _alike(other)
    return {name: (ours[name], theirs.get(name)) for name in ours if ours[name] != theirs.get(name)}


def _alike(loop: ParticleLoop) -> dict[str, Any]:
    compiled, update = getattr(loop, "compiled", None), loop.update
    return {name: value for name, value in loop._like().items() if name not in OWN} | {
        "potential": type(loop.model).__name__,
        "its tensors": [(name, tuple(p.shape), p.dtype, p.device) for name, p in loop.model.state_dict().items()],
        "its trained parameters": trained_names(loop),
        "kernel": (type(loop.kernel).__name__, vars(loop.kernel)),
        "the weights of the objective": [weight for weight, _ in loop.objective.terms],
        "step_scale": loop.step_scale,
        "iteration": loop.iteration,
        "updates": update.updates,
        "gradient_evaluations": loop.gradient_evaluations,
        "max_grad_norm": update.max_grad_norm,
        "compiled": compiled is not None,
        "iterations": getattr(loop, "iterations", 1),
        "whether log Z is known": loop.log_z0 is not None,
        "dtype": loop._state.x.dtype,
    }


def trained_names(loop: ParticleLoop) -> list[str]:
    """Names of the parameters that the optimizer moves, in its order."""
    names = {id(p): name for name, p in loop.model.named_parameters()}
    return [names[id(p)] for p in loop.update.parameters]


@torch.no_grad()
def check_potentials(loops: Sequence[ParticleLoop], potential: StackedPotential) -> None:
    """Raise `InvalidInputError` where the stacked potential is not that of every loop, at its own particles."""
    x = torch.stack([loop._state.x for loop in loops])
    own = []
    for loop in loops:
        with loop.evaluating():
            own.append(value_of(loop.model, loop._state.x))
    name = type(potential.model).__name__
    try:
        with loops[0].evaluating():
            value = potential(x)
    except Exception as error:  # of any kind, from inside the user's module
        line = str(error).strip().splitlines()[0]
        raise InvalidInputError(f"{name} cannot be called for all runs at once ({line}); {ONE_BY_ONE}") from error
    expected = torch.stack(own)
    tolerance = 1e3 * torch.finfo(_dtype(potential.model, value)).eps
    if not torch.allclose(value, expected, rtol=tolerance, atol=tolerance * float(1 + expected.abs().amax())):
        raise InvalidInputError(
            f"the potentials of the loops differ in more than parameters and buffers: {name} of the first with the "
            f"numbers of another is not that one; build them alike, or {ONE_BY_ONE}"
        )


def _dtype(model: nn.Module, value: torch.Tensor) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), value.dtype)
