"""Checks of rewards and potentials on a few samples, before any work.

Each value must depend on its own sample alone. Where it does not, as with batch norm in training mode or after
`x - x.mean(0)`, the gradient is a different one, and reported values depend on how many samples are evaluated together.
There are two tests. One is the derivative of a value with respect to the other samples. The other needs no derivatives:
some samples of a batch are exchanged, and the values of the remaining ones must not change. Both batches have the same
shape, so that the same computations are made, and only mixing can make a difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implicit_diffusion.errors import InvalidInputError, NoGradientError

ROUNDING_SHARE = 0.01  # of the values' spread: smaller changes may be rounding in layers of low precision
ALONE = (
    "each value must depend on its own sample alone. Put batch norm into eval mode, and do not use means or ranks "
    "over the batch"
)
REPEATS = 4  # calls on the same samples before a change is put down to mixing: two calls of a random function may agree
NEEDS_NO_SLOPE = "follow its values: on a chain by Surrogate() or ScoreFunction(), on a potential by Single"
BY_TORCH = "write it with torch operations throughout, without .detach(), .numpy(), .item() and torch.no_grad()"
TRIED = 8  # samples, or particles, that are tried for influence on each other
ROUNDINGS = 16  # units in the last place of the largest value: smaller changes may be rounding


class FunctionWarning(UserWarning):
    """A function of samples can be used, but is random, or flat where it was tried."""


class FlatWarning(FunctionWarning):
    """A function of samples has the same value and no slope wherever it was tried."""


@torch.no_grad()
def check_separate(
    what: str,
    value_at: Callable[[Int[Tensor, " n"]], Float[Tensor, " n"]],
    values: Float[Tensor, " n"],
    of: str = "samples",
) -> None:
    """Raise `InvalidInputError` where values depend on samples other than their own; needs four more calls.

    A function that gives the same samples different values at another call is random. Then there is a warning, and no
    other conclusion. Before it is said to mix samples it is called on the same ones again, `REPEATS` times.

    Args:
        what: name of the function in messages.
        value_at: from n sample numbers, some of which may be equal, to the values at these samples.
        values: value_at(0, 1, …, n − 1).
        of: name of the samples in messages.
    """
    n, order = len(values), torch.arange(len(values), device=values.device)
    spread, rounding = values.max() - values.min(), ROUNDINGS * torch.finfo(values.dtype).eps * values.abs().max()
    even, odd, best = order[::2], order[1::2], values.argmax()[None]

    def noise_of_a_call() -> Tensor:
        return (value_at(order) - values).abs().max()

    def change_at(kept: Tensor, others: Tensor) -> Tensor:
        index = order.clone()
        index[others] = kept.flip(0)[torch.arange(len(others), device=order.device) % len(kept)]
        return (value_at(index) - values)[kept].abs().max()

    noise = noise_of_a_call()
    if noise <= ROUNDING_SHARE * spread + rounding:
        exchanges = ((even, odd), (odd, even), (best, order)) if n > 1 else ()
        allowed = ROUNDING_SHARE * spread + rounding + 10 * noise
        change = next((change for pair in exchanges if not (change := change_at(*pair)) <= allowed), None)
        if change is None:
            return
        calls = (noise_of_a_call() for _ in range(REPEATS))
        larger = next((other for other in calls if not other <= ROUNDING_SHARE * spread + rounding), None)
        if larger is None:
            raise InvalidInputError(
                f"{what} mixes {of}: in another batch, values of the same ones differ by {float(change):.2g}; {ALONE}"
            )
        noise = larger
    warnings.warn(
        f"{what} is random: it gives the same samples values that differ by up to {float(noise):.2g}. Switch off "
        "dropout and random augmentations in it; otherwise its noise is in every gradient, and runs do not repeat",
        FunctionWarning,
        stacklevel=2,
    )


def check_own_gradient(what: str, gradient: Float[Tensor, "n *event"], of: str = "samples") -> None:
    """Raise `InvalidInputError` where the first of n values, whose gradient this is, depends on the other samples."""
    if not (gradient[1:] == 0).all():
        raise InvalidInputError(f"{what} mixes {of}: the value of the first depends on others; {ALONE}")


def check_slope(
    what: str, gradient: Float[Tensor, "n *event"], values: Float[Tensor, "..."], *, warn: bool = True
) -> None:
    """Refuse a function whose values differ although its gradient is zero at all samples: it cannot be followed.

    A function that is constant over these samples may have a slope elsewhere; then there is a warning, if `warn` is
    set.

    Raises:
        NoGradientError: all derivatives are 0, though the values differ.
    """
    if gradient.any():
        return
    if bool(values.max() > values.min()):
        raise NoGradientError(
            f"{what} has no slope: its gradient is 0 at all {len(gradient)} samples tried, though their values differ. "
            f"It rounds, compares or counts; avoid that, or {NEEDS_NO_SLOPE}"
        )
    if warn:
        warnings.warn(
            f"{what} is flat: the same value without a slope at all {len(gradient)} samples tried. Training "
            "follows it only where it has a slope",
            FlatWarning,
            stacklevel=2,
        )
