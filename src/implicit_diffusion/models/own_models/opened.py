"""A model of the user's own with what checkpoints have: the same attributes, read in the same places.

DiffusionModel(denoiser, schedule, …)  →  OwnModel(denoiser, scheduler or table, …), a `Pretrained`
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.fingerprints import fingerprint
from implicit_diffusion.frozen import modules_in
from implicit_diffusion.models.decoders import PIXELS_AT_ONCE
from implicit_diffusion.models.families import PipelineFamily
from implicit_diffusion.models.own_models.diffusion_model import DiffusionModel, trial
from implicit_diffusion.models.pretrained import Pretrained
from implicit_diffusion.showing import ShownModule, of_network
from implicit_diffusion.tables.table import ChainTable

OWN = PipelineFamily((), "denoiser", "own network", None)  # no pipeline of diffusers


class ModuleDenoiser(DiffusersDenoiser):
    """A module that is called as u(x, t, **condition), as a denoiser whose network can be adapted and compiled.

    Args:
        model: the module.

    Attributes:
        precision: dtype that its layers compute in, by autocast; None for that of its weights.
        compiled: called in place of `model` if it has been compiled, otherwise None.
    """

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.precision, self.compiled = None, None

    def forward(
        self, x: Float[Tensor, "batch *event"], t: Shaped[Tensor, " batch"], **condition: Any
    ) -> Float[Tensor, "batch *event"]:
        """u(x, t), in the precision of x."""
        call = self.compiled or self.model
        with torch.autocast(x.device.type, dtype=self.precision) if self.precision else nullcontext():
            u: Tensor = call(x, t, **condition)
        return u.to(x.dtype)


class ModuleDecoder(ShownModule):
    """Images of latents, decoded a few at a time; what happens inside is computed again in the backward pass.

    Args:
        decode: (n, *event) → (n, *image); the networks that it holds are frozen.
        image_shape: of one image.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.networks = nn.ModuleList(modules_in(decode)).eval().requires_grad_(False)
        self.__dict__["decode"] = decode  # not registered a second time, where it is a module itself
        self.at_once = max(1, PIXELS_AT_ONCE // torch.Size(image_shape[1:]).numel())

    def _words(self) -> Iterable[str]:
        yield from map(of_network, self.networks)
        yield f"image_shape={self.image_shape}"

    def forward(self, x: Float[Tensor, "n *event"]) -> Float[Tensor, "n *image"]:
        """The images of x, differentiable in x.

        Raises:
            InvalidInputError: the function does not return an image for each state.
        """
        return torch.cat([self._part(part) for part in x.split(self.at_once)])

    def _part(self, x: Tensor) -> Tensor:
        images: Tensor = checkpoint(self.decode, x, use_reentrant=False)
        if images.shape != (len(x), *self.image_shape):
            raise InvalidInputError(
                f"decoder must return shape {(len(x), *self.image_shape)} for {len(x)} states, got "
                f"{tuple(images.shape)}"
            )
        return images


@dataclass(frozen=True, repr=False)
class OwnModel(Pretrained):
    """A model of the user's own, opened by its name.

    Attributes:
        table: of its sampler; None where it has a scheduler.
        image_shape: of one sample as rewards see it.
        folder: that its weights were read from; None where they are those that its factory returned.
    """

    table: ChainTable | None = None
    image_shape: tuple[int, ...] = ()
    folder: Path | None = None

    @property
    def family(self) -> PipelineFamily:
        """None of diffusers' own; the network's name is that of its class."""
        return replace(OWN, network=f"own {type(self.denoiser.model).__name__}")

    @property
    def pipeline(self) -> Any:
        """There is none.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError(f"model: {self.source} is no pipeline of diffusers; sample its chain")


def opened(model: DiffusionModel, source: str, folder: Path | None = None) -> OwnModel:
    """The model with the attributes of a checkpoint; its denoiser is put in evaluation mode.

    Args:
        model: as it was made.
        source: its name.
        folder: that its weights were read from, if they were.
    """
    table = model.schedule if isinstance(model.schedule, ChainTable) else None
    return OwnModel(
        denoiser=ModuleDenoiser(model.denoiser).eval(),
        scheduler=None if table is not None else model.schedule,
        event_shape=model.event_shape,
        source=source,
        num_classes=model.num_classes,
        decoder=None if model.decoder is None else ModuleDecoder(model.decoder, model.image_shape),  # type: ignore[arg-type]
        table=table,
        image_shape=model.image_shape,
        folder=folder,
    )


def check_adapted(model: OwnModel) -> None:
    """Refuse adapters that the network does not call, as `nn.MultiheadAttention` does not call its out_proj.

    Args:
        model: whose network has adapters.

    Raises:
        InvalidInputError: the output does not depend on one of them; the message names its layer.
    """
    denoiser, schedule = model.denoiser, model.scheduler if model.table is None else model.table
    x, t, condition = trial(denoiser, schedule, model.event_shape, model.num_classes)
    adapters = {name: p for name, p in denoiser.model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        slopes = torch.autograd.grad(denoiser(x, t, **condition).sum(), [*adapters.values()], allow_unused=True)
    idle = sorted({name.partition(".lora_")[0] for name, slope in zip(adapters, slopes) if slope is None})
    if idle:
        raise InvalidInputError(
            f"targets: an adapter of {', '.join(idle)} has no effect, since the network uses the layer's weights "
            "without calling the layer; name others"
        )


def weights_digest(network: nn.Module) -> str:
    """The sha256 of all weights and buffers with their names."""
    state = network.state_dict()
    prints = (f"{name} {fingerprint(value)['tensor']}" for name, value in state.items())
    return hashlib.sha256("\n".join(prints).encode()).hexdigest()
