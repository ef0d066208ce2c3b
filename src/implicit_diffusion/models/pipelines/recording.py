"""Run a pipeline with stand-ins for its network and its scheduler's step, and write down what they are called with.

The stand-in for the network answers random numbers. The one for the step computes what the scheduler would return and
gives the pipeline another, random state in its place, so that the rows of a run are independent of each other:

    row k:   the network is called (once, or several times under guidance) with arguments that depend on x_k and t_k
             the pipeline makes an output o_k of the answers and calls  y_k = step(o_k, t_k, x_k)
             the pipeline goes on with x_{k+1} ~ N(0, I)

Everything happens on shallow copies: the pipeline, its scheduler and its network are not changed, and share their
weights with the copies.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.errors import NonAffineError
from implicit_diffusion.global_generators import GlobalGenerators
from implicit_diffusion.models.pipelines.stand_ins import Enough, device_of, run_until_enough, shadow_of, stand_in_for
from implicit_diffusion.noise import Noise
from implicit_diffusion.showing import Shown
from implicit_diffusion.tables.refusals import GIVEN_BY_THE_CHAIN

PROBE_NOISE = Noise(seed=0)
STATE, ANSWER, RUN = range(3)  # keys of a row's state, of a call's answer, of the run's own generator


@dataclass(frozen=True, repr=False)
class NetworkCall(Shown):
    """One call: its arguments by name, and one answer per sample, parts of guidance included."""

    arguments: Mapping[str, Any]
    answers: list[Tensor]


@dataclass(frozen=True, repr=False)
class Step(Shown):
    """One row.

    Attributes:
        calls: of the network.
        t: time given to `step`.
        x: state given to `step`, with shape (n, *event).
        output: what the pipeline made of the answers, given to `step`.
        y: what `step` returned.
        xi: standard normal numbers of the shape of y, drawn again from the generator that `step` drew from.
        options: other arguments of `step` that differ from their defaults.
    """

    calls: list[NetworkCall]
    t: Any
    x: Tensor
    output: Tensor
    y: Tensor
    xi: Tensor
    options: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Recording(Shown):
    """A run: its rows, and the scheduler as the pipeline had set it before the first."""

    steps: list[Step]
    scheduler: Any


@dataclass(frozen=True, repr=False)
class AnswerForm(Shown):
    """How the network answers: learnt from one call of the network itself."""

    output: Any  # a tuple, or one of diffusers' output classes
    parts: int  # answers per sample, 2 under guidance in one call
    listed: bool  # a list of tensors, one per sample, instead of one tensor
    like: Tensor  # one answer, without the batch

    @classmethod
    def of(cls, output: Any, batch: int) -> AnswerForm:
        """Read the form off an output for `batch` samples."""
        first = output[0]
        return cls(output, len(first) // batch, isinstance(first, list), first[0].detach().clone())

    def filled(self, answers: list[Tensor]) -> Any:
        """An output of this form with other answers."""
        value: Any = answers if self.listed else torch.stack(answers)
        if isinstance(self.output, tuple):
            return (value, *self.output[1:])
        return type(self.output)(**{**self.output, next(iter(self.output)): value})


@dataclass
class Recorder:
    """Runs of a pipeline.

    Args:
        pipeline: of diffusers.
        part: the network's name in it.
        call: arguments of the pipeline's call, the same for every run.
        form: how the network answers; if None, the network itself is called once.
    """

    pipeline: Any
    part: str
    call: Mapping[str, Any]
    form: AnswerForm | None = None
    _steps: list[Step] = field(default_factory=list)
    _calls: list[NetworkCall] = field(default_factory=list)

    @property
    def network(self) -> nn.Module:
        """The network that stand-ins replace."""
        network: nn.Module = getattr(self.pipeline, self.part)
        return network

    @torch.no_grad()
    def run(self, num_steps: int, batch: Mapping[str, Any], rows: int) -> Recording:
        """A run of `num_steps` that ends after `rows` of them.

        Args:
            num_steps: given to the pipeline.
            batch: arguments that say how many samples there are; see `batch_of`.
            rows: at most `num_steps`.

        Raises:
            InvalidInputError: the pipeline's call fails.
            NonAffineError: the scheduler makes another number of steps, the network is not called between two of
                them, or more numbers than the state has are stepped.
        """
        name = type(self.pipeline).__name__
        self._steps, self._calls = [], []
        prepared: list[Any] = []
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        own_step, own_timesteps = scheduler.step, scheduler.set_timesteps
        generator = PROBE_NOISE.generator(RUN)

        @functools.wraps(own_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            own_timesteps(*args, **kwargs)
            prepared.append(_without_stand_ins(scheduler))

        @functools.wraps(own_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            if len(scheduler.timesteps) != num_steps:
                raise NonAffineError(
                    f"pipeline: {name} makes {len(scheduler.timesteps)} timesteps for num_steps = {num_steps}; a chain "
                    "has one network call per row. Name a first-order sampler"
                )
            given = inspect.signature(own_step).bind(*args, **kwargs)
            drawn_from = given.arguments.get("generator")
            before = torch.get_rng_state() if drawn_from is None else drawn_from.get_state()
            result = own_step(*args, **kwargs)
            xi = _drawn_again(result[0], before)
            self._take(given.arguments, result[0], xi, own_step)
            if len(self._steps) == rows:
                raise Enough
            return _with_state(result, self._random(result[0], STATE, len(self._steps)))

        scheduler.set_timesteps, scheduler.step = set_timesteps, step
        stand_in = stand_in_for(self.network, self._answer)
        device = device_of(self.network)
        shadow = shadow_of(self.pipeline, {self.part: stand_in, "scheduler": scheduler}, device)
        options = {"num_inference_steps": num_steps, **self.call, **batch}
        known = inspect.signature(type(self.pipeline).__call__).parameters
        options |= {"generator": generator} if "generator" in known else {}
        try:
            with GlobalGenerators(PROBE_NOISE, RUN):  # from which some steps draw
                run_until_enough(shadow, options, "pipeline")
        finally:
            del scheduler.step, scheduler.set_timesteps  # a cycle, which would keep what was recorded
        if len(self._steps) < rows or not prepared:
            raise NonAffineError(
                f"pipeline: {name} has ended after {len(self._steps)} of {num_steps} calls of scheduler.step; only "
                "pipelines that call it once per row are chains"
            )
        return Recording(self._steps, prepared[-1])

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.network).forward
        given = inspect.signature(forward).bind(self.network, *args, **kwargs).arguments
        arguments = {key: value for key, value in list(given.items())[1:] if key != "kwargs"} | given.get("kwargs", {})
        if self.form is None:
            self.form = AnswerForm.of(self.network(*args, **kwargs), 1)
        count = self.form.parts * self._count
        key = (len(self._steps), len(self._calls))
        answers = [self._random(self.form.like, ANSWER, *key, i) for i in range(count)]
        self._calls.append(NetworkCall(arguments, answers))
        return self.form.filled(answers)

    _count: int = 1  # samples of the run

    def _take(self, given: Mapping[str, Any], y: Tensor, xi: Tensor, own_step: Any) -> None:
        """Write down a step with the calls before it."""
        name, row = type(self.pipeline).__name__, len(self._steps)
        if not {"model_output", "timestep", "sample"} <= given.keys():
            raise NonAffineError(
                f"pipeline: {name} calls scheduler.step({', '.join(given)}) on row {row}; a row of a chain needs "
                "the model's output, the time and the state, and nothing from before"
            )
        x: Tensor = given["sample"]
        if not self._calls:
            raise NonAffineError(
                f"pipeline: {name} calls scheduler.step on row {row} without having called its {self.part} since the "
                "row before; a chain has one state, one network and one step per row"
            )
        if len(x) != self._count:
            raise NonAffineError(
                f"pipeline: {name} steps {len(x)} states for {self._count} samples on row {row}, both halves of "
                "guidance, say; set guidance_scale=1"
            )
        defaults = inspect.signature(own_step).parameters
        options = {
            key: value
            for key, value in given.items()
            if key not in GIVEN_BY_THE_CHAIN and value is not None and value != defaults[key].default
        }
        self._steps.append(
            Step(self._calls, given["timestep"], x.clone(), given["model_output"].clone(), y.clone(), xi, options)
        )
        self._calls = []

    def _random(self, like: Tensor, *key: int) -> Tensor:
        return PROBE_NOISE.normal(tuple(like.shape), *key).to(like.device, like.dtype)

    def with_count(self, count: int) -> Recorder:
        """The same for runs of `count` samples."""
        return Recorder(self.pipeline, self.part, self.call, self.form, _count=count)


def _without_stand_ins(scheduler: Any) -> Any:
    """A deep copy of a scheduler without the functions that have been put in place of its own."""
    copied = copy.copy(scheduler)
    del copied.step, copied.set_timesteps
    return copy.deepcopy(copied)


def _with_state(result: Any, state: Tensor) -> Any:
    """What `step` returned, with another state."""
    if isinstance(result, tuple):
        return (state, *result[1:])
    return type(result)(**{**result, "prev_sample": state})


def first_draws(like: Tensor) -> Tensor:
    """The first standard normal numbers that a run draws, as many as `like` has: those of its initial state."""
    return torch.randn(like.numel(), generator=PROBE_NOISE.generator(RUN), dtype=like.dtype).to(like.device)


def _drawn_again(like: Tensor, state: Tensor) -> Tensor:
    """The first standard normal numbers of the shape and dtype of `like` from a CPU generator in this state."""
    generator = torch.Generator().set_state(state)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
