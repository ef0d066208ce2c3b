"""The denoising chain: a finite sampler as one affine-Gaussian recursion on a network.

    x_{k+1} = a_k x_k + b_k u_θ(m_k x_k, t_k) + s_k ξ_k,     k = 0..N−1,     x_0 ~ N(0, σ_0² I)

The table (a, b, s, m, t) *is* the sampler: DDPM, DDIM, Euler–Maruyama and flows differ in their rows alone. States
carry a slot axis, (slots, batch, *event), and every slot stands on a row of its own, so that trajectories at different
stages advance in one network call. The pretrained network u_0 acts on the `pretrained_rows`, and path costs compare
u_θ with it.

Under a `condition`, every trajectory has its own class labels or prompts and the network is u_θ(x, t, **condition).
They are addressed by key, like the noise: forward and backward passes, nested loops, queues and resumed runs see the
same ones, and so do u_0 and terminal objectives.

Networks run in eval mode: with dropout u_θ would be a random function, and the adjoint would belong to another draw.

Where samples are shared out over processes, `batch` is that of all of them together: every process draws the whole
batch and keeps its own rows, so that all processes hold the states of one.

Nothing that a chain computes changes what it computes next, so loops and evaluations may share one. A transition
reports its own work (`Transition.evaluations`); callers that need a total add it up.

States, times, coefficients, adjoints and path costs have at least single precision. A network whose weights have less
is called in its own precision, and its output is converted back: half precision rounds u alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from implicit_diffusion import processes
from implicit_diffusion.denoisers.half_weights import reads_in_single
from implicit_diffusion.errors import InvalidInputError, check_call, check_integer, check_type, trying
from implicit_diffusion.frozen import eval_mode, frozen_copy
from implicit_diffusion.noise import Noise
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import at_least_single
from implicit_diffusion.samplers.chain_checks import check_condition, check_event_shape, check_pretrained_rows
from implicit_diffusion.samplers.rows import RowCache, RowCoefficients
from implicit_diffusion.showing import Shown, brief, of_kind
from implicit_diffusion.tables.table import ChainTable
from implicit_diffusion.tables.transition import Transition

TRIAL = 2**31  # trajectory on which chains and objectives are tried; no run injects so many
Denoiser = Callable[..., Tensor]
Condition = Callable[[Noise, int, int], Mapping[str, Tensor]]


class Chain(Shown):
    """A sampler of N steps from noise to data, driven by a denoiser.

    Args:
        denoiser: u_θ(x, t), any callable with x of shape (batch, *event) and t of shape (batch,) → shape of x.
            Trainable where it is an `nn.Module`. Under a condition it is called as u(x, t, **condition).
        table: the rows (a, b, s, m, t); see `read_table`, `ou_reverse_sde`.
        event_shape: shape of one sample, e.g. (1, 8, 8).
        reference: the pretrained u_0; if None, a frozen copy of `denoiser` as it is now.
        pretrained_rows: rows on which u_0 acts in place of u_θ; "noiseless" means those whose noise vanishes, on
            which a path KL would be infinite.
        condition: (noise, batch, index) → what trajectory `index` is sampled under, tensors with leading dimension
            `batch` by name; the same arguments must give the same ones. See `Drawn`.

    Raises:
        InvalidInputError: an event shape that is empty or not positive; a row that the table does not have; an argument
            of another type.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        table: ChainTable,
        event_shape: Iterable[int],
        *,
        reference: Denoiser | None = None,
        pretrained_rows: Iterable[int] | Literal["noiseless"] = (),
        condition: Condition | None = None,
    ) -> None:
        check_type("table", table, ChainTable, "a diffusers scheduler becomes one by read_table(scheduler, num_steps)")
        check_type("denoiser", denoiser, Callable, "it is called as u(x, t)")
        check_call("denoiser", denoiser, "x", "t", more=condition is not None)
        if condition is not None:
            check_call("condition", condition, "noise", "batch", "index")
        self.denoiser, self.table, self.condition = denoiser, table, condition
        self.event_shape = check_event_shape(event_shape)
        if reference is None:
            reference = frozen_copy(denoiser) if isinstance(denoiser, nn.Module) else denoiser
        check_call("reference", reference, "x", "t", more=condition is not None)
        self.reference = reference
        self.pretrained_rows = check_pretrained_rows(pretrained_rows, table)
        parameter = next(denoiser.parameters(), None) if isinstance(denoiser, nn.Module) else None
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.dtype = torch.get_default_dtype() if parameter is None else at_least_single(parameter.dtype)
        self._tried: set[int] = set()  # functions that have been called, by id: the first call is a trial
        self._rows = RowCache(table, self.pretrained_rows, 1 + len(self.event_shape), self.device, self.dtype)

    def _words(self) -> Iterable[str]:
        yield brief(self.denoiser)
        yield f"table={self.table.name!r}"
        yield f"N={len(self.table)}"
        yield f"event_shape={self.event_shape}"
        yield of_kind(self.dtype, self.device)
        if self.pretrained_rows:
            yield f"pretrained_rows={brief(sorted(self.pretrained_rows))}"
        if self.condition is not None:
            yield f"condition={brief(self.condition)}"

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.table)

    @property
    def trained_rows(self) -> tuple[int, ...]:
        """Rows on which u_θ acts."""
        return tuple(row for row in range(self.num_steps) if row not in self.pretrained_rows)

    def replace(self, **changes: Any) -> Chain:
        """The same chain with other `denoiser`, `reference`, `pretrained_rows` or `condition`."""
        kept = {
            "denoiser": self.denoiser,
            "reference": self.reference,
            "pretrained_rows": self.pretrained_rows,
            "condition": self.condition,
        }
        return Chain(table=self.table, event_shape=self.event_shape, **(kept | changes))

    def pretrained(self) -> Chain:
        """The chain before any training: u_0 on every row."""
        return self.replace(denoiser=self.reference)

    def transition(
        self,
        x: Float[Tensor, "slots batch *event"],
        rows: Sequence[int],
        *,
        reference: bool = False,
        held: bool = False,
        condition: Mapping[str, Tensor] | None = None,
    ) -> Transition:
        """Predictions and coefficients for states on the given rows, one row per slot.

        One call of u_θ on the trained slots, one of u_0 on the others.

        Args:
            x: the states.
            rows: one per slot.
            reference: evaluate u_0 on every slot as well.
            held: hold x fixed in u, so that x has a gradient through u_0 alone.
            condition: tensors with leading dimensions (slots, batch), from `conditions`.

        Raises:
            InvalidInputError: the denoiser's output does not have its input's shape.
        """
        c, given = self._rows(tuple(rows)), condition or {}
        u0 = self._predict(self.reference, x, c, given) if reference else None
        x, acting = (x.detach(), None if u0 is None else u0.detach()) if held else (x, u0)
        if c.pretrained_slots.numel() == 0:
            u = self._predict(self.denoiser, x, c, given)
        else:
            own = c.pretrained_slots
            parts = [self._predict(self.reference, x, c, given, own) if acting is None else acting[own]]
            if c.trained_slots.numel():
                parts.append(self._predict(self.denoiser, x, c, given, c.trained_slots))
            u = torch.cat(parts)
            if c.order.numel():
                u = u[c.order]
        calls = len(c.trained_slots) + len(rows) if reference else len(rows)
        return Transition(x, u, u0, c.a, c.b, c.s, c.h, c.trained, calls * x.shape[1] * processes.count())

    def initial(self, noise: Noise, batch: int, index: int = 0) -> Float[Tensor, "batch *event"]:
        """x_0 ~ N(0, σ_0² I) of trajectory `index`."""
        check_type("noise", noise, Noise, "use Noise(0), for example")
        batch = check_integer("batch", batch)
        x = noise.normal((batch, *self.event_shape), index, 0, device=self.device, dtype=self.dtype)
        return self.table.initial_std * processes.share(x)

    def innovation(
        self, noise: Noise, batch: int, indices: Sequence[int], rows: Sequence[int]
    ) -> Float[Tensor, "slots batch *event"] | None:
        """ξ of trajectory indices[i] on row rows[i]; None where every one of these rows is deterministic."""
        if not any(self.table.s[list(rows)].tolist()):
            return None
        shape = (batch, *self.event_shape)
        draws = (noise.normal(shape, i, k + 1, device=self.device, dtype=self.dtype) for i, k in zip(indices, rows))
        return torch.stack([processes.share(draw) for draw in draws])

    def conditions(
        self, noise: Noise, batch: int, indices: Sequence[int]
    ) -> dict[str, Shaped[Tensor, "slots batch ..."]] | None:
        """What trajectories `indices` are sampled under; None for a chain without condition.

        Raises:
            InvalidInputError: the condition does not return a dict of tensors with leading dimension `batch`.
        """
        if self.condition is None:
            return None
        with nullcontext() if id(self.condition) in self._tried else trying("condition", f"(noise, {batch}, index)"):
            drawn = [self.condition(noise, batch, index) for index in indices]
        for given in drawn:
            check_condition(given, batch)
        self._tried.add(id(self.condition))
        own = {name: torch.stack([processes.share(given[name]) for given in drawn]) for name in drawn[0]}
        return {name: value.to(self.device, non_blocking=True) for name, value in own.items()}

    def walk(
        self,
        x: Float[Tensor, "batch *event"],
        noise: Noise,
        index: int = 0,
        *,
        reference: bool = False,
        repeats: int = 1,
    ) -> Iterator[tuple[Transition, Tensor | None, Tensor]]:
        """All N rows from x_0 = `x`: yields (transition, ξ_k, x_{k+1}), each with one slot. Differentiable.

        With `repeats`, that many consecutive states share a condition: those of one start.
        """
        state, batch = x[None], len(x) * processes.count()
        condition = self.conditions(noise, batch // repeats, [index])
        if condition is not None:
            condition = {name: value.repeat_interleave(repeats, 1) for name, value in condition.items()}
        for row in range(self.num_steps):
            transition = self.transition(state, [row], reference=reference, condition=condition)
            xi = self.innovation(noise, batch, [index], [row])
            state = transition.push(xi)
            yield transition, xi, state

    @torch.no_grad()
    def trajectory(self, noise: Noise, batch: int, index: int = 0) -> list[Float[Tensor, "batch *event"]]:
        """The states x_0, …, x_N of trajectory `index`, each with shape (batch, *event)."""
        states = [self.initial(noise, batch, index)]
        with self.evaluating():
            states += [state[0] for _, _, state in self.walk(states[0], noise, index)]
        return states

    @torch.no_grad()
    def sample(self, noise: Noise, batch: int, index: int = 0) -> Float[Tensor, "batch *event"]:
        """x_N of trajectory `index`, with shape (batch, *event)."""
        x = self.initial(noise, batch, index)
        with self.evaluating():
            for _, _, state in self.walk(x, noise, index):
                x = state[0]
        return x

    def endpoint(
        self, x: Float[Tensor, "batch *event"], noise: Noise, index: int = 0, *, repeats: int = 1
    ) -> Particles:
        """The particles that end trajectory `index` at x_N = `x`, with what they were sampled under; see `walk`."""
        check_type("x", x, Tensor, "it holds the states that end a trajectory")
        check_type("noise", noise, Noise, "use Noise(0), for example")
        if self.condition is None:
            return Particles(x)
        condition = self.conditions(noise, len(x) * processes.count() // check_integer("repeats", repeats), [index])
        assert condition is not None
        return Particles(x, condition={k: v[0].repeat_interleave(repeats, 0) for k, v in condition.items()})

    def evaluating(self) -> AbstractContextManager[None]:
        """Context in which u_θ and u_0 are deterministic functions (eval mode), restored on exit."""
        return eval_mode(*(f for f in (self.denoiser, self.reference) if isinstance(f, nn.Module)))

    def _predict(
        self,
        network: Denoiser,
        x: Tensor,
        c: RowCoefficients,
        condition: Mapping[str, Tensor],
        slots: Tensor | None = None,
    ) -> Tensor:
        m, t = c.m, c.t
        if slots is not None:
            x, m, t, condition = x[slots], m[slots], t[slots], {name: value[slots] for name, value in condition.items()}
        inputs = (m * x).flatten(0, 1)
        given = {name: value.flatten(0, 1) for name, value in condition.items()}
        with (
            nullcontext()
            if id(network) in self._tried
            else trying("denoiser", f"states of shape {tuple(inputs.shape)}")
        ):
            u = network(inputs.to(_precision(network, self.dtype)), t.repeat_interleave(x.shape[1]), **given)
        check_type("what the denoiser returns", u, Tensor, "a diffusers model becomes one by DiffusersDenoiser(model)")
        if u.shape != inputs.shape:
            raise InvalidInputError(
                f"denoiser must return the shape of its input, {tuple(inputs.shape)}, got {tuple(u.shape)}"
            )
        self._tried.add(id(network))
        return u.to(x.dtype).unflatten(0, x.shape[:2])


def _precision(network: Denoiser, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that a network is called in: that of its weights, unless its layers read them in single precision."""
    if reads_in_single(network):
        return torch.float32
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return otherwise if parameter is None or not parameter.dtype.is_floating_point else parameter.dtype
