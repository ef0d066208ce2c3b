"""What every argument of a network is: the state, the time, or constant in time, one per sample or one for all.

Two recordings are compared. Between the rows of the first, with two samples, only the state and the time change;
everything else must be the same on every row. Between a run of two samples and one of three, what belongs to a sample
grows: a tensor or a list of 2 g entries becomes one of 3 g, where g is the number of parts that one call evaluates (2
for guidance in one call). What does not grow belongs to all samples.

    `read_roles`    what an argument is, from recordings
    `bound`         the same with the values of a run: embeddings of m prompts, masks, positions, guidance scales
    `filled`        the argument for a state, times and the numbers of the samples' prompts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from implicit_diffusion.errors import NonAffineError
from implicit_diffusion.models.pipelines.recording import NetworkCall

FEW, MORE = 2, 3  # samples of the two recordings
EXACT = 1e-6  # relative, of float32


@dataclass(frozen=True)
class State:
    """m_k x, one per part: another view of the state, as a tensor or a list."""

    parts: int
    shape: tuple[int, ...]  # of one sample
    listed: bool


@dataclass(frozen=True)
class Time:
    """t, one number per sample and part, spread over the `shape` of a sample's times."""

    parts: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None for that of the state


@dataclass(frozen=True)
class PerSample:
    """One entry per sample and part; once bound, `values` holds those of m prompts for every part."""

    parts: int
    values: tuple[Any, ...] = ()  # of tensors (m, …), or (1, …) where all are equal, or of lists of m entries


@dataclass(frozen=True)
class Constant:
    """The same for all samples and rows."""

    value: Any = None


Role = State | Time | PerSample | Constant | dict[str, Any] | list[Any] | tuple[Any, ...]


def read_roles(rows: Sequence[NetworkCall], wider: NetworkCall, states: Sequence[Tensor]) -> dict[str, Role]:
    """The roles of a call's arguments.

    Args:
        rows: the same call on every row, of `FEW` samples.
        wider: the same call on the first row, of `MORE` samples.
        states: x_k, one per row.

    Raises:
        NonAffineError: an argument is neither constant, nor the state, nor the time; or there is no state or no time.
    """
    times: list[list[float]] = []
    names = rows[0].arguments.keys()
    for row, call in enumerate(rows):
        if call.arguments.keys() != names:
            odd = ", ".join(sorted(call.arguments.keys() ^ names))
            raise NonAffineError(f"pipeline: row {row} calls the network with other arguments than row 0: {odd}")
    roles = {
        name: _role(name, [call.arguments[name] for call in rows], wider.arguments.get(name), states, times)
        for name in names
    }
    if not any(isinstance(role, State) for role in leaves(roles)):
        raise NonAffineError(
            f"pipeline: none of the arguments {', '.join(names)} of the network is the state, up to its shape and a "
            "factor; the pipeline mixes it with something else"
        )
    if not times:
        raise NonAffineError(f"pipeline: none of the arguments {', '.join(names)} of the network is a time")
    return roles


def _role(name: str, rows: list[Any], wider: Any, states: Sequence[Tensor], times: list[list[float]]) -> Role:
    first = rows[0]
    if (state := _as_state(rows, states)) is not None:
        return state
    if all(same(value, first) for value in rows[1:]):
        return constant_role(name, first, wider)
    if isinstance(first, Mapping):
        return {k: _role(f"{name}[{k!r}]", [row[k] for row in rows], wider[k], states, times) for k in first}
    if isinstance(first, list | tuple) and len({len(row) for row in (*rows, wider)}) == 1:
        inside = [_role(f"{name}[{i}]", [row[i] for row in rows], wider[i], states, times) for i in range(len(first))]
        return inside if isinstance(first, list) else tuple(inside)
    values = [_single(row) for row in rows]
    if None not in values and (not times or values == times[0]):
        times.append([float(v) for v in values if v is not None])
        return _time(first, states[0])
    changed = next(k for k, value in enumerate(rows) if not same(value, first))
    raise NonAffineError(
        f"pipeline: the network's argument {name} on row {changed} differs from that on row 0, and it is neither the "
        "state (up to its shape and a factor) nor the time; a chain's condition must be constant in time"
    )


def constant_role(name: str, first: Any, wider: Any, few: int = FEW, more: int = MORE) -> Role:
    """The role of an argument that is constant in time, from its values in runs of `few` and of `more` samples."""
    if isinstance(first, Mapping):
        return {key: constant_role(f"{name}[{key!r}]", value, wider[key], few, more) for key, value in first.items()}
    if isinstance(first, Tensor | list) and len_of(first) != len_of(wider):
        parts = len_of(first) // few
        if parts and (len_of(first), len_of(wider)) == (parts * few, parts * more):
            return PerSample(parts)
    if isinstance(first, list | tuple) and len(first) == len(wider):
        inside = [constant_role(f"{name}[{i}]", *pair, few, more) for i, pair in enumerate(zip(first, wider))]
        return inside if isinstance(first, list) else tuple(inside)
    if not same(first, wider):
        raise NonAffineError(
            f"pipeline: the network's argument {name} depends on the number of samples, but not by one entry per "
            "sample; a chain calls the network with any number of them"
        )
    return Constant()


def _as_state(rows: list[Any], states: Sequence[Tensor]) -> State | None:
    """The role of a state, where every row is a multiple of x_k, repeated for every part."""
    for value, x in zip(rows, states, strict=True):
        listed = isinstance(value, list) and bool(value) and all(isinstance(entry, Tensor) for entry in value)
        if not listed and not isinstance(value, Tensor):
            return None
        if not len_of(value) or len(value) % len(x) or any(entry.numel() != x[0].numel() for entry in value):
            return None
        z = torch.stack([entry.reshape(-1) for entry in value]).double()
        wanted = x.to(value[0].dtype).double().reshape(len(x), -1).repeat(len(value) // len(x), 1)
        m = (z * wanted).sum() / wanted.square().sum()
        eps = EXACT if value[0].dtype.itemsize >= 4 else 2 * torch.finfo(value[0].dtype).eps
        if not (m != 0 and (z - m * wanted).abs().max() <= eps * (m * wanted).abs().max()):
            return None
    return State(len(rows[0]) // len(states[0]), tuple(rows[0][0].shape), isinstance(rows[0], list))


def _time(value: Any, x: Tensor) -> Time:
    if not isinstance(value, Tensor):
        return Time(0, (), None if isinstance(value, float) else torch.int64)
    dtype = None if value.dtype == x.dtype else value.dtype
    many = value.ndim > 0 and len(value) > 1
    return Time(len(value) // FEW if many else 0, tuple(value.shape[1:]) if many else (), dtype)


def _single(value: Any) -> float | None:
    """The number that a leaf holds everywhere."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.numel() and bool((value == value.flatten()[0]).all()):
        return float(value.flatten()[0])
    return None


def time_in(roles: Any, values: Any) -> float | None:
    """The time that a call's arguments hold."""
    if isinstance(roles, Time):
        return _single(values)
    keys = roles if isinstance(roles, dict) else range(len(roles)) if isinstance(roles, list | tuple) else ()
    return next((t for key in keys if (t := time_in(roles[key], values[key])) is not None), None)


def differing(roles: Any, ours: Any, theirs: Any, name: str = "") -> str | None:
    """The name of an argument whose value, as filled in, is not what the pipeline gave; None if there is none."""
    if isinstance(roles, dict | list | tuple):
        keys = roles if isinstance(roles, dict) else range(len(roles))
        named = ((key, f"{name}[{key!r}]" if name else str(key)) for key in keys)
        return next((d for key, n in named if (d := differing(roles[key], ours[key], theirs[key], n))), None)
    if isinstance(roles, State):
        pairs = list(zip(ours, theirs, strict=True))
        eps = max(EXACT, 2 * torch.finfo(pairs[0][1].dtype).eps)
        close = all((a.to(b.dtype) - b).abs().max() <= eps * b.abs().max() for a, b in pairs)
    elif isinstance(roles, Time):
        close = _single(ours) == _single(theirs)
    else:
        close = same(ours, theirs)
    return None if close else name


def bound(roles: Any, values: Any, count: int) -> Any:
    """Roles with the values of a run of `count` samples."""
    if isinstance(roles, Constant):
        return Constant(values)
    if isinstance(roles, PerSample):
        parts = [values[i * count : (i + 1) * count] for i in range(roles.parts)]
        return PerSample(roles.parts, tuple(map(_deduplicated, parts)))
    if isinstance(roles, dict):
        return {key: bound(role, values[key], count) for key, role in roles.items()}
    if isinstance(roles, list | tuple):
        inside = [bound(role, value, count) for role, value in zip(roles, values, strict=True)]
        return inside if isinstance(roles, list) else tuple(inside)
    return roles


def filled(roles: Any, x: Tensor, t: Tensor, which: Tensor, parts: int) -> Any:
    """The arguments for states m_k x (n, *event), times (n,) and numbers of prompts (n,)."""
    if isinstance(roles, Constant):
        return _on(roles.value, x)
    if isinstance(roles, PerSample):
        return _joined([_chosen(value, which) for value in roles.values], x)
    if isinstance(roles, State):
        z = x.reshape(len(x), *roles.shape).repeat(roles.parts, *[1] * len(roles.shape))
        return list(z.unbind()) if roles.listed else z
    if isinstance(roles, Time):
        times = t.to(roles.dtype or x.dtype).repeat(roles.parts or parts)
        return times.reshape(-1, *[1] * len(roles.shape)).expand(-1, *roles.shape)
    if isinstance(roles, dict):
        return {key: filled(role, x, t, which, parts) for key, role in roles.items()}
    inside = [filled(role, x, t, which, parts) for role in roles]
    return inside if isinstance(roles, list) else tuple(inside)


def _deduplicated(values: Any) -> Any:
    """One row in place of many that are equal, as those of one negative prompt are."""
    return values[:1] if isinstance(values, Tensor) and bool((values == values[:1]).all()) else values


def _chosen(values: Any, which: Tensor) -> Any:
    if isinstance(values, Tensor):
        return values.expand(len(which), *values.shape[1:]) if len(values) == 1 else values[which.to(values.device)]
    return [values[i if len(values) > 1 else 0] for i in which.tolist()]


def _joined(parts: list[Any], x: Tensor) -> Any:
    if isinstance(parts[0], Tensor):
        return _on(torch.cat(parts), x)
    return [_on(entry, x) for part in parts for entry in part]


def _on(value: Any, x: Tensor) -> Any:
    """The value on the device of x; floating-point numbers of float64 networks are converted."""
    if isinstance(value, Tensor):
        return value.to(x.device, x.dtype if value.is_floating_point() and x.dtype == torch.float64 else value.dtype)
    if isinstance(value, dict):
        return {key: _on(entry, x) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on(entry, x) for entry in value)
    return value


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, number by number."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def len_of(value: Any) -> int:
    """The number of entries; 0 for what has none."""
    return 0 if isinstance(value, Tensor) and not value.ndim else len(value) if hasattr(value, "__len__") else 0


def leaves(roles: Any) -> list[Any]:
    """The roles without the containers that they are in."""
    if isinstance(roles, dict):
        return [leaf for role in roles.values() for leaf in leaves(role)]
    if isinstance(roles, list | tuple):
        return [leaf for role in roles for leaf in leaves(role)]
    return [roles]
