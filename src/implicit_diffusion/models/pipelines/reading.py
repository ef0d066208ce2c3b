"""Any pipeline of diffusers as a chain, read off by running it with stand-ins.

learn      one call of the network itself: how it answers; one row: the shape of the state
record     N rows of two samples and one row of three, with random states and answers (`recording`)
arguments  what every argument of the network is (`arguments`)
output     o_k = d_k x_k + Σ_j c_jk u_j by least squares on every row; the c_jk must be proportional between rows
table      (a, b, s, m, t) of the scheduler as the pipeline has set it, by probing it in double precision
verify     on every row: the arguments that the denoiser would give are those that the pipeline gave, and
x_{k+1} = a_k x_k + b_k o_k + s_k ξ_k is what the pipeline's step returned
embed      one row with all prompts, by chunks: their embeddings, masks and positions (`embedding`)
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.denoisers.conditions import Drawn
from implicit_diffusion.errors import InvalidInputError, check_integer, check_type, shown
from implicit_diffusion.extras import require
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.models.families import takes_time
from implicit_diffusion.models.pipelines.arguments import FEW, MORE, bound, time_in
from implicit_diffusion.models.pipelines.decoder import PipelineDecoder
from implicit_diffusion.models.pipelines.denoiser import PROMPT, PipelineDenoiser, Plan, PlannedCall
from implicit_diffusion.models.pipelines.embedding import Recorded, Text, embedded
from implicit_diffusion.models.pipelines.fitting import initial_std_of, outputs_of, roles_of, verify
from implicit_diffusion.models.pipelines.recording import NetworkCall, Recorder
from implicit_diffusion.models.pipelines.stand_ins import batch_of
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.showing import Shown, of_network
from implicit_diffusion.tables.flow import memoryless_at
from implicit_diffusion.tables.named import scheduler_for
from implicit_diffusion.tables.refusals import check_num_steps, check_scheduler
from implicit_diffusion.tables.scheduler import read_prepared
from implicit_diffusion.tables.table import ChainTable

GIVEN_HERE = ("self", "prompt", "num_inference_steps", "generator", "latents", "return_dict", "output_type")


@dataclass(frozen=True, repr=False)
class ProbedPipeline(Shown):
    """A pipeline as a chain.

    Attributes:
        denoiser: the network with all that is constant in time, u(x, t, prompt); guidance included.
        table: the rows (a, b, s, m, t), verified against the pipeline's own steps.
        event_shape: of one state, as the pipeline steps it: packed latents for some.
        condition: draws the numbers of prompts; None where there are no prompts or classes.
        decoder: from states to images or frames; None where states are images.
        pipeline: the diffusers pipeline that it was read off, with the scheduler that runs the table.
    """

    denoiser: PipelineDenoiser
    table: ChainTable
    event_shape: tuple[int, ...]
    condition: Drawn | None
    decoder: PipelineDecoder | None
    pipeline: Any

    def _words(self) -> Iterable[str]:
        yield type(self.pipeline).__name__
        yield of_network(self.denoiser.model)
        yield f"table={self.table.name!r}"
        yield f"event_shape={self.event_shape}"
        if self.condition is not None:
            yield f"{len(self.condition.values)} prompts"

    def chain(self, **options: Any) -> Chain:
        """The chain of denoiser and table; `options` are those of `Chain`."""
        return Chain(self.denoiser, self.table, self.event_shape, **({"condition": self.condition} | options))


def read_pipeline(
    pipeline: Any,
    num_steps: int,
    *,
    prompts: Sequence[str] | None = None,
    size: Sequence[int] | None = None,
    sampler: str = "own",
    **call: Any,
) -> ProbedPipeline:
    """Read the chain that a diffusers pipeline runs, whatever its family.

    The pipeline is run with stand-ins for its network and its scheduler's step, and is not changed. Its network is
    called once, for one sample, to learn how it answers.

    Args:
        pipeline: a diffusers pipeline with its parts. Its network is shared with the result, not copied.
        num_steps: N, network evaluations of a sample.
        prompts: m texts; the chain draws one per sample, uniformly. None for pipelines without prompts, or where `call`
            holds the embeddings of one.
        size: height and width of the samples in pixels; by default those of the pipeline.
        sampler: "own" keeps the pipeline's scheduler; one of `tables.NAMED_SAMPLERS` puts the scheduler of that name
            with the same noise schedule in its place.
        **call: further arguments of the pipeline's call, such as guidance_scale, num_frames or negative_prompt: one
            text, or a list of one per prompt.

    Raises:
        NonAffineError: the pipeline's rows are not affine in the state and the network's answers, or what the network
            is called with is neither state, nor time, nor constant in time. The message names the row or argument.
        InvalidInputError: not a diffusers pipeline, a part or argument that is missing, or a call that fails.
        MissingExtraError: diffusers is not installed.
    """
    check_type("sampler", sampler, str, 'use "own", or a name of tables.NAMED_SAMPLERS')
    own_pipeline, pipeline = pipeline, _with_sampler(pipeline, sampler)
    num_steps = check_num_steps(pipeline.scheduler, num_steps)
    texts = _check_prompts(prompts)
    call = _checked_call(pipeline, size, call, texts)
    part = _network_of(pipeline)

    one = Recorder(pipeline, part, call)
    several = max(num_steps, 2)  # on one row alone, the time would look constant
    try:
        one.run(several, batch_of(pipeline, call, texts, 1), 1)
    except InvalidInputError:
        if not _is_replaced(own_pipeline.scheduler, sampler) or _is_replaced(pipeline.scheduler, sampler):
            raise
        pipeline = copy.copy(own_pipeline)  # which sets noise levels that no other scheduler takes
        one = Recorder(pipeline, part, call)
        one.run(several, batch_of(pipeline, call, texts, 1), 1)
    few = one.with_count(FEW)
    given = batch_of(pipeline, call, texts, FEW)
    recording = few.run(several, given, several)
    wide = one.with_count(MORE).run(several, batch_of(pipeline, call, texts, MORE), 1)
    roles = roles_of(recording.steps, wide.steps[0])
    if several != num_steps:
        recording = few.run(num_steps, given, num_steps)
    outputs, weights = outputs_of(recording.steps)
    own = read_prepared(recording.scheduler, num_steps, **recording.steps[0].options)
    verify(own, recording.steps, roles)
    table = memoryless_at(recording.scheduler, num_steps) if _is_replaced(recording.scheduler, sampler) else own
    times = [time_in(roles[0], step.calls[0].arguments) for step in recording.steps]
    table = dataclasses.replace(
        table,
        a=table.a + table.b * outputs[:, 0],
        b=table.b * outputs[:, 1],
        t=torch.tensor(times, dtype=torch.float64),
        initial_std=initial_std_of(recording.steps[0].x),
    )
    assert one.form is not None
    arguments, rows, count = _bound(one, num_steps, call, texts, roles, recording.steps[0].calls)
    calls = tuple(PlannedCall(*each) for each in zip(arguments, weights, strict=True))
    named = texts is not None or "class_labels" in call
    return ProbedPipeline(
        denoiser=PipelineDenoiser(one.network, Plan(calls, count, rows)).eval(),
        table=table if sampler == "own" else table.unscaled(),
        event_shape=tuple(recording.steps[0].x.shape[1:]),
        condition=Drawn(PROMPT, torch.arange(count)) if named else None,
        decoder=PipelineDecoder(pipeline, part, call, texts, one.form) if getattr(pipeline, "vae", None) else None,
        pipeline=pipeline,
    )


def _with_sampler(pipeline: Any, sampler: str) -> Any:
    """A shallow copy of the pipeline with the scheduler of that name."""
    require("diffusers")
    import diffusers

    check_type("pipeline", pipeline, diffusers.DiffusionPipeline, "use DiffusionPipeline.from_pretrained(…)")
    scheduler = getattr(pipeline, "scheduler", None)
    check_scheduler(scheduler)
    copied = copy.copy(pipeline)
    if sampler != "own":
        copied.register_modules(scheduler=scheduler_for(scheduler, sampler, clip=False))
    return copied


def _is_replaced(scheduler: Any, sampler: str) -> bool:
    """Whether the memoryless rows at the scheduler's noise levels take the place of its own."""
    return sampler == "flow-memoryless" and type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def _check_prompts(prompts: Any) -> list[str] | None:
    if prompts is None:
        return None
    texts = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not texts or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InvalidInputError(f"prompts must be a list of strings, at least one, got {one_line(repr(prompts))[:80]}")
    return list(prompts)


def _checked_call(pipeline: Any, size: Any, call: dict[str, Any], texts: list[str] | None) -> dict[str, Any]:
    """The arguments of every call of the pipeline."""
    known = inspect.signature(type(pipeline).__call__).parameters
    if size is not None:
        if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
            raise InvalidInputError(f"size must be the height and the width in pixels, got {shown(size)}")
        height, width = (check_integer("size", side) for side in size)
        call = {"height": height, "width": width} | call
    for name in call:
        empty = name == "prompt" and call[name] is None  # which some pipelines ask for beside embeddings
        if name not in known or (name in GIVEN_HERE and not empty):
            others = ", ".join(other for other in known if other not in ("self", *GIVEN_HERE))
            raise InvalidInputError(f"{name} is no argument to give to {type(pipeline).__name__}; it has {others}")
    negative = call.get("negative_prompt")
    if isinstance(negative, list) and len(negative) != len(texts or ()):
        raise InvalidInputError(
            f"negative_prompt must be one text, or a list of one per prompt, got {len(negative)} for "
            f"{len(texts or ())} prompts"
        )
    return call


def _network_of(pipeline: Any) -> str:
    """The name of the part that predicts: the module that is called with a time."""
    timed = [
        name
        for name, module in pipeline.components.items()
        if isinstance(module, nn.Module) and takes_time(type(module))
    ]
    if len(timed) != 1:
        raise InvalidInputError(
            f"pipeline: {type(pipeline).__name__} must have one network that is called with a time, it has "
            f"{' and '.join(timed) or 'none'}"
        )
    return timed[0]


def _bound(
    recorder: Recorder,
    num_steps: int,
    call: dict[str, Any],
    texts: list[str] | None,
    roles: list[Any],
    recorded: Sequence[NetworkCall],
) -> tuple[list[Any], Tensor | None, int]:
    """The arguments of every call for all prompts or classes, the row of each in them, and how many there are."""

    def row(count: int, given: dict[str, Any]) -> Sequence[NetworkCall]:
        return recorder.with_count(count).run(num_steps, given, 1).steps[0].calls

    if texts is None:
        classes = len(call["class_labels"]) if "class_labels" in call else 1
        calls = row(classes, {} if "class_labels" in call else batch_of(recorder.pipeline, call, None, 1))
        return [bound(role, each.arguments, classes) for role, each in zip(roles, calls, strict=True)], None, classes
    negative: Any = call.get("negative_prompt")
    several = isinstance(negative, list)
    named = [Text(*each) for each in zip(texts, negative if several else [None] * len(texts), strict=True)]
    place = {text: number for number, text in enumerate(dict.fromkeys(named))}

    def run(few: Sequence[Text]) -> Sequence[NetworkCall]:
        negatives = {"negative_prompt": [text.negative for text in few]} if several else {}
        return row(len(few), {"prompt": [text.prompt for text in few]} | negatives)

    arguments = embedded(run, recorder.pipeline, list(place), Recorded([named[0]] * FEW, recorded, roles))
    rows = torch.tensor([place[text] for text in named]) if len(place) < len(named) else None
    return arguments, rows, len(named)
