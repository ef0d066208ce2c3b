"""The state of a pretraining: the network, its average, the optimizer, and the generators of all random numbers.

Images, times and noise come from a generator of the training's own. Dropout draws from the global generator of its
device, whose state is kept as well; the training runs inside a fork of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from implicit_diffusion.commands.pretrain.images.loading import Images
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.extras import require
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.files.fingerprints import fingerprint
from implicit_diffusion.files.foreign import consistent, of_another
from implicit_diffusion.files.states import check_finite
from implicit_diffusion.processes import mean, sum_gradients
from implicit_diffusion.runs import RunDirectory
from implicit_diffusion.runs.metrics import restore_metrics
from implicit_diffusion.showing import Shown

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel


@dataclass(frozen=True)
class Descent:
    """How the loss is minimised.

    Args:
        steps: of AdamW.
        lr: learning rate after a linear warm-up over 200 steps, at most a tenth of all; it then decays along a cosine.
        ema_decay: of the moving average of the weights.
        seed: of the weights, dropout, images, times and noise.
    """

    steps: int
    lr: float
    ema_decay: float
    seed: int


@dataclass(repr=False)
class Pretraining(Shown):
    """What `begin_pretraining` makes and every step changes.

    Args:
        unet: in training mode, on its device.
        scheduler: the noise schedule.
        average: of the weights.
        optimizer, schedule: of the weights, and of its learning rate.
        generator: of images, times and noise.
        step: optimizer steps so far.
        seconds: that they took.
        losses: since the last line of the metrics.
        lines: of the metrics so far.
    """

    unet: UNet2DModel
    scheduler: DDPMScheduler
    average: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    lines: int = 0

    def descend(self, loss: Tensor) -> None:
        """One step of optimizer, schedule and average, down the gradient of `loss`, averaged over processes.

        Raises:
            NonFiniteError: the loss or its gradient is NaN or infinite; the weights are not touched.
        """
        loss = mean(loss)
        if not loss.isfinite():
            raise NonFiniteError(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        sum_gradients([p.grad for p in self.unet.parameters() if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        if not norm.isfinite():
            raise NonFiniteError(f"the norm of the gradient is {norm.item()}")
        self.optimizer.step()
        self.schedule.step()
        self.average.step(self.unet.parameters())
        self.losses.append(loss.detach())
        self.step += 1

    @contextmanager
    def averaged(self) -> Iterator[UNet2DModel]:
        """The network, with its averaged weights inside the block."""
        self.average.store(self.unet.parameters())
        self.average.copy_to(self.unet.parameters())
        try:
            yield self.unet
        finally:
            self.average.restore(self.unet.parameters())

    def save(self, directory: RunDirectory, images: list[str], keep: int = KEEP) -> None:
        """Write the state of this step into checkpoint/.

        Args:
            directory: of the run.
            images: digests of what is trained on and held out.
            keep: number of checkpoints that stay.

        Raises:
            NonFiniteError: NaN or infinity in weights, moments or average; nothing is written.
            StorageError: it cannot be written; those before are unchanged.
        """
        state: dict[str, Any] = {
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        check_finite(state)
        state |= {
            "schedule": self.schedule.state_dict(),
            "generators": [generator.get_state() for generator in self._generators()],
            "step": self.step,
            "seconds": self.seconds,
            "losses": list(self.losses),
            "lines": self.lines,
            "images": images,
        }
        directory.checkpoints.save(self.step, {"pretraining": state}, keep)

    def restore(self, directory: RunDirectory, images: list[str]) -> None:
        """Continue from checkpoint/, and drop the lines of metrics.jsonl after it; a note says which lines are missing.

        Raises:
            InvalidInputError: all checkpoints are damaged; or the newest is one of another network or of other images.
        """
        number, state = directory.read_checkpoint()
        with consistent(directory.checkpoints.path(number), of_another):
            state = state["pretraining"]
            if state["images"] != images:
                raise InvalidInputError(
                    f"the images are not those that {directory.path} began with; bring these back, or begin a new run"
                )
            self.unet.load_state_dict(state["unet"])
            self.average.load_state_dict(state["average"])
            self.average.to(device=self.unet.device)
            self.schedule.load_state_dict(state["schedule"])
            self.optimizer.load_state_dict(state["optimizer"])
            for generator, saved in zip(self._generators(), state["generators"], strict=True):
                generator.set_state(saved)
            self.step, self.seconds, self.lines = state["step"], state["seconds"], state["lines"]
            self.losses = [loss.to(self.unet.device) for loss in state["losses"]]
        restore_metrics(directory, self.step, self.lines)

    def _generators(self) -> list[torch.Generator]:
        """The training's own, and the global ones of the CPU and of the device."""
        device, on_device = self.unet.device, []
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            on_device = [torch.cuda.default_generators[index]]
        return [self.generator, torch.default_generator, *on_device]


def begin_pretraining(descent: Descent, unet: UNet2DModel, scheduler: DDPMScheduler) -> Pretraining:
    """The state before the first step."""
    require("diffusers")
    from diffusers.training_utils import EMAModel

    average = EMAModel(unet.parameters(), decay=descent.ema_decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=descent.lr, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(200, max(1, descent.steps // 10))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, descent.steps - warmup)),
        ],
        [warmup],
    )
    generator = torch.Generator().manual_seed(descent.seed)
    return Pretraining(unet, scheduler, average, optimizer, schedule, generator)


def digests(data: Images) -> list[str]:
    """Digests of all pixels to train on, and of all that are held out."""
    return [fingerprint(part)["tensor"] for part in (data.train, data.held_out)]
