"""What the loops over stationary samplers share: particles, their weights, and the noise that moves them.

Random numbers are drawn for a block of iterations at once, outside of what may be compiled; blocks, or short spans of
them, are addressed by number, so that a restored loop draws the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_integer, check_type, memory_for, trying
from implicit_diffusion.frozen import eval_mode, refuse_inference_mode
from implicit_diffusion.loops.base import Loop
from implicit_diffusion.loops.update import Update
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import GibbsObjective, Objective, ReverseKL
from implicit_diffusion.particles import Particles, states
from implicit_diffusion.potentials.energy import (
    Energy,
    check_potential,
    coarse,
    energy_of,
    evaluate,
    known_log_z,
    precision,
)
from implicit_diffusion.rounding import at_least_single, exact
from implicit_diffusion.samplers.kernel import BLOCK, Kernel, Move, check_resolved, innermost
from implicit_diffusion.samplers.walkers import Walkers, close, log_mean_exp, resample
from implicit_diffusion.showing import of_tensor

KERNEL, DATA, START, CHECK = range(4)  # streams of noise
SPAN = 32  # iterations, about, that one generator serves: to seed one costs as much as thousands of numbers


class ParticleLoop(Loop):
    """A loop over particles that a Markov kernel moves.

    Args:
        potential: V, an `nn.Module` (n, *event) → (n,), trained in place.
        kernel: the sampler's step, `ULA(0.1)` for one.
        objective: F, e.g. `Reward(r)` or `ForwardKL(data)`.
        update: a torch optimizer of the potential's parameters, or an `Update` around one.
        particles: X_0, with shape (n, *event); or n, to draw X_0 ~ π_θ with the potential's own `sample(n, noise)`.
        noise: source of every random number.
        weighted: weigh the particles so that averages are exact although θ moves, resample them when half of their
            number is left effective, and keep log Z. X_0 must then be draws from π_θ.
        lag: also tell by how much unweighted particles lag behind π_θ.

    Raises:
        InvalidInputError: whatever of these does not fit the others; the message says which.
    """

    def __init__(
        self,
        potential: nn.Module,
        kernel: Kernel,
        objective: Objective,
        update: Update | torch.optim.Optimizer,
        *,
        particles: Float[Tensor, "n *event"] | int,
        noise: Noise,
        weighted: bool = False,
        lag: bool = False,
    ) -> None:
        check_type("kernel", kernel, Kernel, "take ULA(0.1), say")
        check_type("weighted", weighted, bool, "take True or False")
        check_type("lag", lag, bool, "take True or False")
        super().__init__(potential, "potential", objective, update, noise)
        self.kernel, self.weighted, self.lag = kernel, weighted, lag
        self.inner_steps = 1  # of the kernel per iteration
        self.step_scale = 1.0  # of the kernel's step sizes; `AdaptStep` moves it
        if (weighted or lag) and not kernel.weighted:
            raise InvalidInputError(
                f"{type(kernel).__name__} has no increment of weights; take ULA, MALA or HMC, or weighted=False"
            )
        if objective.running:
            names = ", ".join(type(term).__name__ for _, term in objective.running)
            raise InvalidInputError(f"{names} is paid along a denoising chain, and a stationary sampler has none")
        x = self._start(particles)
        check_resolved(kernel, x, 0)
        self.parameters = [p for p in self.update.parameters if p.requires_grad]
        with self.evaluating():
            check_potential(potential, x)
            here = energy_of(potential, x)
            for _, term in objective.stationary:
                with trying(term.name, "the initial particles"):  # it may write into what it is given
                    term.check_stationary(Particles(x.clone()), here.value)
            self.objective = objective.starting_at(Particles(x.clone()), here.value)
        if (said := coarse(here.value, precision(potential, x))) and self.values_count:
            warnings.warn(said, stacklevel=3)
        momentum = kernel.momentum(noise.generator(START, 1, device=x.device), x)
        zeros, value = [x.new_zeros(()) for _ in range(3)], here.value
        self.walkers = Walkers(x, momentum, torch.zeros_like(value), zeros[0], x.clone(), exact(value), *zeros[1:])
        self.log_z0 = known_log_z(potential)  # log Z at the start; None where nobody knows
        self.evaluations = 0  # pulls through V at all the particles, for the sampler or for Γ
        self._drawn: tuple[int, torch.Generator | None, tuple[Tensor, ...]] = (-1, None, ())
        self._step_sizes: dict[float, Tensor] = {}

    def _words(self) -> Iterable[str]:
        yield f"{self.n} particles {of_tensor(self.walkers.x[0])}"
        yield from (name for name in ("weighted", "lag") if getattr(self, name))
        if self.step_scale != 1:
            yield f"step size={self.step_size:.3g}"
        yield from super()._words()

    def _parts(self) -> dict[str, object]:
        return {"potential": self.model, "kernel": self.kernel} | super()._parts()

    @property
    def particles(self) -> Particles:
        """The present particles; where the loop weighs, with the weights and the log Z of the present θ."""
        if not self.weighted:
            return self._held(self.walkers)
        with eval_mode(self.model):
            return self._held(close(self.kernel, self.walkers, energy_of(self.model, self.walkers.x)))

    @property
    def values_count(self) -> bool:
        """Whether V itself counts, beside its gradients: for acceptance, weights or the objective."""
        charged = any(isinstance(term, ReverseKL) for _, term in self.objective.stationary)
        return self.tracked or charged or self.kernel.target_acceptance is not None

    @property
    def tracked(self) -> bool:
        """Whether log-weights are kept, to weigh with or to tell the lag."""
        return self.weighted or self.lag

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context in which V and the objective are deterministic functions (eval mode), restored on exit."""
        refuse_inference_mode()
        with eval_mode(self.model), self.objective.evaluating():
            yield

    @property
    def n(self) -> int:
        """The number of particles."""
        return len(self.walkers.x)

    @property
    def step_size(self) -> float:
        """Scaled, of the last step of the kernel; of the first where none has been made."""
        return self.step_scale * self.kernel.step(max(0, self.iteration * self.inner_steps - 1))

    def refresh(self, particles: Particles) -> None:
        """Go on from other particles that stand for the present π_θ: draws, weighted or not, from `annealed`, say.

        What the old ones accumulated, weights, errors of log Z and of the masses of modes, ends with them; log Z goes
        on from what the new ones say of it, or where they say nothing from what the old ones did.

        Raises:
            InvalidInputError: particles of another number, shape, dtype or device, or not finite; weights in a loop
                without.
        """
        check_type("particles", particles, Particles, "take Particles(x)")
        x, kept = particles.x.detach(), self.walkers.x
        x = x.to(at_least_single(x.dtype)) if x.is_floating_point() else x
        if (x.shape, x.dtype, x.device) != (kept.shape, kept.dtype, kept.device) or (
            particles.log_weights is not None and not self.weighted
        ):
            raise InvalidInputError(
                f"refresh needs {tuple(kept.shape)} particles, {kept.dtype} on {kept.device}, with weights only where "
                f"the loop weighs, got {tuple(x.shape)}, {x.dtype} on {x.device}"
            )
        if not x.isfinite().all():
            raise InvalidInputError("refresh needs finite particles, but they hold NaN or infinity")
        x = innermost(x.clone())
        with eval_mode(self.model):
            value = energy_of(self.model, x).value
        weights = torch.zeros_like(value) if particles.log_weights is None else particles.log_weights.to(value)
        if weights.shape != value.shape or not (weights < math.inf).all() or not weights.isfinite().any():
            raise InvalidInputError(
                f"refresh needs log-weights of shape ({len(x)},) that are finite, or −∞ for some, got "
                f"{tuple(weights.shape)}"
            )
        weights = weights - log_mean_exp(weights)
        growth = self.particles.log_z_growth if self.weighted else self.walkers.log_z
        assert growth is not None
        if particles.log_z is not None:
            self.log_z0 = float(particles.log_z - growth) if self.log_z0 is None else self.log_z0
            growth = (particles.log_z - self.log_z0).to(growth)
        zero = torch.zeros_like(growth)
        self.walkers = self.walkers._replace(
            x=x, log_weights=weights, log_z=growth, previous=x, debt=exact(value), h=zero, lag=zero
        )

    def cost(self) -> dict[str, int]:
        return {"gradient_evaluations": self.evaluations}

    def state_dict(self) -> dict[str, Any]:
        own = {"log_z0": self.log_z0, "evaluations": self.evaluations, "step_scale": self.step_scale}
        return super().state_dict() | {"walkers": self.walkers._asdict()} | own

    def _like(self) -> dict[str, Any]:
        own = {"particles": list(self.walkers.x.shape), "kernel": type(self.kernel).__name__}
        return super()._like() | own | {"weighted": self.weighted, "lag": self.lag}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({"step_scale": 1.0} | dict(state) if isinstance(state, Mapping) else state)
        old, new = self.walkers._asdict(), state["walkers"]
        saved: dict[str, Any] = {k: v if v is None else innermost(v.to(old[k])) for k, v in new.items()}
        self.walkers, self.log_z0, self.evaluations = Walkers(**saved), state["log_z0"], state["evaluations"]
        self.step_scale, self._drawn = state.get("step_scale", 1.0), (-1, None, ())

    def _held(self, closed: Walkers) -> Particles:
        """The walkers as particles, weighted where the loop weighs; a copy, for objectives may write into it."""
        x = closed.x.clone()
        if not self.weighted:
            return Particles(x)
        growth = closed.log_z + log_mean_exp(closed.log_weights)
        log_z = None if self.log_z0 is None else exact(growth) + self.log_z0
        return Particles(x, closed.log_weights, log_z, growth)

    def _start(self, particles: Any) -> Tensor:
        if isinstance(particles, Integral) and not isinstance(particles, bool):
            if particles < 2:
                raise InvalidInputError(f"particles must be at least 2, got {particles}")
            count = check_integer("particles", particles, 2)
            if not hasattr(self.model, "sample"):
                raise InvalidInputError(
                    f"particles={particles} needs a potential with a method sample(n, noise); pass the particles "
                    "themselves, with shape (n, *event)"
                )
            potential: Any = self.model
            with trying("potential.sample", f"({count}, noise)"), memory_for(f"{count} particles"):
                x: Tensor = potential.sample(count, self.noise.stream(START, 0))
            check_type("what potential.sample returns", x, Tensor, "it draws n of them, with shape (n, *event)")
        else:
            x = particles
        first = next(self.model.parameters())
        if (
            isinstance(x, Tensor)
            and x.is_floating_point()
            and (at_least_single(first.dtype), first.device) != (at_least_single(x.dtype), x.device)
        ):
            raise InvalidInputError(
                f"particles are {x.dtype} on {x.device}, the potential's parameters {first.dtype} on "
                f"{first.device}; use particles.to(device, dtype)"
            )
        return innermost(states(x).clone())

    def _draws(self, iteration: int) -> tuple[Tensor, ...]:
        """The random numbers of one sampler's step: the kernel's, and one U(0, 1) for resampling."""
        x = self.walkers.x
        count = max(1, BLOCK // x.numel())
        block, i = divmod(iteration, count)
        last, generator, numbers = self._drawn
        if last != block:
            numbers = ()
            length = max(1, SPAN // count)
            first = block - block % length  # of its span
            if block == first or last != block - 1:
                generator, last = self.noise.generator(KERNEL, block // length, device=x.device), first - 1
            assert generator is not None
            for _ in range(last, block):  # a loop that begins within a span draws what came before, and drops it
                uniform = torch.rand(count, generator=generator, device=x.device, dtype=x.dtype)
                numbers = (*self.kernel.draws(generator, count, x), uniform)
            self._drawn = (block, generator, numbers)
        return tuple(part[i] for part in numbers)

    def _points(self, iteration: int) -> list[Tensor | None]:
        """For every term of the objective the points besides the particles that it charges."""
        if not any(type(term).draw is not GibbsObjective.draw for _, term in self.objective.stationary):
            return [None for _ in self.objective.stationary]
        generator = self.noise.generator(DATA, iteration, device=self.walkers.x.device)
        return [term.draw(generator) for _, term in self.objective.stationary]

    def _h(self, k: int) -> Tensor:
        h = self.step_scale * self.kernel.step(k)
        check_resolved(self.kernel, self.walkers.x, k, self.step_scale)
        if h not in self._step_sizes:
            self._step_sizes = {h: self.walkers.x.new_tensor(h)}
        return self._step_sizes[h]

    def _take(self, walkers: Walkers, here: Energy, draws: tuple[Tensor, ...], h: Tensor) -> tuple[Walkers, Move]:
        """Resample where the weights call for it, then move. `here` is V and ∇V at the walkers."""
        *numbers, uniform = draws
        if self.weighted:
            walkers, here = resample(walkers, here, uniform)
        move = self.kernel.move(
            walkers.x, walkers.momentum, here, lambda y: energy_of(self.model, y), tuple(numbers), h
        )
        momentum = None if move.momentum is None else innermost(move.momentum)
        moved = walkers._replace(x=innermost(move.x), momentum=momentum)  # one layout: a resumed run adds alike
        if self.tracked:
            debt = self.kernel.owe(walkers.x, here, move, h)
            moved = moved._replace(previous=walkers.x, debt=debt, h=h.clone())
        return moved, move

    def _hand_over(self, gradients: Iterable[Tensor | None]) -> None:
        """Add Γ to the parameters' `.grad`."""
        for p, g in zip(self.parameters, gradients):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g

    def _diagnose(self, walkers: Walkers, values: dict[str, Tensor]) -> str | None:
        bad = int((~walkers.x.flatten(1).isfinite().all(1)).sum())
        if bad:
            return (
                f"iteration {self.iteration - 1}: {bad} of {self.n} particles became NaN or infinite; take a smaller "
                "step size, or check that the potential confines them"
            )
        if self.weighted and self.particles.ess < 1.001:
            return (
                f"iteration {self.iteration - 1}: one particle carries all the weight, since θ moved too far in one "
                "step; take a smaller learning rate or more particles"
            )
        terms = zip(self.objective.stationary, self._points(self.iteration - 1), strict=True)
        places = [(f"data of {term.name}", y) for (_, term), y in terms if y is not None]
        for name, x in (("particles", self.walkers.x), ("particles", walkers.x), *places):
            with eval_mode(self.model), torch.no_grad():
                unbounded = int((~evaluate(self.model, x).isfinite()).sum())
            if unbounded:
                return (
                    f"iteration {self.iteration - 1}: V is NaN or infinite at {unbounded} of {len(x)} {name}; take "
                    "a smaller step size, or check that the potential confines the particles and is finite on data"
                )
        return self._bad_value(values)
