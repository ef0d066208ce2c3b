"""Weighted particles that follow a path of potentials without a say in where it goes.

Particles that decide on the gradient of θ raise V where they happen to be, and so under-estimate log Z: by O(1/n) per
update, more the slower they mix. Followers are exact along any path (see `walkers`): groups of them beside a loop are
replicate runs, whose mean of Z is unbiased and whose spread is its standard error. Along a path made for the purpose,
from a potential that is known to one that is not, they are annealed importance sampling (Neal, physics/9803008).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import (
    InvalidInputError,
    NonFiniteError,
    check_call,
    check_integer,
    check_number,
    check_type,
    trying,
)
from implicit_diffusion.frozen import eval_mode
from implicit_diffusion.noise import Noise
from implicit_diffusion.particles import Particles, states
from implicit_diffusion.potentials.energy import Energy, check_potential, coarse, energy_of, precision
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.kernel import Kernel, check_resolved, innermost
from implicit_diffusion.samplers.walkers import Walkers, close, log_mean_exp, resample
from implicit_diffusion.showing import Shown, of_tensor


class Followers(Shown):
    """Independent groups of weighted particles.

    Args:
        kernel: their step; one that knows increments of weights.
        potential: V_0.
        x: X_0 ~ e^{−V_0}/Z_0, with shape (n, *event); split into the groups.
        noise: source of every random number.
        groups: ≥ 2, of equal size.
        log_z: log Z_0; without it log Z is relative to that.

    Raises:
        InvalidInputError: a kernel without increments, or particles that do not make groups of at least two; from
            `check_potential`.
    """

    def __init__(
        self,
        kernel: Kernel,
        potential: nn.Module,
        x: Float[Tensor, "n *event"],
        noise: Noise,
        *,
        groups: int = 8,
        log_z: float = 0.0,
    ) -> None:
        check_type("kernel", kernel, Kernel, "take ULA(0.1), say")
        check_type("noise", noise, Noise, "take Noise(0), say")
        check_type("potential", potential, nn.Module, "it is a module from (n, *event) to (n,)")
        if not kernel.weighted:
            raise InvalidInputError(f"{type(kernel).__name__} has no increment of weights; take ULA, MALA or HMC")
        x = states(x)
        if check_integer("groups", groups, 0) < 2 or len(x) % groups or len(x) < 2 * groups:
            raise InvalidInputError(f"{len(x)} particles do not make {groups} groups of equal size ≥ 2")
        check_resolved(kernel, x, 0)
        self.kernel, self.noise, self.log_z0, self.steps = kernel, noise, check_number("log_z", log_z), 0
        self.evaluations = 0  # pulls through V at all the particles
        with eval_mode(potential):
            check_potential(potential, x)
            value = energy_of(potential, x).value
        if said := coarse(value, precision(potential, x)):
            warnings.warn(said, stacklevel=2)
        self.groups = [
            Walkers(part, None, torch.zeros_like(v), zero, part, exact(v), zero, zero)
            for part, v in zip(innermost(x).chunk(groups), value.chunk(groups))
            for zero in [x.new_zeros(())]
        ]

    def _words(self) -> Iterable[str]:
        walkers = self.groups[0]
        yield f"{len(self.groups)} groups of {len(walkers.x)} particles {of_tensor(walkers.x[0])}"
        yield repr(self.kernel)
        yield f"steps={self.steps}"

    def step(self, potential: nn.Module) -> Tensor | None:
        """Close the weights under `potential`, resample the groups that call for it, and move once.

        Returns:
            mean acceptance, where the kernel rejects.
        """
        x = torch.cat([walkers.x for walkers in self.groups])
        generator = self.noise.generator(self.steps, device=x.device)
        uniform = torch.rand(len(self.groups), generator=generator, device=x.device, dtype=x.dtype)
        draws = tuple(numbers[0] for numbers in self.kernel.draws(generator, 1, x))
        check_resolved(self.kernel, x, self.steps)
        h = x.new_tensor(self.kernel.step(self.steps))
        with eval_mode(potential):
            closed = [
                resample(close(self.kernel, walkers, here), here, u)
                for walkers, here, u in zip(self.groups, self._energies(potential, x), uniform)
            ]
            groups = [walkers for walkers, _ in closed]
            here = Energy(torch.cat([e.value for _, e in closed]), torch.cat([e.grad for _, e in closed]))
            x = innermost(torch.cat([walkers.x for walkers in groups]))
            move = self.kernel.move(x, None, here, lambda y: energy_of(potential, y), draws, h)
        parts = zip(groups, move.x.chunk(len(groups)), self.kernel.owe(x, here, move, h).chunk(len(groups)))
        self.groups = [
            walkers._replace(x=innermost(new), previous=walkers.x, debt=debt, h=h) for walkers, new, debt in parts
        ]
        self.steps += 1
        self.evaluations += self.kernel.evaluations
        return None if move.acceptance is None else move.acceptance.mean()

    def particles(self, potential: nn.Module) -> Particles:
        """All groups, with the weights and the log Z of `potential`: groups count by their own estimates of Z.

        Raises:
            NonFiniteError: weights that are NaN.
        """
        closed = self._closed(potential)
        log_z = torch.stack([walkers.log_z + log_mean_exp(walkers.log_weights) for walkers in closed])
        weights = torch.cat([walkers.log_weights + walkers.log_z for walkers in closed])
        return Particles(torch.cat([w.x for w in closed]), weights, self.log_z0 + exact(log_mean_exp(log_z)))

    def log_z(self, potential: nn.Module) -> tuple[float, float]:
        """Log Z of `potential` and its standard error: from the mean of Z over groups and their spread.

        Raises:
            NonFiniteError: weights that are NaN.
        """
        found = torch.stack([w.log_z + log_mean_exp(w.log_weights) for w in self._closed(potential)]).double()
        ratio = (found - found.amax()).exp()
        error = ratio.std() / ratio.mean() / math.sqrt(len(ratio))
        return self.log_z0 + (ratio.mean().log() + found.amax()).item(), error.item()

    def _closed(self, potential: nn.Module) -> list[Walkers]:
        x = torch.cat([walkers.x for walkers in self.groups])
        with eval_mode(potential):
            closed = [close(self.kernel, w, here) for w, here in zip(self.groups, self._energies(potential, x))]
        if any((~(walkers.log_weights < math.inf)).any() for walkers in closed):  # e^{−V} may be 0 somewhere, not ∞
            raise NonFiniteError(
                f"weights of followers are NaN after {self.steps} steps, or infinite; take a smaller step size, or "
                "check that the potential confines them"
            )
        return closed

    def _energies(self, potential: nn.Module, x: Tensor) -> list[Energy]:
        here, count = energy_of(potential, x), len(self.groups)
        return [Energy(value, grad) for value, grad in zip(here.value.chunk(count), here.grad.chunk(count))]


def annealed(
    path: Callable[[float], nn.Module], kernel: Kernel, n: int, noise: Noise, *, steps: int = 500, groups: int = 8
) -> Followers:
    """Annealed importance sampling: followers at path(1), begun at exact draws from path(0).

    Args:
        path: t ↦ V_t on [0, 1], e.g. `tilted.tempered`; V_0 has `sample` and `log_z`.
        kernel: the step at every t.
        n: particles in all groups.
        noise: of the run.
        steps: t = 0, 1/steps, …, 1.
        groups: independent replicates.

    Raises:
        InvalidInputError: a path that is no function, a beginning that cannot be sampled exactly; else as `Followers`.
    """
    check_type("noise", noise, Noise, "take Noise(0), say")
    check_integer("n", n, 2), check_integer("steps", steps)
    check_call("path", path, "t")
    with trying("path", "t = 0"):
        start: Any = path(0.0)
    if not hasattr(start, "sample") or not hasattr(start, "log_z"):
        raise InvalidInputError("path(0) must have sample(n, noise) and log_z, as a Gaussian mixture has")
    followers = Followers(
        kernel, start, start.sample(n, noise.stream(0)), noise.stream(1), groups=groups, log_z=start.log_z
    )
    end = path(1.0)
    with eval_mode(end):
        check_potential(end, torch.cat([walkers.x for walkers in followers.groups]))
    for k in range(1, steps + 1):
        followers.step(path(k / steps))
    return followers
