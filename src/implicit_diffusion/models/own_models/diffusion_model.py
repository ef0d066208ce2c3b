"""A diffusion or flow model of any network: all that the library needs to know of one.

u_θ(x, t)       denoiser      any module, (n, *event), (n,) → (n, *event)
a, b, s, m, t   schedule      the table of its sampler, or a diffusers scheduler that one is read off
*event          event_shape   of one state
x_N → image     decoder       where states are latents
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, check_call, check_integer, check_type, shown, trying
from implicit_diffusion.frozen import check_complete, eval_mode
from implicit_diffusion.rounding import at_least_single
from implicit_diffusion.samplers.chain_checks import check_event_shape
from implicit_diffusion.showing import Shown, of_network
from implicit_diffusion.tables.named import default_sampler
from implicit_diffusion.tables.refusals import check_scheduler
from implicit_diffusion.tables.table import ChainTable

TRIED = 2  # samples of the trial at construction
CLASS = "class_labels"


@dataclass(frozen=True, repr=False)
class DiffusionModel(Shown):
    """A denoiser with its sampler, such as a function in a file returns to the command `finetune`.

    It is tried on two samples when it is made: one evaluation of the denoiser, and one of the decoder.

    Attributes:
        denoiser: u(x, t), a module that is called with states (n, *event) and times (n,), and returns the shape of x.
            With `num_classes` it is called as u(x, t, class_labels=labels), with integers of shape (n,).
        schedule: the `ChainTable` of the sampler, whose b absorbs what u predicts and whose t are the times that u is
            called with; or a diffusers scheduler, whose config says what u predicts, and whose timesteps are the times.
        event_shape: of one state, such as (2,), (3, 32, 32) or (4, 16, 16).
        decoder: from latents (n, *event) to images (n, channels, height, width), or whatever rewards are functions of;
            differentiable, a function or a module. None where states are that already.
        num_classes: classes 0, …, num_classes − 1 that the denoiser is conditioned on; None where it is not.
        image_shape: of one decoded sample; `event_shape` without a decoder. It is found by the trial.

    Raises:
        InvalidInputError: an argument of another type; a denoiser without floating-point parameters, with weights that
            are not finite, or with a state that is more than tensors; a scheduler that no named sampler fits; a
            denoiser or decoder that fails on two samples, or returns another shape or number of samples, or NaN.
    """

    denoiser: nn.Module
    schedule: Any
    event_shape: tuple[int, ...]
    decoder: Callable[[Tensor], Tensor] | None = None
    num_classes: int | None = None
    image_shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_type("denoiser", self.denoiser, nn.Module, "it is called as u(x, t), and its parameters are trained")
        check_call("denoiser", self.denoiser, "x", "t", more=self.num_classes is not None)
        object.__setattr__(self, "event_shape", check_event_shape(self.event_shape))
        if self.num_classes is not None:
            object.__setattr__(self, "num_classes", check_integer("num_classes", self.num_classes))
        if self.decoder is not None:
            check_call("decoder", self.decoder, "x")
        _check_schedule(self.schedule)
        _check_weights(self.denoiser)
        object.__setattr__(self, "image_shape", self._try())

    def _words(self) -> Iterable[str]:
        yield of_network(self.denoiser)
        table = isinstance(self.schedule, ChainTable)
        yield f"schedule={self.schedule.name!r}" if table else f"schedule={type(self.schedule).__name__}"
        yield f"event_shape={self.event_shape}"
        if self.decoder is not None:
            yield f"decoded to {self.image_shape}"
        if self.num_classes is not None:
            yield f"num_classes={self.num_classes}"

    @torch.no_grad()
    def _try(self) -> tuple[int, ...]:
        """Evaluate denoiser and decoder on two samples; returns the shape of a decoded one."""
        x, t, given = trial(self.denoiser, self.schedule, self.event_shape, self.num_classes)
        under = f" and {CLASS} of shape ({TRIED},)" if given else ""
        with eval_mode(self.denoiser):
            with trying("denoiser", f"states of shape {tuple(x.shape)}, times of shape ({TRIED},){under}"):
                u = self.denoiser(x, t, **given)
            _check_returned("denoiser", u, x.shape)
        if self.decoder is None:
            return self.event_shape
        with trying("decoder", f"states of shape {tuple(x.shape)}"):
            images = self.decoder(x)
        _check_returned("decoder", images, None)
        return tuple(images.shape[1:])


def trial(
    denoiser: nn.Module, schedule: Any, event_shape: tuple[int, ...], num_classes: int | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """States, times and a condition that a denoiser can be tried on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRIED, *event_shape, generator=generator).to(next(denoiser.parameters()))
    t = torch.full((TRIED,), _first_time(schedule), device=x.device, dtype=at_least_single(x.dtype))
    return x, t, {} if num_classes is None else {CLASS: torch.zeros(TRIED, dtype=torch.long, device=x.device)}


def _check_schedule(schedule: Any) -> None:
    if isinstance(schedule, ChainTable):
        return
    try:
        check_scheduler(schedule)
        default_sampler(schedule)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"schedule must be a ChainTable or a scheduler of diffusers with alphas_cumprod or flow times, got "
            f"{shown(schedule)}; tables of one's own are made by ChainTable(a, b, s, m, t, h)"
        ) from error


def _check_weights(denoiser: nn.Module) -> None:
    """Raise `InvalidInputError` unless the weights are finite numbers that a file of tensors can hold."""
    check_complete(denoiser)
    if not any(p.is_floating_point() for p in denoiser.parameters()):
        raise InvalidInputError(
            f"denoiser {type(denoiser).__name__} has no parameters that could be trained; register its networks and "
            "tensors as submodules and nn.Parameter"
        )
    for name, value in denoiser.state_dict().items():
        if not isinstance(value, Tensor):
            raise InvalidInputError(
                f"denoiser: its state_dict holds {name!r} of type {type(value).__name__}, and only tensors are saved; "
                "leave out get_extra_state"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise InvalidInputError(f"denoiser: its weights {name!r} hold NaN or infinity; load others")


def _check_returned(name: str, value: Any, shape: torch.Size | None) -> None:
    """Raise `InvalidInputError` unless a trial returned finite numbers of this shape, or a batch of the same size."""
    check_type(f"what the {name} returns", value, Tensor, "return the tensor alone")
    if shape is not None and value.shape != shape:
        raise InvalidInputError(
            f"{name} must return the shape of its input, {tuple(shape)}, got {tuple(value.shape)}; event_shape is that "
            "of one sample, without the batch"
        )
    if value.ndim < 2 or len(value) != TRIED:
        raise InvalidInputError(
            f"{name} must return one image for each of {TRIED} states, shape ({TRIED}, ...), got {tuple(value.shape)}"
        )
    if not value.is_floating_point() or not value.isfinite().all():
        what = "NaN or infinity" if value.is_floating_point() else str(value.dtype)
        raise InvalidInputError(f"{name} must return finite floating-point numbers, got {what}")


def _first_time(schedule: Any) -> float:
    """A time that the denoiser is called with."""
    if isinstance(schedule, ChainTable):
        return float(schedule.t[0])
    return float(schedule.config.get("num_train_timesteps", 1000) - 1)
