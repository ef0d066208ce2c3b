r"""Denoising score matching, step by step, with a state to continue from.

Vincent, *A Connection Between Score Matching and Denoising Autoencoders*, 2011; Ho et al., *Denoising Diffusion
Probabilistic Models*, arXiv 2006.11239, algorithm 1. On the variance-preserving path

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) xi,         t uniform in 0..T-1,    xi ~ N(0, I),

with the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, eq. 17) and the network predicting the velocity
(Salimans and Ho, arXiv 2202.00512, section 4)

    v_t = sqrt(abar_t) xi - sqrt(1 - abar_t) x.

The velocity suits short chains: x itself is recovered without a division by sqrt(abar_t), which is nearly zero at the
first step of a chain with trailing spacing. The loss is E|u_theta(x_t, t) - v_t|^2; the weights kept are their
exponential moving average. Dropout keeps the network from memorising the 1437 training digits.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from implicit_diffusion.commands.pretrain.images.loading import Images
from implicit_diffusion.commands.pretrain.loss import image_losses
from implicit_diffusion.commands.pretrain.network import Network
from implicit_diffusion.commands.pretrain.samples import sample_images
from implicit_diffusion.commands.pretrain.state import Descent, Pretraining, begin_pretraining, digests
from implicit_diffusion.commands.shared.pictures import PICTURED, image_pixels
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.files.checkpoints import KEEP
from implicit_diffusion.models.pretrained import save_pipeline
from implicit_diffusion.processes import sharing
from implicit_diffusion.runs import RunDirectory, graceful, progress
from implicit_diffusion.runs.callbacks.track import due
from implicit_diffusion.runs.clock import part

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

SAVE_EVERY, CHECKPOINT_EVERY = 600.0, 60.0  # seconds, between two models and between two states
LINES = 1000  # of metrics.jsonl, at most


@dataclass(frozen=True)
class Training:
    """One pretraining.

    Args:
        network: what is trained.
        descent: how many steps, and how.
        batch: images per step.
        title: what the images are called, for the model card.
        device: where the network is.
        one_thread: whether sums are made on one thread: how many share a sum decides its rounding.
        shown_steps: of the chains whose samples trackers show.
        check_pixels: whether a state that continues must be one of the same pixels.
        keep: number of checkpoints that stay.
        seconds: after which no step is made any more, those before an interruption included.
    """

    network: Network
    descent: Descent
    batch: int
    title: str
    device: torch.device
    one_thread: bool
    shown_steps: int
    check_pixels: bool
    keep: int = KEEP
    seconds: float = math.inf


def train(training: Training, data: Images, directory: RunDirectory | None = None) -> tuple[UNet2DModel, DDPMScheduler]:
    """Train and return the averaged network, in eval mode on its device, and its scheduler.

    Images, times and noise come from an explicit generator. Weight initialisation and dropout use the global one, which
    is seeded inside a fork: the caller's random state is afterwards as it was before.

    Args:
        training: what to do.
        data: the images.
        directory: gets the model, up to a thousand lines of metrics.jsonl, and the state to continue from; where it
            holds such a state, training continues from there, bit for bit. None leaves no trace.

    Raises:
        NonFiniteError: the loss or its gradient is NaN or infinite; the update is not done.
        InvalidInputError: a state that does not fit, or one of other images.
        KeyboardInterrupt: Ctrl-C; the model so far and the state are saved.
    """
    device, threads = training.device, torch.get_num_threads()
    if training.one_thread:
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            with part("loading"):
                torch.manual_seed(training.descent.seed)
                unet, scheduler = training.network.build()
                unet.to(device).train()
                state = begin_pretraining(training.descent, unet, scheduler)
                images = digests(data) if training.check_pixels else []
                if directory is not None and directory.has_state:
                    state.restore(directory, images)
                if directory is not None:
                    state.save(directory, images, training.keep)
            _train(training, data, images, state, directory)
            state.average.copy_to(unet.parameters())
            return unet.eval(), scheduler
    finally:
        torch.set_num_threads(threads)


@part("training")
def _train(
    training: Training, data: Images, images: list[str], state: Pretraining, directory: RunDirectory | None
) -> None:
    """Make the steps that are left."""
    steps = training.descent.steps

    @part("saving")
    def save_model() -> None:
        if directory is not None:
            with state.averaged() as unet, writing(directory.model):
                after = f"after {state.step} of {steps} steps of pretraining"
                card = f"# A diffusion model of {training.title}, {after}"
                save_pipeline(directory.model, DiffusersDenoiser(unet), state.scheduler, card)

    @part("saving")
    def checkpoint() -> None:
        if directory is not None:
            state.save(directory, images, training.keep)

    @part("pictures")
    def show() -> None:
        """Show samples of the average so far, always from the same noise."""
        if directory is not None and directory.tracking.wanted:
            of_network = training.network.event_shape, training.network.classes
            with state.averaged() as unet:
                x = sample_images(
                    unet, state.scheduler, training.shown_steps, PICTURED, training.descent.seed, *of_network
                )
            directory.tracking.picture(state.step, "samples", image_pixels(x, low=-1, high=1))

    every, saved_at = -(-steps // LINES), state.step
    last_model = last_checkpoint = time.monotonic()
    start = last_model - state.seconds
    if state.step == 0:
        show()
    late = state.seconds >= training.seconds
    with graceful() as stop, progress(steps, "pretraining", state.step) as bar:
        while state.step < steps and not late:
            rows = torch.randint(len(data.train), (training.batch,), generator=state.generator)
            x, labels = data.train[rows], None if data.train_labels is None else data.train_labels[rows]
            try:
                with sharing():
                    state.descend(image_losses(state.unet, state.scheduler, x, state.generator, labels).mean())
            except NonFiniteError as error:
                kept = "" if directory is None else f"; the state of step {saved_at} is in {directory.checkpoint}"
                where = f"at step {state.step + 1} of {steps}"
                raise NonFiniteError(f"{error} {where}; try a smaller lr{kept}") from error
            bar.update({"loss": state.losses[-1]})
            step, state.seconds = state.step, time.monotonic() - start
            save, keep, late = stop.agree(
                time.monotonic() - last_model > SAVE_EVERY,
                time.monotonic() - last_checkpoint > CHECKPOINT_EVERY,
                state.seconds >= training.seconds,
            )
            if step % every == 0 or step == steps or late:
                if due(step // every, steps // every):
                    show()
                if directory is not None:
                    mean = torch.stack(state.losses).mean()
                    directory.append_metrics({"updates": step, "loss": mean, "seconds": state.seconds})
                state.lines += 1
                state.losses.clear()
            if save:
                save_model()
                last_model = time.monotonic()
            stopping = stop.requested
            if stopping or step == steps or keep or late:
                checkpoint()
                last_checkpoint, saved_at = time.monotonic(), step
            if stopping:
                break
    save_model()
    stop.agree()
    if stop.requested:  # also in the last step, or while it was saved
        kept = "" if directory is None else f"; the average of its weights so far is {directory.model}"
        raise KeyboardInterrupt(f"interrupted at step {state.step} of {steps}{kept}")
