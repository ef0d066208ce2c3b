"""Pretrain a diffusion model: on the real handwritten digits (the model that ships with this package), or on images.

load the images → train the U-Net by denoising score matching → losses, samples, model card → save → draw
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from implicit_diffusion import digits
from implicit_diffusion.commands.pretrain import digits_card, images_card
from implicit_diffusion.commands.pretrain.config import Config
from implicit_diffusion.commands.pretrain.images import classes as image_classes
from implicit_diffusion.commands.pretrain.images.loading import Images, load_images
from implicit_diffusion.commands.pretrain.loss import judged_losses
from implicit_diffusion.commands.pretrain.network import Network, widths_for
from implicit_diffusion.commands.pretrain.quality import in_words, judge_images
from implicit_diffusion.commands.pretrain.samples import plot, sampled
from implicit_diffusion.commands.pretrain.state import Descent
from implicit_diffusion.commands.pretrain.summary import ImagesSummary, Summary
from implicit_diffusion.commands.pretrain.training import Training, train
from implicit_diffusion.commands.shared.inputs import inputs
from implicit_diffusion.commands.shared.opening import in_folder, opened
from implicit_diffusion.commands.shared.recorded_options import read_options
from implicit_diffusion.commands.shared.summaries import read_summary, to_json
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.files.atomic import writing
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.noise import Noise
from implicit_diffusion.processes import check_divides, main_only
from implicit_diffusion.runs import RunDirectory, clock
from implicit_diffusion.runs.clock import part
from implicit_diffusion.runs.devices import find_device
from implicit_diffusion.runs.provenance import check_inputs
from implicit_diffusion.runs.trackers.opening import tracked

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel


DIGITS = 2000  # that are judged


def run(config: Config, directory: RunDirectory | None = None) -> dict[str, Any]:
    """Train, save and judge: `model/` (a diffusers folder), `summary.json` and `figures/samples.png` in `config.out`.

    The model is saved before it is judged, and every ten minutes while it is trained; the state to continue from every
    minute.

    Args:
        config: the options.
        directory: of an interrupted run to continue; None begins a new one.

    Returns:
        What summary.json holds: the config, the number of parameters, the losses on training and held-out images and
        the seconds of the training; of digits also the quality of the samples per chain length and the classifiers'
        held-out accuracy.

    Raises:
        InvalidInputError: data that cannot be loaded, a setting out of range, or an `out` that is not empty.
        KeyboardInterrupt: Ctrl-C; `resume` continues it, and the average so far is saved.
    """
    config.check()
    resumed = directory is not None
    config, directory = in_folder(config, directory, Path(f"runs/pretrain-{Path(config.data).name}"))
    with directory.held(), clock.run(), tracked(directory, config.track) as directory:
        if not resumed:
            directory.check_start("pretrain")
        clock.keep(directory.path)
        fingerprints, data = inputs(config), images_of(config)
        samples = config.samples or (DIGITS if config.data == "digits" else None)
        config = replace(config, size=data.event_shape[1:], channels=widths_of(config, data), samples=samples)
        training = training_of(config, data)
        with opened("pretrain", config, directory, resumed=resumed, fingerprints=fingerprints, device=training.device):
            return _finish(config, data, *train(training, data, directory), directory)


@main_only
def report(directory: RunDirectory) -> dict[str, Any]:
    """Draw the samples of a finished run again; returns its summary.

    Raises:
        InvalidInputError: images or a model that are no longer there.
    """
    summary, config = read_summary(Summary, directory), read_options(Config, directory)
    check_inputs(directory, inputs(config))
    data = images_of(config)
    pretrained = load_pretrained(directory.model)
    unet = pretrained.denoiser.model
    count = _samples(config.data, config.samples, data)
    shape, classes = data.event_shape, len(data.classes)
    drawn = sampled(config.chains, unet, pretrained.scheduler, count, config.seed, shape, classes)
    plot(data, drawn, directory)
    print(f"figures   {directory.figure('samples')}")
    written: dict[str, Any] = to_json(summary)
    return written


@part("loading")
def images_of(config: Config) -> Images:
    """The images that a config names."""
    levels = len(config.channels) if config.channels else None
    return load_images(config.data, config.size, levels, classes=config.classes)


def widths_of(config: Config, data: Images) -> tuple[int, ...]:
    """Widths of the U-Net's levels: those that are asked for, or those for the size of the images."""
    return config.channels or widths_for(*data.event_shape[1:])


def training_of(config: Config, data: Images) -> Training:
    """What to train on these images.

    Raises:
        InvalidInputError: a batch that processes cannot share equally.
    """
    check_divides("batch", config.batch)
    return Training(
        network=Network(
            event_shape=data.event_shape,
            widths=widths_of(config, data),
            classes=len(data.classes),
            dropout=config.dropout,
            train_timesteps=config.train_timesteps,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
        ),
        descent=Descent(steps=config.steps, lr=config.lr, ema_decay=config.ema_decay, seed=config.seed),
        batch=config.batch,
        title=images_card.title(config.data),
        device=find_device(config.device or ("cpu" if config.data == "digits" else "auto")),
        one_thread=config.data == "digits",  # whose weights are published, and must not depend on the number
        shown_steps=config.chains[0],
        check_pixels=not os.path.isabs(config.data),  # of a folder, provenance has every file
        keep=config.keep,
        seconds=math.inf if config.minutes is None else 60 * config.minutes,
    )


@main_only
@part("judging")
def _finish(
    config: Config, data: Images, unet: UNet2DModel, scheduler: DDPMScheduler, directory: RunDirectory
) -> dict[str, Any]:
    """Judge, save, draw, and write the summary at the very end: what is interrupted before it is done once more."""
    count = _samples(config.data, config.samples, data)
    drawn = sampled(config.chains, unet, scheduler, count, config.seed, data.event_shape, len(data.classes))
    loss_train, loss_held_out = judged_losses(unet, scheduler, data)
    none = {"updates": config.steps, "seconds": 0.0}
    made = max(directory.read_metrics(), key=lambda line: line["updates"], default=none)
    summary = Summary(
        config=asdict(config) | {"out": str(config.out)},
        images=ImagesSummary(len(data.train), len(data.held_out), data.event_shape, data.left_out, data.classes),
        parameters=sum(p.numel() for p in unet.parameters()),
        loss_train=loss_train,
        loss_held_out=loss_held_out,
        seconds=made["seconds"],
        updates=int(made["updates"]),
    )
    if config.data == "digits":
        summary = replace(
            summary,
            quality={str(n): digits.judge_samples(x) for n, x in drawn.items()},
            classifier_accuracy=digits.accuracy(digits.load_classifier()),
            judge_accuracy=digits.accuracy(digits.fit_judge()),
        )
    elif config.samples is not None:
        with part("judging"):
            judged = {str(n): judge_images(x, data, Noise(config.seed)) for n, x in drawn.items()}
        summary = replace(summary, image_quality=judged)
        for n, quality in judged.items():
            print(f"{n:>7} steps: {in_words(quality)}")
    model_card = digits_card.model_card if config.data == "digits" else images_card.model_card
    with part("saving"), writing(directory.model):
        save_pipeline(directory.model, DiffusersDenoiser(unet), scheduler, model_card(config, summary))
    plot(data, drawn, directory)
    written: dict[str, Any] = to_json(summary)
    directory.write_summary(written)  # the last file: with it, the run is finished
    steps = summary.updates
    print(f"cost      {clock.in_words(clock.seconds(directory.path))}; {steps} steps of {config.batch} images")
    if steps < config.steps:
        print(
            f"stopped   after {config.minutes:g} minutes and {steps} of {config.steps} steps: the learning rate has "
            f"not decayed to zero; with --steps {steps} it does in about that time"
        )
    print(f"model     {directory.model}")
    return written


def _samples(data_name: str, asked: int | None, data: Images) -> int:
    """How many images are drawn: as many as are judged, and at least a picture of those that are not digits."""
    picture = 0 if data_name == "digits" else image_classes.to_draw(len(data.classes))
    return max(asked or 0, picture)
