"""Weighted particles that follow a path of potentials without influencing it.

Particles that decide on the gradient of θ raise V where they happen to be, and so underestimate log Z: by O(1/n) per
update, more the slower they mix. Replicas are exact along any path (see `weighted_state`): groups of them beside a loop
are independent runs, whose mean of Z is unbiased and whose spread is its standard error. Along a path made for the
purpose, from a potential that is known to one that is not, they are annealed importance sampling (Neal,
physics/9803008).

Where several processes make replicas together, each has the groups of its own, if their number can be divided equally,
and all read the same results; otherwise every process has all groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion import processes
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
from implicit_diffusion.particles import Particles, checked_particles
from implicit_diffusion.potentials.energy import Energy, check_potential, coarse, energy_of, precision
from implicit_diffusion.rounding import exact
from implicit_diffusion.samplers.draws import innermost, own_numbers
from implicit_diffusion.samplers.kernel import Kernel, State, Step
from implicit_diffusion.samplers.resolution import check_resolved
from implicit_diffusion.samplers.weighted_state import WeightedState, exact_draws, log_mean_exp, resample, reweighted
from implicit_diffusion.showing import Shown, of_tensor


class Replicas(Shown):
    """Independent groups of weighted particles that follow the same path of potentials.

    Args:
        kernel: their step; one that knows increments of weights.
        potential: V_0.
        x: X_0 ~ e^{−V_0}/Z_0, with shape (n, *event); split into the groups.
        noise: source of every random number.
        groups: ≥ 2, of equal size; a multiple of the number of processes, so that each has its share of the work.
        log_z: log Z_0; by default 0, so that log Z is relative to it.

    Attributes:
        groups: one `WeightedState` per group that this process has.
        steps: how many have been made.
        gradient_evaluations: how often these steps have evaluated ∇V at all the particles.

    Raises:
        InvalidInputError: a kernel without increments; particles that do not split into groups of at least two; a
            potential that `check_potential` refuses.
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
        check_type("kernel", kernel, Kernel, "use ULA(0.1), for example")
        check_type("noise", noise, Noise, "use Noise(0), for example")
        check_type("potential", potential, nn.Module, "it is a module from (n, *event) to (n,)")
        if not kernel.weighted:
            raise InvalidInputError(f"{type(kernel).__name__} has no increment of weights; use ULA, MALA or HMC")
        x = checked_particles(x)
        if check_integer("groups", groups, 0) < 2 or len(x) % groups or len(x) < 2 * groups:
            raise InvalidInputError(
                f"{len(x)} particles do not split into {groups} groups of equal size ≥ 2; use a divisor"
            )
        check_resolved(kernel, x, 0)
        self.kernel, self.noise, self.log_z0, self.steps = kernel, noise, check_number("log_z", log_z), 0
        self.gradient_evaluations = 0
        with eval_mode(potential):
            check_potential(potential, x)
            value = energy_of(potential, x).value
        if warning := coarse(value, precision(potential, x)):
            warnings.warn(warning, stacklevel=2)
        self._shared = groups % processes.world_size() == 0
        with processes.sharing() if self._shared else nullcontext():
            self._count, own = processes.count(), processes.share(torch.arange(groups)).tolist()
        parts = list(zip(innermost(x).chunk(groups), value.chunk(groups)))
        self.groups: list[WeightedState] = [exact_draws(State(parts[i][0]), parts[i][1]) for i in own]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Context in which processes that share the groups draw for all of them, and exchange what each has found."""
        with processes.sharing() if self._shared else nullcontext():
            if processes.count() != self._count:
                raise InvalidInputError(
                    "replicas are shared by several processes, and only one of them uses them; use them in all, before "
                    "what the main process does by itself"
                )
            yield

    def _words(self) -> Iterable[str]:
        first = self.groups[0]
        yield f"{len(self.groups) * self._count} groups of {len(first.x)} particles {of_tensor(first.x[0])}"
        yield repr(self.kernel)
        yield f"steps={self.steps}"

    @processes.alone()
    def step(self, potential: nn.Module) -> Tensor | None:
        """Update the weights to `potential`, resample the groups that need it, and move once.

        Returns:
            mean acceptance, where the kernel rejects.
        """
        x = self._positions()
        generator = self.noise.generator(self.steps, device=x.device)
        with self._together():
            number = len(self.groups) * processes.count()
            uniform = processes.share(torch.rand(number, generator=generator, device=x.device, dtype=x.dtype))
            draws = tuple(numbers[0] for numbers in own_numbers(self.kernel.draws, generator, 1, x))
            check_resolved(self.kernel, x, self.steps)
        h = x.new_tensor(self.kernel.step_size_at(self.steps))
        with eval_mode(potential):
            resampled = [
                resample(reweighted(self.kernel, group, here), here, u)
                for group, here, u in zip(self.groups, self._energies(potential, x), uniform)
            ]
            groups = [group for group, _ in resampled]
            here = Energy(torch.cat([e.value for _, e in resampled]), torch.cat([e.grad for _, e in resampled]))
            x = innermost(torch.cat([group.x for group in groups]))
            step = Step(x, None, here, lambda y: energy_of(potential, y), draws, h)
            state, info = self.kernel.move(step)
        parts = (part.chunk(len(groups)) for part in (state.x, self.kernel.forward_part(step, state)))
        self.groups = [
            group._replace(x=innermost(new), previous=group.x, forward_part=forward, h=h)
            for group, new, forward in zip(groups, *parts)
        ]
        self.steps += 1
        self.gradient_evaluations += self.kernel.evaluations_per_step
        with self._together():
            return None if info.acceptance is None else processes.mean(info.acceptance.mean())

    @processes.alone()
    def particles(self, potential: nn.Module) -> Particles:
        """All groups with the weights and the log Z of `potential`; each group counts by its own estimate of Z.

        Raises:
            NonFiniteError: weights that are NaN.
        """
        groups = self._under(potential)
        log_z = torch.stack([group.log_z + log_mean_exp(group.log_weights) for group in groups])
        weights = torch.cat([group.log_weights + group.log_z for group in groups])
        with self._together():
            x, weights, log_z = map(processes.gathered, (torch.cat([group.x for group in groups]), weights, log_z))
        return Particles(x, weights, self.log_z0 + exact(log_mean_exp(log_z)))

    @processes.alone()
    def log_z(self, potential: nn.Module) -> tuple[float, float]:
        """Log Z of `potential` and its standard error, from the mean of Z over the groups and its spread.

        Raises:
            NonFiniteError: weights that are NaN.
        """
        groups = self._under(potential)
        estimates = torch.stack([group.log_z + log_mean_exp(group.log_weights) for group in groups]).double()
        with self._together():
            estimates = processes.gathered(estimates)
        ratio = (estimates - estimates.amax()).exp()
        error = ratio.std() / ratio.mean() / math.sqrt(len(ratio))
        return self.log_z0 + (ratio.mean().log() + estimates.amax()).item(), error.item()

    def _under(self, potential: nn.Module) -> list[WeightedState]:
        """The groups with the weights of `potential`."""
        with eval_mode(potential):
            energies = self._energies(potential, self._positions())
            groups = [reweighted(self.kernel, group, here) for group, here in zip(self.groups, energies)]
        bad = ~(torch.cat([group.log_weights for group in groups]) < math.inf)  # e^{−V} may be 0 somewhere, not ∞
        with self._together():
            bad_everywhere = processes.total(bad.sum())
        if bad_everywhere > 0:
            raise NonFiniteError(
                f"weights of replicas are NaN or infinite after {self.steps} steps; use a smaller step size, or check "
                "that the potential confines them"
            )
        return groups

    def _positions(self) -> Tensor:
        return torch.cat([group.x for group in self.groups])

    def _energies(self, potential: nn.Module, x: Tensor) -> list[Energy]:
        """V and ∇V at x, by group."""
        here, count = energy_of(potential, x), len(self.groups)
        return [Energy(value, grad) for value, grad in zip(here.value.chunk(count), here.grad.chunk(count))]


def annealed(
    path: Callable[[float], nn.Module],
    kernel: Kernel,
    n: int,
    noise: Noise,
    *,
    steps: int = 500,
    groups: int = 8,
    progress: Callable[[int], None] = lambda made: None,
) -> Replicas:
    """Annealed importance sampling: replicas at path(1) that started as exact draws from path(0).

    Args:
        path: t ↦ V_t on [0, 1], e.g. `tilted.tempered`; V_0 has `sample` and `log_z`.
        kernel: the step at every t.
        n: particles in all groups together.
        noise: source of every random number.
        steps: of the kernel, at t = 1/steps, 2/steps, …, 1.
        groups: ≥ 2, of equal size: the independent runs.
        progress: called after every step with the number of steps just made, one.

    Raises:
        InvalidInputError: a path that is not a function, or whose start cannot be sampled exactly; else as `Replicas`.
    """
    check_type("noise", noise, Noise, "use Noise(0), for example")
    check_integer("n", n, 2), check_integer("steps", steps)
    check_call("path", path, "t")
    check_call("progress", progress, "made")
    with trying("path", "t = 0"):
        start: Any = path(0.0)
    if not hasattr(start, "sample") or not hasattr(start, "log_z"):
        raise InvalidInputError("path(0) must have sample(n, noise) and log_z, as a Gaussian mixture has")
    x, log_z = start.sample(n, noise.stream(0)), start.log_z
    replicas = Replicas(kernel, start, x, noise.stream(1), groups=groups, log_z=log_z)
    end = path(1.0)
    with eval_mode(end):
        check_potential(end, x)
    for k in range(1, steps + 1):
        replicas.step(path(k / steps))
        progress(1)
    return replicas
