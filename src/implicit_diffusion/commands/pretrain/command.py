r"""Pretrain a diffusion model: on the real handwritten digits (the model that ships with this package), or on images.

Denoising score matching (Vincent, *A Connection Between Score Matching and Denoising Autoencoders*, 2011; Ho et al.,
*Denoising Diffusion Probabilistic Models*, arXiv 2006.11239, algorithm 1) on the variance-preserving path

    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) xi,         t uniform in 0..T-1,    xi ~ N(0, I),

with the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, eq. 17) and the network predicting the velocity
(Salimans and Ho, arXiv 2202.00512, section 4)

    v_t = sqrt(abar_t) xi - sqrt(1 - abar_t) x.

The velocity suits short chains: x itself is recovered without a division by sqrt(abar_t), which is nearly zero at the
first step of a chain with trailing spacing. The loss is E|u_theta(x_t, t) - v_t|^2; the weights kept are their
exponential moving average. Dropout keeps the network from learning the 1437 training digits by heart.

The U-Net follows the size of the images (`implicit_diffusion.commands.pretrain.data`): levels until the shorter side
has 4 to 7 pixels, at most five; attention at levels of 9 to 16 pixels below the first; two residual blocks per level,
one up to 16 pixels.
"""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from implicit_diffusion import digits
from implicit_diffusion.commands.pretrain import digits_card, image_classes, images_card
from implicit_diffusion.commands.pretrain.config import Config, noise_schedule
from implicit_diffusion.commands.pretrain.data import Images, load_images, widths_for
from implicit_diffusion.commands.pretrain.loss import image_losses, judged_losses
from implicit_diffusion.commands.pretrain.samples import plot, sampled
from implicit_diffusion.commands.pretrain.state import Pretraining, begin, digests
from implicit_diffusion.commands.shared.inputs import absolute, inputs, record_inputs
from implicit_diffusion.errors import NonFiniteError
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.models.pretrained import DiffusersDenoiser, load_pretrained, save_pipeline
from implicit_diffusion.runs import RunDirectory, clock, graceful, progress
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.runs.provenance import is_recorded

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

SAVE_EVERY, CHECKPOINT_EVERY = 600.0, 60.0  # seconds, between two models and between two states
LINES = 1000  # of metrics.jsonl, at most


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """Train, save and judge: `model/` (a diffusers folder), `summary.json` and `figures/samples.png` in `config.out`.

    The model is saved before it is judged, and every ten minutes while it is trained; the state to go on from every
    minute.

    Args:
        config: see there.
        directory: of an interrupted run to go on with; None begins a new one.

    Returns:
        The summary: the config, the number of parameters, the losses on training and held-out images and the seconds
        of the training; of digits also the quality of the samples per chain length and the classifiers' held-out
        accuracy.

    Raises:
        InvalidInputError: data that cannot be had, a setting out of range, or an `out` that is not empty.
        KeyboardInterrupt: Ctrl-C; `resume` goes on, and the average so far is saved.
    """
    config.check()
    begun = directory is not None
    out = directory.path if directory else config.out or Path(f"runs/pretrain-{Path(config.data).name}")
    config, directory = absolute(replace(config, out=out)), RunDirectory(out.absolute())
    with directory.held(), clock.run():
        if not begun:
            directory.check_start(Config)
        clock.keep(directory.path)
        rests_on, data = inputs(config), _load(config)
        config = replace(config, size=data.event_shape[1:], channels=config.channels or _widths(data.event_shape))
        if not begun:
            directory.start(config)
        if not (begun and is_recorded(directory)):
            record_inputs(directory, config, rests_on, device=_device(config))
        with directory.resumable():
            return _finish(config, data, *train(config, data, directory), directory)


def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the samples of a finished run again; returns its summary.

    Raises:
        InvalidInputError: images or a model that are no longer there.
    """
    summary = json.loads((directory.path / "summary.json").read_text(encoding="utf-8"))
    config = summary["config"]
    data = load_images(
        config["data"], tuple(config["size"]), len(config["channels"]), classes=config.get("classes", False)
    )
    pretrained = load_pretrained(directory.model)
    unet = pretrained.denoiser.model
    count = config["samples"] if config["data"] == "digits" else image_classes.to_draw(len(data.classes))
    shape, classes = data.event_shape, len(data.classes)
    drawn = sampled(config["chains"], unet, pretrained.scheduler, count, config["seed"], shape, classes)
    plot(data, drawn, directory)
    print(f"figures   {directory.figure('samples')}")
    return dict(summary)


@part("judging")
def _finish(
    config: Config, data: Images, unet: "UNet2DModel", scheduler: "DDPMScheduler", directory: RunDirectory
) -> dict[str, Any]:
    """Judge, save, draw, and write the summary at the very end: what is interrupted before it is done once more."""
    count = config.samples if config.data == "digits" else image_classes.to_draw(len(data.classes))
    drawn = sampled(config.chains, unet, scheduler, count, config.seed, data.event_shape, len(data.classes))
    summary: dict[str, Any] = {
        "config": asdict(config) | {"out": str(config.out)},
        "images": {
            "train": len(data.train),
            "held_out": len(data.held_out),
            "event_shape": data.event_shape,
            "left_out": data.left_out,
            "classes": data.classes,
        },
        "parameters": sum(p.numel() for p in unet.parameters()),
        **judged_losses(unet, scheduler, data),
        "seconds": max((line["seconds"] for line in directory.read_metrics()), default=0.0),
    }
    if config.data == "digits":
        summary["quality"] = {str(n): asdict(digits.judge_samples(x)) for n, x in drawn.items()}
        summary["classifier_accuracy"] = digits.accuracy(digits.load_classifier())
        summary["judge_accuracy"] = digits.accuracy(digits.fit_judge())
    card = digits_card.model_card(summary) if config.data == "digits" else images_card.model_card(summary)
    with part("saving"), writing(directory.model):
        save_pipeline(directory.model, DiffusersDenoiser(unet), scheduler, card)
    plot(data, drawn, directory)
    directory.write_summary(summary)  # the last file: with it, the run is finished
    print(f"cost      {clock.in_words(clock.seconds(directory.path))}; {config.steps} steps of {config.batch} images")
    print(f"model     {directory.model}")
    return summary


@part("loading")
def _load(config: Config) -> Images:
    levels = len(config.channels) if config.channels else None
    return load_images(config.data, config.size, levels, classes=config.classes)


def _device(config: Config) -> torch.device:
    return find_device(config.device or ("cpu" if config.data == "digits" else "auto"))


def _widths(event_shape: tuple[int, int, int]) -> tuple[int, ...]:
    return widths_for(*event_shape[1:])


def build(
    config: Config, event_shape: tuple[int, int, int] = digits.EVENT_SHAPE, classes: int = 0
) -> "tuple[UNet2DModel, DDPMScheduler]":
    """The untrained network, of so many classes, and the scheduler.

    It never clips, since a clipped chain is not affine in the network.
    """
    from diffusers import UNet2DModel

    channels, height, width = event_shape
    widths = config.channels or _widths(event_shape)
    shorter = [min(height, width) >> level for level in range(len(widths))]
    attends = [level > 0 and 9 <= side <= 16 for level, side in enumerate(shorter)]
    unet = UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        layers_per_block=1 if shorter[0] <= 16 else 2,
        norm_num_groups=8,
        add_attention=False,
        dropout=config.dropout,
        num_class_embeds=classes or None,
    )
    return unet, noise_schedule(config)


def train(
    config: Config, data: Images | None = None, directory: RunDirectory | None = None
) -> "tuple[UNet2DModel, DDPMScheduler]":
    """Train and return the averaged network, in eval mode on its device, and its scheduler.

    Images, times and noise come from an explicit generator. Weight initialisation and dropout know none, so the global
    one is seeded inside a fork, and the caller's random state is as before afterwards. On the digits, training runs on
    one thread: how many share a sum decides its rounding, and the result must not depend on that.

    Args:
        config: see there.
        data: the images of `config.data`, where they are loaded already.
        directory: gets the model, up to a thousand lines of metrics.jsonl, and the state to go on from; where it holds
            such a state, training goes on from there, bit for bit. None leaves no trace.

    Raises:
        NonFiniteError: the loss or its gradient became NaN or infinite; the update is not done.
        InvalidInputError: a state that does not fit, or one of other images.
        KeyboardInterrupt: Ctrl-C; the model so far and the state are saved.
    """
    data = data or _load(config)
    device = _device(config)
    threads = torch.get_num_threads()
    if config.data == "digits":
        torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            with part("loading"):
                torch.manual_seed(config.seed)
                unet, scheduler = build(config, data.event_shape, len(data.classes))
                unet.to(device).train()
                training = begin(config, unet, scheduler)
                images = [] if os.path.isabs(config.data) else digests(data)  # of a folder, provenance has every file
                if directory is not None and directory.has_state:
                    training.restore(directory, images)
                elif directory is not None:
                    training.save(directory, images)
            _train(config, data, images, training, directory)
            training.average.copy_to(unet.parameters())
            return unet.eval(), scheduler
    finally:
        torch.set_num_threads(threads)


@part("training")
def _train(
    config: Config, data: Images, images: list[str], training: Pretraining, directory: RunDirectory | None
) -> None:
    """Make the steps that are left."""

    @part("saving")
    def save_model() -> None:
        if directory is not None:
            steps = f"after {training.step} of {config.steps} steps of pretraining"
            with training.averaged() as unet, writing(directory.model):
                card = f"# A diffusion model of {images_card.title(config.data)}, {steps}"
                save_pipeline(directory.model, DiffusersDenoiser(unet), training.scheduler, card)

    @part("saving")
    def checkpoint() -> None:
        if directory is not None:
            training.save(directory, images)

    every, saved_at = -(-config.steps // LINES), training.step
    last_model = last_checkpoint = time.monotonic()
    start = last_model - training.seconds
    with graceful() as stop, progress(config.steps, "pretraining", training.step) as bar:
        while training.step < config.steps:
            rows = torch.randint(len(data.train), (config.batch,), generator=training.generator)
            x, labels = data.train[rows], None if data.train_labels is None else data.train_labels[rows]
            try:
                training.descend(image_losses(training.unet, training.scheduler, x, training.generator, labels).mean())
            except NonFiniteError as error:
                kept = "" if directory is None else f"; the state of step {saved_at} is in {directory.checkpoint}"
                where = f"at step {training.step + 1} of {config.steps}"
                raise NonFiniteError(f"{error} {where}; try a smaller lr{kept}") from error
            bar.update({"loss": training.losses[-1]})
            step, training.seconds = training.step, time.monotonic() - start
            if step % every == 0 or step == config.steps:
                if directory is not None:
                    mean = torch.stack(training.losses).mean()
                    directory.append_metrics({"updates": step, "loss": mean, "seconds": training.seconds})
                training.lines += 1
                training.losses.clear()
            if time.monotonic() - last_model > SAVE_EVERY:
                save_model()
                last_model = time.monotonic()
            if stop.requested or step == config.steps or time.monotonic() - last_checkpoint > CHECKPOINT_EVERY:
                checkpoint()
                last_checkpoint, saved_at = time.monotonic(), step
            if stop.requested:
                save_model()
                kept = "" if directory is None else f"; the average of its weights so far is {directory.model}"
                raise KeyboardInterrupt(f"interrupted at step {step} of {config.steps}{kept}")
    save_model()
