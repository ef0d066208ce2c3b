"""Any network of diffusers as a denoiser u(x, t, **condition).

States, adjoints and path costs stay in the chain's precision: only the network runs in a lower precision, by autocast,
and its output is returned in the precision of x.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_type
from implicit_diffusion.showing import ShownModule, of_network


class DiffusersDenoiser(ShownModule):
    """A diffusers model as a denoiser u(x, t).

    Args:
        model: called as model(x, timestep=t, return_dict=False, **condition); its first result is u; where that is a
            mean and a variance (twice the channels of x), u is the mean.

    Attributes:
        precision: dtype that the network's layers compute in, by autocast; None for that of its weights.
        compiled: called in place of `model` if it has been compiled, otherwise None.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_type("model", model, nn.Module, "use a diffusers model")
        try:
            inspect.signature(model.forward).bind_partial(None, timestep=None, return_dict=False)
        except TypeError as error:
            raise InvalidInputError(
                f"model must accept the call model(x, timestep=t, return_dict=False), as diffusers models do: {error}"
            ) from error
        self.model = model
        self.precision: torch.dtype | None = None
        self.compiled: Callable[..., Any] | None = None

    def _words(self) -> Iterable[str]:
        yield of_network(self.model)
        if self.precision is not None:
            yield f"precision={self.precision}"
        if self.compiled is not None:
            yield "compiled"

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Any
    ) -> Float[Tensor, "batch *event"]:
        """u(x, t) with one time per sample; `condition`, such as class labels, is passed on to the model."""
        call = self.compiled or self.model
        with torch.autocast(x.device.type, dtype=self.precision) if self.precision else nullcontext():
            u = call(x, timestep=t, return_dict=False, **condition)[0]
        channels = x.shape[1]
        return (u if u.shape[1] == channels else u[:, :channels]).to(x.dtype)


def unwrapped(denoiser: nn.Module) -> nn.Module:
    """The denoiser inside guidance and embeddings, at the end of the attributes `.denoiser`; itself if it has none."""
    within = getattr(denoiser, "denoiser", None)
    return unwrapped(within) if isinstance(within, nn.Module) else denoiser
