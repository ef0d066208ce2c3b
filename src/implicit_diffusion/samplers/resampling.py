"""Resampling: trade weights for copies."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def systematic(log_weights: Float[Tensor, " n"], uniform: Float[Tensor, ""]) -> Int[Tensor, " n"]:
    """Systematic resampling: n indices, index i about n w_i times, from a single U(0, 1) draw.

    The points (j + 1 − u)/n, j = 0..n−1, fall into the cells of the weights' cumulative sum (Kitagawa, 1996); every
    particle is chosen ⌊n w_i⌋ or ⌈n w_i⌉ times. Being in (0, 1], with cells closed to the right, they never fall on a
    particle without weight.
    """
    n = len(log_weights)
    edges = torch.softmax(log_weights, 0).cumsum(0)
    points = (torch.arange(n, device=edges.device, dtype=edges.dtype) + (1 - uniform)) / n
    return torch.searchsorted(edges / edges[-1], points).clamp(max=n - 1)
