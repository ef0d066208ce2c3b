"""Is a function of samples what a reward or a potential has to be? Tried on a few of them, before any work.

Each value must depend on its own sample alone. Where it does not, as under batch norm in training mode or after
`x - x.mean(0)`, its gradient is another one, and what is reported depends on how many samples happen to be judged
together. The derivative of one value in the others' samples tells, and so do the values of samples that stay while
others in the same batch are exchanged, which needs no derivative: both batches have one shape, so that they are
computed alike, and nothing but mixing sets them apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError

SHARE = 0.01  # of the values' spread that a change counts from; below lies what layers of few bits round together
ALONE = (
    "each value must depend on its own sample alone. Put batch norm into eval mode, and leave means and ranks over the "
    "batch out"
)
BY_TORCH = "write it by torch operations throughout, without .detach(), .numpy(), .item() and torch.no_grad()"
ROUNDINGS = 16  # and of their size, in units of the last place


class FunctionWarning(UserWarning):
    """A function of samples can be used, but is random, or flat where it was tried."""


@torch.no_grad()
def check_separate(
    what: str,
    judge: Callable[[Int[Tensor, " n"]], Float[Tensor, " n"]],
    values: Float[Tensor, " n"],
    of: str = "samples",
) -> None:
    """Raise `InvalidInputError` where values depend on other samples than their own, by four more calls.

    A function that gives the same samples other values at a second call is random. That is said as a warning, and
    nothing is concluded from its values.

    Args:
        what: the function is called in messages.
        judge: values at the samples with these numbers, n of them, some more than once.
        values: judge(0, 1, …, n − 1).
        of: what the samples are called.
    """
    n, order = len(values), torch.arange(len(values), device=values.device)
    spread, rounding = values.max() - values.min(), ROUNDINGS * torch.finfo(values.dtype).eps * values.abs().max()
    noise = (judge(order) - values).abs().max()
    if not noise <= SHARE * spread + rounding:
        warnings.warn(
            f"{what} is random: it gives the same samples values that differ by up to {float(noise):.2g}. Switch "
            "dropout and random augmentations off in it, or its noise is in every gradient, and runs may not repeat",
            FunctionWarning,
            stacklevel=2,
        )
        return
    even, odd, best = order[::2], order[1::2], values.argmax()[None]
    for kept, others in ((even, odd), (odd, even), (best, order)) if n > 1 else ():
        index = order.clone()
        index[others] = kept.flip(0)[torch.arange(len(others), device=order.device) % len(kept)]
        change = (judge(index) - values)[kept].abs().max()
        if not change <= SHARE * spread + rounding + 10 * noise:
            raise InvalidInputError(
                f"{what} mixes {of}: the same ones beside others get values that differ by {float(change):.2g}; {ALONE}"
            )


def check_own_gradient(what: str, gradient: Float[Tensor, "n *event"], of: str = "samples") -> None:
    """Raise `InvalidInputError` where the first of n values, whose gradient this is, depends on others' samples."""
    if not (gradient[1:] == 0).all():
        raise InvalidInputError(f"{what} mixes {of}: the value of the first depends on others; {ALONE}")


def check_slope(
    what: str, gradient: Float[Tensor, "n *event"], values: Float[Tensor, "..."], *, warn: bool = True
) -> None:
    """Refuse a function that varies over samples without a slope at any: nothing could follow it.

    One that is flat at all of them may have a slope elsewhere, which is said as a warning where `warn` asks for it.

    Raises:
        InvalidInputError: all derivatives are 0, though the values differ.
    """
    if gradient.any():
        return
    if bool(values.max() > values.min()):
        raise InvalidInputError(
            f"{what} has no slope: its gradient is 0 at all {len(gradient)} samples tried, though their values differ. "
            "It rounds, compares or counts; leave that out, or train a potential by Single, which needs no slope"
        )
    if warn:
        warnings.warn(
            f"{what} is flat: the same value without a slope at all {len(gradient)} samples tried. Training follows it "
            "only where it has one",
            FunctionWarning,
            stacklevel=2,
        )
