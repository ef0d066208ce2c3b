"""Data that an objective compares particles with: a tensor of their event shape, dtype and device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, check_type
from implicit_diffusion.particles import Particles
from implicit_diffusion.rounding import at_least_single


def checked(data: Any, least: int = 1) -> Tensor:
    """The data with shape (m, *event), in single precision at least, as particles are.

    Args:
        data: draws from a reference, with shape (m, *event).
        least: how many there must be.

    Raises:
        InvalidInputError: something other than a tensor of floating-point numbers, fewer than `least` of them, NaN or
            infinity.
    """
    check_type("data", data, Tensor, "use torch.as_tensor(data)")
    if data.ndim < 2 or not data.is_floating_point() or data.layout is not torch.strided or data.is_meta:
        given = f"{data.dtype} with shape {tuple(data.shape)}"
        raise InvalidInputError(f"data must be floating-point numbers with shape (m, *event), got {given}")
    if len(data) < least or not data.numel() or not data.isfinite().all():
        number = {1: "one", 2: "two"}[least]
        raise InvalidInputError(f"data must be finite and at least {number}, got shape {tuple(data.shape)}")
    return data.detach().to(at_least_single(data.dtype))


def check_fits(name: str, data: Float[Tensor, "m *data"], x: Float[Tensor, "n *event"]) -> None:
    """Raise `InvalidInputError` where data and particles x differ in event shape, dtype or device."""
    if data.shape[1:] != x.shape[1:]:
        raise InvalidInputError(
            f"{name}: data have event shape {tuple(data.shape[1:])}, particles {tuple(x.shape[1:])}; they must agree"
        )
    if (data.dtype, data.device) != (x.dtype, x.device):
        raise InvalidInputError(
            f"{name}: data are {data.dtype} on {data.device}, particles {x.dtype} on {x.device}; use data.to(x)"
        )


def fitting(name: str, data: Float[Tensor, "m *data"], particles: Particles) -> Particles:
    """The particles in single precision at least, after a check that they fit the data."""
    x, logs = particles.x, particles.log_weights
    x = x.to(at_least_single(x.dtype)) if x.is_floating_point() else x
    check_fits(name, data, x)
    logs = None if logs is None else logs.to(at_least_single(logs.dtype))
    return dataclasses.replace(particles, x=x, log_weights=logs)
