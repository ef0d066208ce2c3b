"""From latents to images: the decoder of a latent diffusion model, inside the reward.

A latent pipeline runs its chain on z and shows x = D(z/σ + μ), with the scaling σ of its autoencoder, and its shift μ
where the pipeline is one that adds it. StableDiffusion3Pipeline does; StableDiffusionPipeline and DiTPipeline show
D(z/σ) whatever the autoencoder's config says, and none of the three reads latents_mean and latents_std. What a reward
judges is what the pipeline shows.

The reward is a function of images, so the chain's terminal objective is R ∘ D, differentiated through the decoder,
whose weights are frozen. A decoder's activations dwarf those of the rest: it works on a few samples at a time and
does not keep what happens inside, to compute it again in the backward pass (gradient checkpointing).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.showing import ShownModule, of_network

PIXELS_AT_ONCE = 512 * 512


class Decoder(ShownModule):
    """Images D(z/σ + μ) of latents z, nominally in [−1, 1].

    Args:
        vae: an `AutoencoderKL` of diffusers; frozen here.
        shifted: whether the pipeline adds the shift_factor μ of its config; otherwise μ = 0.

    Raises:
        InvalidInputError: its config has no positive scaling_factor, or lacks a shift_factor that its pipeline adds.
    """

    def __init__(self, vae: Any, *, shifted: bool = False) -> None:
        super().__init__()
        scaling, shift = vae.config.get("scaling_factor"), vae.config.get("shift_factor") if shifted else 0.0
        if not _finite(scaling) or not scaling > 0:
            raise InvalidInputError(
                f"model: the autoencoder's scaling_factor is {scaling}, so its latents have no scale; set it in "
                "vae/config.json (0.18215 for Stable Diffusion 1)"
            )
        if not _finite(shift):
            raise InvalidInputError(
                f"model: the autoencoder's shift_factor is {shift}, and its pipeline adds it to the latents; set it in "
                "vae/config.json (0.0609 for Stable Diffusion 3)"
            )
        self.vae = vae.eval().requires_grad_(False)
        self.scaling, self.shift = float(scaling), float(shift)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent, each way

    def _words(self) -> Iterable[str]:
        return (of_network(self.vae),)

    def forward(self, z: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n colours high wide"]:
        """x, differentiable in z."""
        parts = z.split(self.largest_piece(len(z), z[0]))
        return torch.cat([checkpoint(self.decode, part, use_reentrant=False) for part in parts])

    def largest_piece(self, count: int, z: Float[Tensor, "channels height width"]) -> int:
        """How many of `count` samples such as z are decoded together."""
        return max(1, min(count, PIXELS_AT_ONCE // (z.shape[1] * z.shape[2] * self.factor**2)))

    def decode(self, z: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n colours high wide"]:
        """The images of all z together, where autograd keeps what happens inside."""
        arguments, options = self.given_to_autoencoder(z)
        images: Tensor = self.vae.decode(*arguments, **options)[0]
        return images

    def given_to_autoencoder(
        self, z: Float[Tensor, "n channels height width"]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What its autoencoder decodes: z/σ + μ."""
        return (z / self.scaling + self.shift,), {"return_dict": False}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_latents(decoder: Decoder, event_shape: tuple[int, ...], source: str) -> None:
    """Decode a latent; raise `InvalidInputError` where the decoder does not work on the network's latents."""
    expected, channels = decoder.vae.config.latent_channels, event_shape[0]
    if expected != channels:
        raise InvalidInputError(
            f"model: the autoencoder of {source!r} has latents of {expected} channels, but its network works on "
            f"{channels}; they belong to different models"
        )
    images = decoder(torch.zeros(1, *event_shape, device=decoder.vae.device))
    height, width = (decoder.factor * side for side in event_shape[1:])
    if images.ndim != 4 or images.shape[2:] != (height, width):
        raise ValueError(f"it decodes latents {event_shape} to images {tuple(images.shape)}, not {height} by {width}")
