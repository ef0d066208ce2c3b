"""The network that is pretrained, a U-Net after the size of the images, and its noise schedule.

The U-Net has levels until the shorter side has 4 to 7 pixels, at most five; attention at levels of 9 to 16 pixels below
the first; two residual blocks per level, one up to 16 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from implicit_diffusion.extras import require
from implicit_diffusion.processes import count, share

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel


@dataclass(frozen=True)
class Network:
    """What is built.

    Args:
        event_shape: (channels, height, width) of the images.
        widths: of the levels, multiples of 8; `widths_for` has the default.
        classes: number of classes; 0 for a model without.
        dropout: rate in the residual blocks.
        train_timesteps: T of the noise schedule.
        beta_schedule: its name in diffusers.
        prediction_type: what the network predicts, in diffusers' words.
    """

    event_shape: tuple[int, int, int]
    widths: tuple[int, ...]
    classes: int
    dropout: float
    train_timesteps: int
    beta_schedule: str
    prediction_type: str

    def build(self) -> tuple[UNet2DModel, DDPMScheduler]:
        """The untrained network, with weights from torch's global generator, and the scheduler."""
        require("diffusers")
        from diffusers import UNet2DModel

        channels, height, width = self.event_shape
        shorter = [min(height, width) >> level for level in range(len(self.widths))]
        attends = [level > 0 and 9 <= side <= 16 for level, side in enumerate(shorter)]
        unet = UNet2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=self.widths,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            layers_per_block=1 if shorter[0] <= 16 else 2,
            norm_num_groups=8,
            add_attention=False,
            dropout=self.dropout,
            num_class_embeds=self.classes or None,
        )
        shared_dropout(unet)
        return unet, noise_schedule(self.train_timesteps, self.beta_schedule, self.prediction_type)


class Dropout(nn.Dropout):
    """Dropout whose mask is, in each process, its rows of a mask that all of them draw, as they draw all noise."""

    def forward(self, x: Tensor) -> Tensor:
        """The tensor with entries set to zero at random in training mode, and the others scaled."""
        if count() == 1 or not self.training or self.p == 0:
            return super().forward(x)
        return x * share(super().forward(x.new_ones((count() * len(x), *x.shape[1:]))))


def shared_dropout(network: nn.Module) -> None:
    """Let all dropout of a network be one that processes can share."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))


def noise_schedule(train_timesteps: int, beta_schedule: str, prediction_type: str) -> DDPMScheduler:
    """The scheduler that the model is trained for; without clipping, so that its chains are affine in the network."""
    require("diffusers")
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=train_timesteps,
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        variance_type="fixed_small",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def levels_for(height: int, width: int) -> int:
    """Levels of the U-Net: as many as leave at least 4 pixels of the shorter side at the lowest, 2 to 5."""
    return max(2, min(5, min(height, width).bit_length() - 2))


def widths_for(height: int, width: int) -> tuple[int, ...]:
    """Channels of the levels: w, 2w, 2w, …, with w = 24 up to 8 pixels of the shorter side, 32 up to 16, else 64.

    One level less than `levels_for` where the longer side cannot be halved as often.
    """
    shorter, levels = min(height, width), levels_for(height, width)
    while height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        levels -= 1
    w = 24 if shorter <= 8 else 32 if shorter <= 16 else 64
    return (w,) + (2 * w,) * (levels - 1)


def fitting_size(height: int, width: int, levels: int | None = None) -> tuple[int, int]:
    """The nearest height and width that `levels` levels (by default those of `levels_for`) can halve."""
    multiple = 2 ** ((levels or levels_for(height, width)) - 1)
    return max(multiple, multiple * round(height / multiple)), max(multiple, multiple * round(width / multiple))
