"""The model card of the pretrained digits: what the model is, how to make and use it, how good its samples are."""

from __future__ import annotations

from implicit_diffusion.commands.pretrain.config import Config
from implicit_diffusion.commands.pretrain.images.classes import card_section, drawing
from implicit_diffusion.commands.pretrain.summary import Summary
from implicit_diffusion.commands.shared.formatting import markdown
from implicit_diffusion.digits import Appearance


def model_card(config: Config, summary: Summary) -> str:
    """The README.md of the model folder: what it is, how to make and use it, and how good its samples are."""
    quality = summary.quality
    assert config.channels is not None and quality is not None  # resolved, and of digits
    assert summary.classifier_accuracy is not None and summary.judge_accuracy is not None
    beside = next(iter(quality.values()))

    def row(name: str, appearance: Appearance, mmd: str) -> str:
        numbers = (
            appearance.classifier_confidence,
            appearance.judge_confidence,
            appearance.judge_agreement,
            appearance.nearest_distance,
            appearance.memorised,
        )
        return f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + f" | {mmd} |"

    rows = [row(f"{n} steps", q, f"{q.mmd:.5f}") for n, q in quality.items()]
    halves = f"{beside.mmd_reference.mean:.5f} (95 %: {beside.mmd_reference.quantile_95:.5f})"
    rows.append(row("held-out digits", beside.held_out, halves))
    shares = [f"| {n} steps | " + " | ".join(f"{h:.3f}" for h in q.class_histogram) + " |" for n, q in quality.items()]
    classes = summary.images.classes
    drawn = DRAWN
    if classes:
        lines = ['pipeline = DiffusionPipeline.from_pretrained("DIR/model")', *drawing(summary.images).splitlines()]
        drawn = "\n".join(f"    {line}".rstrip() for line in lines)
    card = CARD.format(
        asked=" --classes" if classes else "",
        kind="class-conditional" if classes else "unconditional",
        drawn=drawn,
        parameters=summary.parameters,
        channels=", ".join(map(str, config.channels)),
        steps=summary.updates,
        batch=config.batch,
        seconds=summary.seconds,
        prediction_type=markdown(config.prediction_type),
        beta_schedule=markdown(config.beta_schedule),
        samples=config.samples,
        chains=" and ".join(map(str, quality)),
        rows="\n".join(rows),
        shares="\n".join(shares),
        classes=" | ".join(map(str, range(10))),
        classifier_accuracy=summary.classifier_accuracy,
        judge_accuracy=summary.judge_accuracy,
        loss_train=summary.loss_train,
        loss_held_out=summary.loss_held_out,
    )
    return card + card_section(classes)


DRAWN = """\
    images = DiffusionPipeline.from_pretrained("DIR/model")(batch_size=16, num_inference_steps=50).images"""
CARD = """---
library_name: diffusers
license: apache-2.0
tags: [{kind}-image-generation, ddpm]
---
# A small diffusion model of handwritten digits, 8 by 8 pixels

A `UNet2DModel` with {parameters} parameters (channels {channels}), trained by denoising score matching
({prediction_type}, schedule {beta_schedule}, {steps} steps of {batch} images, {seconds:.0f} s on one thread) on 1437
of the 1797 handwritten digits of scikit-learn (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998). It
is made for short ancestral chains with trailing spacing and without clipping, which its scheduler says too. Reproduce
it with

    implicit-diffusion pretrain --data digits{asked} --out DIR

and sample from it with plain diffusers:

    from diffusers import DiffusionPipeline
{drawn}

## Quality

{samples} samples of the DDPM chain with {chains} steps, not clipped, beside the 360 digits that nothing was trained on:

| | classifier confidence | judge confidence | agreement | nearest distance | memorised | MMD² |
|---|---|---|---|---|---|---|
{rows}

The classifier is a small convolutional network (accuracy on the held-out digits {classifier_accuracy:.3f}), the judge
a support vector machine ({judge_accuracy:.3f}); agreement is the share of images to which both give one class. Nearest
distance is the mean distance to the nearest training digit; memorised are images nearer to one than 99 % of the
held-out digits are. MMD² is the squared maximum mean discrepancy to the held-out digits (Gaussian kernel, median
distance); its last row is that between two random halves of the real digits: mean over splits and 95 % quantile.

The denoising loss is {loss_train:.4f} on training digits and {loss_held_out:.4f} on held-out ones.

Shares of the classes, by the classifier:

| | {classes} |
|---|---|---|---|---|---|---|---|---|---|---|
{shares}
"""
