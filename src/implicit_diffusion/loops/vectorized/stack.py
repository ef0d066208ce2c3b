"""What runs of one loop have, stacked: parameters, particles, random numbers, and functions of one run for all of them.

Run s has θ_s and particles x_s with shape (n, *event). The stack has tensors whose first dimension is the run,

    θ: (S, *shape),    x: (S, n, *event),    V: (S, n, *event) → (S, n),  V(x)_s = V(x_s; θ_s)

V is `torch.func.functional_call` under `torch.vmap` (`potentials.stacked`). Since V_s depends on nothing of the other
runs, one pull of Σ_s V_s holds ∇V of every run, and one pull of the sum of their charged potentials holds every Γ_s.
Kernels move each particle by itself, and are given those of all runs one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.gradients.adjoint_measure import Terms
from implicit_diffusion.gradients.fused import OneRun
from implicit_diffusion.loops.particle_loop import ParticleLoop
from implicit_diffusion.potentials.energy import Energy
from implicit_diffusion.samplers.draws import innermost, stacked_numbers
from implicit_diffusion.samplers.kernel import Step
from implicit_diffusion.samplers.weighted_state import ROWS, WeightedState
from implicit_diffusion.showing import of_tuple

ONE_BY_ONE = "step the loops one by one"


class Weights(NamedTuple):
    """Weights and log Z of all runs, named as those of `Particles`."""

    log_weights: Tensor
    log_z: Tensor | None
    log_z_growth: Tensor

    def __repr__(self) -> str:
        return of_tuple(self)


class Stack(OneRun):
    """How functions of one run are applied to all of them.

    Args:
        terms: of the objective of every run.
        max_grad_norm: to which the norm of every run's Γ is clipped; None for no bound.
        mapped: whether functions of the terms are mapped over the runs; otherwise they are called for one run after the
            other.
    """

    dim = 1

    def __init__(self, terms: Sequence[Terms], max_grad_norm: float | None, *, mapped: bool) -> None:
        self.terms, self.max_grad_norm, self.mapped = terms, max_grad_norm, mapped

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return over_runs(function)

    def of_terms(self, function: Callable[..., Any], terms: Terms) -> Callable[..., Any]:
        def one(*args: Any) -> Any:
            return function(terms, *args)

        def one_by_one(*args: Any) -> Any:
            results = [function(own, *run_of(args, s)) for s, own in enumerate(self.terms)]
            return stacked_tree(results)

        return over_runs(one) if self.mapped else one_by_one

    def particles(self, x: Tensor, log_weights: Tensor, log_z: Tensor | None, log_z_growth: Tensor) -> Weights:
        return Weights(log_weights, log_z, log_z_growth)

    def step(self, step: Step) -> Step:
        def energy(y: Tensor) -> Energy:
            return Energy(*map(self.flat, step.energy(self.stacked(y))))

        momentum = None if step.momentum is None else self.flat(step.momentum)
        here, draws = Energy(*map(self.flat, step.here)), tuple(map(self.flat, step.draws))
        return Step(self.flat(step.x), momentum, here, energy, draws, step.h)

    def flat(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def stacked(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (len(self.terms), -1))

    def norm(self, gradients: Sequence[Tensor]) -> Float[Tensor, " runs"]:
        norms = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients]
        return torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def clipped(self, gradients: Sequence[Tensor | None], norm: Float[Tensor, " runs"]) -> list[Tensor | None]:
        """Γ of every run with its norm clipped, as `torch.nn.utils.clip_grad_norm_` does."""
        if self.max_grad_norm is None:
            return list(gradients)
        factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * factor.view(-1, *[1] * (g.ndim - 1)) for g in gradients]


def over_runs(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.vmap` over the first dimension of every tensor in the arguments; what is not a tensor, all runs share."""

    def mapped(*args: Any) -> Any:
        leaves, form = pytree.tree_flatten(args)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        results: list[Any] = []

        def one(*own: Tensor) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for i, tensor in zip(tensors, own):
                filled[i] = tensor
            out, out_form = pytree.tree_flatten(function(*pytree.tree_unflatten(filled, form)))
            results[:] = [out, out_form]
            return tuple(leaf for leaf in out if isinstance(leaf, Tensor))

        stacked = iter(torch.vmap(one)(*(leaves[i] for i in tensors)))
        out, out_form = results
        return pytree.tree_unflatten([next(stacked) if isinstance(leaf, Tensor) else leaf for leaf in out], out_form)

    return mapped


def run_of(tree: Any, s: int) -> Any:
    """What run s has of a tree of stacked tensors."""
    return pytree.tree_map(lambda leaf: leaf[s] if isinstance(leaf, Tensor) else leaf, tree)


def stacked_tree(trees: Sequence[Any]) -> Any:
    """Trees of the runs as one of stacked tensors."""
    flat = [pytree.tree_flatten(tree) for tree in trees]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(leaves, flat[0][1])


def stacked_states(states: Sequence[WeightedState]) -> WeightedState:
    """States of the runs as one, of which short vectors are laid out with the particles of all runs innermost."""
    whole: WeightedState = stacked_tree(states)
    rows: dict[str, Any] = {name: _laid_out(getattr(whole, name)) for name in ROWS}
    return whole._replace(**rows)


def _laid_out(part: Tensor | None) -> Tensor | None:
    return None if part is None else innermost(part.flatten(0, 1)).unflatten(0, part.shape[:2])


def state_of(whole: WeightedState, s: int) -> WeightedState:
    """The state of run s, in memory of its own."""
    own: Any = [None if part is None else innermost(part.clone()) for part in run_of(whole, s)]
    return WeightedState(*own)


class StackedBlocks:
    """The random numbers of every run, each from its own noise, as `Blocks` has them for one.

    Args:
        loops: the runs.
    """

    def __init__(self, loops: Sequence[ParticleLoop]) -> None:
        self.loops, self._block = loops, -1
        self._numbers: tuple[Tensor, ...] = ()

    def at(self, iteration: int) -> tuple[Tensor, ...]:
        """The random numbers of one step of the sampler: the kernel's, and one U(0, 1) per run for resampling.

        Raises:
            InvalidInputError: a kernel with numbers that are not those of single particles.
        """
        first = self.loops[0]
        block, i = first._blocks.place(iteration, first._state.x)
        if block != self._block:
            columns = zip(*(loop._blocks.numbers(block, loop.kernel.draws, loop.noise, first._state.x)
                            for loop in self.loops))  # fmt: skip
            *parts, uniform = columns
            n = len(first._state.x)
            if any(part.ndim < 2 or part.shape[1] != n for part, *_ in parts):
                raise InvalidInputError(
                    f"{type(first.kernel).__name__} draws numbers that particles share, and several runs at once have "
                    f"no use for them; {ONE_BY_ONE}"
                )
            self._numbers, self._block = (*map(stacked_numbers, parts), torch.stack(uniform, 1)), block
        return tuple(part[i] for part in self._numbers)
