"""A model whose chain is read off its pipeline under the prompts of a file, for training it and for drawing from it."""

from __future__ import annotations

from typing import Any, NamedTuple

from implicit_diffusion.commands.shared.conditioning import (
    Conditioning,
    ConditioningSpec,
    of_read_prompts,
    printing_cuts,
    prompts_of,
    trained_guidance,
)
from implicit_diffusion.commands.shared.models.sizes import Size, call_of
from implicit_diffusion.commands.shared.prompt_files import Prompt
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.checkpoints import Checkpoint
from implicit_diffusion.models.pipelines.cutting import warn_of_cuts
from implicit_diffusion.models.pipelines.loading import pipeline_of
from implicit_diffusion.models.pipelines.reading import ProbedPipeline, read_pipeline
from implicit_diffusion.models.pretrained import Pretrained
from implicit_diffusion.tables.named import default_sampler


class ReadModel(NamedTuple):
    """What was read.

    Args:
        pretrained: the model.
        probed: its chain.
        sampler: its name; "own" for the pipeline's scheduler.
        conditioning: the prompts, which the network has within itself.
        call: arguments of the pipeline's call.
    """

    pretrained: Pretrained
    probed: ProbedPipeline
    sampler: str
    conditioning: Conditioning
    call: dict[str, Any]


def read_model(
    checkpoint: Checkpoint,
    spec: ConditioningSpec,
    num_steps: int,
    *,
    sampler: str | None,
    size: Size | None = None,
    frames: int | None = None,
    eta: float | None = None,
    frozen: bool = True,
) -> ReadModel:
    """Load a pipeline and read its chain off it.

    Args:
        checkpoint: of the pipeline.
        spec: what it is sampled under.
        num_steps: N.
        sampler: by name, "own" for that of the pipeline, or None for the memoryless one.
        size: height and width in pixels; None for those of the pipeline.
        frames: of a video; None for those of the pipeline.
        eta: noise of DDIM; other samplers do not use it.
        frozen: as in `load_pipeline`.

    Raises:
        InvalidInputError: options that the pipeline does not have; from `prompts_of`, `load_pipeline`, `read_pipeline`.
    """
    family = checkpoint.family
    trained, held_out, asked, call = asked_of(checkpoint, spec, size, frames)
    prompts = [*trained, *held_out]
    pipeline = pipeline_of(checkpoint, spec.model, frozen=frozen)
    with printing_cuts():
        warn_of_cuts(pipeline, [*prompts, *call.get("negative_prompt", ())])
    sampler = sampler or default_sampler(pipeline.scheduler)
    if sampler == "ddim":
        call |= _noise(checkpoint, eta)
    probed = read_pipeline(pipeline, num_steps, prompts=prompts or None, sampler=sampler, **call)
    pretrained = Pretrained(
        probed.denoiser,
        pipeline.scheduler,
        probed.event_shape,
        spec.model,
        decoder=probed.decoder,
        checkpoint=checkpoint,
    )
    guidance, student = family.guidance if asked is None else asked, None
    if spec.student_guidance not in (None, guidance):
        other = call | {"guidance_scale": spec.student_guidance}
        plain = read_pipeline(pipeline, num_steps, prompts=prompts or None, sampler=sampler, **other)
        if not plain.table.agrees_with(probed.table):
            raise InvalidInputError(
                f"--student-guidance {spec.student_guidance:g}: the rows of {spec.model} are others than under "
                f"guidance {guidance:g}, so that there is no path KL between the two; leave it out"
            )
        student = spec.student_guidance, plain.denoiser.plan
    return ReadModel(pretrained, probed, sampler, of_read_prompts(trained, held_out, guidance, student), call)


def asked_of(
    checkpoint: Checkpoint, spec: ConditioningSpec, size: Size | None, frames: int | None
) -> tuple[list[Prompt], list[Prompt], float | None, dict[str, Any]]:
    """The prompts that are trained on, those that are not, the guidance, and arguments of the pipeline's call.

    Raises:
        InvalidInputError: options that the pipeline does not have; from `prompts_of`.
    """
    family = checkpoint.family
    trained, held_out = prompts_of(spec, family.condition)
    asked = trained_guidance(checkpoint) if spec.guidance is None else spec.guidance
    call = call_of(family, size, frames, asked)
    if spec.student_guidance is not None and not family.guided:
        raise InvalidInputError(f"--student-guidance: a {family.pipelines[0]} has no guidance_scale; leave it out")
    if trained and not any(part.startswith("text_encoder") for part in checkpoint.parts):
        raise InvalidInputError(
            f"--prompts: {spec.model} has no text encoder to encode them; save the whole {family.pipelines[0]} there"
        )
    prompts = [*trained, *held_out]
    if any(prompt.negative for prompt in prompts):
        call["negative_prompt"] = [prompt.negative or "" for prompt in prompts]
    return trained, held_out, asked, call


def _noise(checkpoint: Checkpoint, eta: float | None) -> dict[str, float]:
    """η of DDIM, which the pipeline must pass on to its scheduler."""
    if checkpoint.family.passes_eta:
        return {} if eta is None else {"eta": eta}
    if eta:
        raise InvalidInputError(
            f"--scheduler ddim: a {checkpoint.family.pipelines[0]} passes no eta, so that DDIM has no noise in it; use "
            "ddpm, which is ddim with --eta 1, or --eta 0 with --penalty drift"
        )
    return {}
