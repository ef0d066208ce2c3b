"""Several runs of one loop at once.

A run of a small problem spends its time in calls, not in arithmetic: ten runs that make each call together take little
longer than one. `Vectorized` takes loops as they would run by themselves, stacks what they have (`stack`), and makes
the same iteration on the stack, whose numbers are those of the single runs to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from implicit_diffusion.errors import InvalidInputError, check_integer, check_type
from implicit_diffusion.gradients.fused import charges_of
from implicit_diffusion.loops.baselines import NestedParticles
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.loops.single import Single
from implicit_diffusion.loops.single_compiled import Iteration
from implicit_diffusion.loops.update import Update
from implicit_diffusion.loops.vectorized.checks import check_loops, check_potentials, trained_names
from implicit_diffusion.loops.vectorized.optimizer import hand_back, stacked_optimizer
from implicit_diffusion.loops.vectorized.stack import (
    Stack,
    StackedBlocks,
    run_of,
    stacked_states,
    state_of,
)
from implicit_diffusion.potentials.stacked import StackedPotential
from implicit_diffusion.showing import Shown


class Vectorized(Shown):
    """Loops over particles that step together, each with a θ, particles and noise of its own.

        >>> import torch
        >>> from implicit_diffusion import ULA, GaussianMixture, Noise, Reward, Single
        >>> from implicit_diffusion.loops import Vectorized
        >>> reward = Reward(lambda x: x[:, 0])
        >>> def loop(seed):
        ...     potential = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))
        ...     sgd = torch.optim.SGD([potential.logits], lr=0.5)
        ...     return Single(potential, ULA(0.1), reward, sgd, particles=1000, noise=Noise(seed))
        >>> seeds = Vectorized([loop(seed) for seed in range(3)])
        >>> for metrics in seeds.run(100):
        ...     pass
        >>> metrics["reward"].shape
        torch.Size([3])
        >>> [f"{loop.model.weights[1]:.1f}" for loop in seeds.loops]
        ['1.0', '1.0', '1.0']

    What differs from run to run are numbers: θ, buffers and frozen parameters of the potentials, particles, noise, and
    data of the objective. V is called under `torch.vmap`; functions of the objective are as well, where it is the same
    object in all loops and they allow it, and else are called for one run after the other. The iteration is compiled
    where the loops' own is.

    Args:
        loops: at least two of one kind, `Single`, `NestedParticles` or `Unrolled`, built alike and at the same
            iteration. They belong to this object from now on; read them as `loops`.

    Raises:
        InvalidInputError: loops that differ in more than numbers; a potential that `torch.vmap` cannot map; an
            optimizer whose step is not elementwise; updates with a schedule, an average or accumulation; an inner
            problem with interaction; several processes. Such loops are stepped one by one.
    """

    def __init__(self, loops: Sequence[ParticleLoop]) -> None:
        self._loops = check_loops(loops)
        self._gather()

    def _words(self) -> Iterable[str]:
        first = self._loops[0]
        yield f"{len(self._loops)} × {type(first).__name__}"
        yield f"{first.n} particles"
        yield f"updates={self._twin.update.updates}"

    @property
    def loops(self) -> tuple[ParticleLoop, ...]:
        """The loops in the state that they have reached, as if each had run by itself."""
        if self._ahead:
            self._hand_back()
        return tuple(self._loops)

    @property
    def iteration(self) -> int:
        """Iterations made."""
        return self._twin.iteration

    def step(self) -> dict[str, Any]:
        """One iteration of every loop.

        Returns:
            metrics: as `Loop.step`, of which numbers that depend on the run have shape (runs,), in the order of the
            loops.

        Raises:
            NonFiniteError: NaN or infinity in some run, before any θ is touched; the message says which.
        """
        twin: Any = self._twin
        count = twin.iterations if isinstance(twin, Single) else 1
        inputs = [self._inputs(k) for k in range(twin.iteration, twin.iteration + count)]
        twin.iteration += count
        twin.gradient_evaluations += count * twin._evaluations_per_iteration
        self._ahead = True
        with self._loops[0].evaluating():
            done, moved = self._advance(inputs)
        twin._state = done.state
        return twin._metrics(done.values) | done.info | moved

    def run(self, updates: int) -> Iterator[dict[str, Any]]:
        """Train until every loop has made `updates` updates of θ in all, yielding the metrics of each step."""
        updates = check_integer("updates", updates, 0)
        while self._twin.update.updates < updates:
            yield self.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all loops, each of which its loop can continue from by itself."""
        return {"loops": [loop.state_dict() for loop in self.loops]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, to the bit.

        Raises:
            InvalidInputError: the state of other or fewer loops.
        """
        check_type("state", state, Mapping, "use the state_dict() of a Vectorized like this one")
        states = state.get("loops")
        if not isinstance(states, Sequence) or len(states) != len(self._loops):
            given = len(states) if isinstance(states, Sequence) else "none"
            raise InvalidInputError(f"state must have the states of {len(self._loops)} loops, got {given}")
        for loop, own in zip(self.loops, states):
            loop.load_state_dict(own)
        self._gather()

    def _gather(self) -> None:
        """Stack what the loops have, in a twin of the first one that makes the iterations of all."""
        loops, first = self._loops, self._loops[0]
        names = trained_names(first)
        potential = StackedPotential([loop.model for loop in loops], names)
        check_potentials(loops, potential)
        stacked = [potential.trained[name] for name in names]
        self._twin = twin = copy.copy(first)
        terms = [loop.objective.stationary for loop in loops]
        mapped = all(own is term for each in terms for (_, own), (_, term) in zip(each, terms[0], strict=True))
        twin.runs = Stack(terms, first.update.max_grad_norm, mapped=mapped)
        twin.update = Update(stacked_optimizer([loop.update.optimizer for loop in loops], stacked))
        twin.update.bind(nn.ParameterList(stacked))
        twin.update.updates, twin.update.advice = first.update.updates, first.update.advice
        twin.parameters = [p for p in stacked if p.requires_grad]
        twin.model = potential  # type: ignore[assignment]  # a function is all that an iteration needs
        if first.log_z0 is not None:
            starts = [float(loop.log_z0 or 0.0) for loop in loops]
            twin.log_z0 = torch.tensor(starts, device=stacked[0].device, dtype=torch.float64)  # type: ignore[assignment]
        twin._state = stacked_states([loop._state for loop in loops])
        twin._step_sizes = {}
        if isinstance(twin, NestedParticles):
            twin.initial = stacked_states([loop.initial for loop in loops if isinstance(loop, NestedParticles)])
        self._blocks = StackedBlocks(loops)
        twin.runs.mapped = mapped and self._maps()
        if isinstance(twin, Single):
            twin._choose(compiled=first.compiled is not None)  # type: ignore[attr-defined]
        self._ahead = False

    def _inputs(self, k: int) -> tuple[Any, ...]:
        """What iteration k needs from outside of it, as the loops' own `_iterate` take it."""
        first, twin = self._loops[0], self._twin
        each = [loop._points(k) for loop in self._loops]
        points = [None if column[0] is None else torch.stack(column) for column in zip(*each)]
        if isinstance(first, Single):
            return self._blocks.at(k), points, twin._h(k)
        steps = range(k * first.inner_steps, (k + 1) * first.inner_steps)
        return map(self._blocks.at, steps), points, map(twin._h, steps)

    def _advance(self, inputs: list[tuple[Any, ...]]) -> tuple[Iteration, dict[str, Any]]:
        """Iterations with their updates of θ."""
        twin, runs = self._twin, self._twin.runs
        assert isinstance(runs, Stack)
        if isinstance(twin, Single) and twin._updates_inside:
            function = twin._in_one_call if twin.update.updates == 0 else twin._function
            done = function(twin._state, inputs)
            moved = twin.update.account(done.alarm, lambda: self._why(done), done.norm, len(inputs), done.overflow)
            return done, moved
        twin.update.begin()
        (only,) = inputs
        done = (twin._function if isinstance(twin, Single) else twin._iterate)(twin._state, *only)  # type: ignore
        twin._hand_over(runs.clipped(done.gradients, done.norm))
        moved = twin.update.step([done.alarm], lambda: self._why(done), torch.linalg.vector_norm(done.norm))
        return done, moved | {"grad_norm": done.norm}

    def _why(self, done: Iteration) -> str | None:
        """Which run has something that is NaN or infinite, and what it is."""
        for s, loop in enumerate(self.loops):
            reason = loop._diagnose(state_of(done.state, s), run_of(done.values, s))
            if reason is None and not done.norm[s].isfinite():
                reason = "its gradient is NaN or infinite"
            if reason is not None:
                return f"run {s}: {reason}"
        return None

    def _hand_back(self) -> None:
        """Bring the loops to where their twin is."""
        twin, names = self._twin, trained_names(self._loops[0])
        hand_back(twin.update.optimizer, [loop.update.optimizer for loop in self._loops])
        for s, loop in enumerate(self._loops):
            own = dict(loop.model.named_parameters())
            with torch.no_grad():
                for name, stacked in zip(names, twin.update.parameters, strict=True):
                    own[name].copy_(stacked[s])
            loop._state = state_of(twin._state, s)
            loop.iteration, loop.gradient_evaluations = twin.iteration, twin.gradient_evaluations
            loop.update.updates = twin.update.updates
        self._ahead = False

    def _maps(self) -> bool:
        """Whether `torch.vmap` maps the functions of the objective, tried where the particles are."""
        twin = self._twin
        points = self._inputs(twin.iteration)[1]
        state, solver = twin._state, twin.solver
        with self._loops[0].evaluating(), torch.no_grad():
            energy = twin.model(state.x)
            known = [None if y is None else twin.model(y) for y in points]
            weights = (state.log_weights, None, state.log_z) if twin.weighted else (None, None, None)
            try:
                twin.runs.of_terms(charges_of, twin.objective.stationary)(
                    solver, state.x, energy, weights, points, known
                )
            except Exception:  # of any kind, from inside a function of the user
                return False
        return True
