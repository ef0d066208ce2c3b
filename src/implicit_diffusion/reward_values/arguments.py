"""Arguments of reward functions: samples in the form that a function asks for, and what they were sampled under.

A function says what it wants by the annotation of its first parameter:

    torch.Tensor, or none   the samples themselves, (n, *event); images (n, C, H, W), nominally in [−1, 1]
    np.ndarray              images (n, H, W, C) in [0, 1], as `output_type="np"` of diffusers; points as they are
    NDArray[np.uint8]       the same images as whole numbers 0 … 255
    list[PIL.Image.Image]   n pictures of 8 bits, RGB or L, as `output_type="pil"` of diffusers

Arrays and pictures are copies without a gradient: to whoever trains with it, such a reward is a black box. A second
argument without a default is the condition: prompts, class labels. One that is called `metadata`, in its place or
behind it, is the list of the records that stand beside the prompts.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.extras import require
from implicit_diffusion.reward_values.results import scores_of
from implicit_diffusion.showing import Shown

GIVEN_AS = "__given_as__"  # attribute of a function that was adapted: what the one inside is given
METADATA = "metadata"  # name of an argument
WANTS_METADATA = "__wants_metadata__"  # attribute of a function that was adapted
CONDITION_NAMES = {
    "prompt",
    "prompts",
    "caption",
    "captions",
    "text",
    "texts",
    "label",
    "labels",
    "class_labels",
    "condition",
    "metadata",
}
UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
LISTED = re.compile(r"(\w+\.)*(list|sequence|iterable|collection|tuple)\[", re.IGNORECASE)


def takes_condition(function: Callable[..., Any]) -> bool:
    """Whether a reward function has a second required argument: what its samples were sampled under.

    Raises:
        InvalidInputError: it has more than two required arguments, one that is keyword-only, or the samples second.
    """
    try:
        parameters = signature_of(function).parameters
    except (TypeError, ValueError):  # built-in functions may have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.default is p.empty and p.kind not in UNNAMED]
    given = [p.name for p in required if p.kind in positional]
    named = [p.name for p in required if p.kind not in positional]
    if len(given) > 2 or named:
        raise InvalidInputError(
            "reward must have one required argument, the samples (images), or two, the samples and what they were "
            f"sampled under (prompts, class labels), got {'one' if len(required) == 1 else 'a function'} of "
            f"{', '.join([*given, *(f'{name}=…' for name in named)])}; give the others defaults"
            + ", and let the samples come by position"
            * bool(named)
        )
    if len(given) == 2 and given[0] in CONDITION_NAMES and given[1] not in CONDITION_NAMES:
        raise InvalidInputError(
            f"reward is called with the samples first and what they were sampled under second, but its arguments are "
            f"({', '.join(given)}); exchange them"
        )
    return len(given) == 2


def with_metadata(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same reward as one of samples and prompts, whose attribute `metadata` it is given; itself if it takes none.

    A reward that takes metadata has an argument of that name, (samples, metadata) or (samples, prompts, metadata), and
    is called with a list of copies of the records there.
    """
    try:
        parameters = list(signature_of(function).parameters.values())
    except (TypeError, ValueError):  # built-in functions may have no signature
        return function
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in UNNAMED]
    if METADATA not in required[1:3] or len(required) != required.index(METADATA) + 1:
        return function

    @functools.wraps(function)
    def calling(x: Any, prompts: Any) -> Any:
        records = [copy.deepcopy(prompt.metadata) for prompt in prompts]
        return function(x, records) if len(required) == 2 else function(x, prompts, records)

    second = inspect.Parameter("prompts", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    calling.__dict__["__signature__"] = inspect.Signature([parameters[0], second])
    calling.__dict__[WANTS_METADATA] = True
    return calling


def wants_metadata(function: Callable[..., Any]) -> bool:
    """Whether `with_metadata` has adapted a reward."""
    return getattr(function, WANTS_METADATA, False)


@dataclass(frozen=True, repr=False)
class Form(Shown):
    """What samples are turned into for a reward that is not one of tensors.

    Args:
        words: for messages.
        made: from samples (n, *event) without a gradient.
    """

    words: str
    made: Callable[[Tensor], Any]


def form_of(function: Callable[..., Any]) -> Form | None:
    """The form that a function wants its first argument in, by its annotation; None for tensors.

    Raises:
        InvalidInputError: a single picture, or a list of arrays: a reward is called with all samples of a batch.
    """
    annotation = _annotation(function)
    names = set(re.findall(r"\w+", annotation))
    dotted = re.findall(r"[\w.]+", annotation)
    pictures = any(name in ("Image", "PIL.Image") or name.endswith("Image.Image") for name in dotted)  # or its module
    arrays, listed = bool(names & {"ndarray", "NDArray"}), bool(LISTED.match(annotation))
    if "Tensor" in names or not (pictures or arrays):
        return None
    if pictures is not listed:
        raise InvalidInputError(
            f"reward is called with all samples of a batch, and its first argument is annotated as {annotation}; "
            "annotate it as list[PIL.Image.Image] for 8-bit pictures, as np.ndarray for one array of all images, or "
            "as torch.Tensor"
        )
    if pictures:
        return Form("8-bit PIL images", _pictures)
    if names & {"uint8", "UInt8"}:
        return Form("8-bit NumPy arrays", lambda x: _bytes(x) if x.ndim == 4 else _plain(x))
    return Form("NumPy arrays", lambda x: _shown(x).numpy() if x.ndim == 4 else _plain(x))


def of_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same reward as a function of tensors: itself, or one that is called with the samples in its form.

    One that is called with another form returns its scores alone, (n,), in the dtype of the samples, and `given_as`
    says what it is given.

    Raises:
        InvalidInputError: from `form_of`; when called, samples that are no images for a reward of pictures.
        NonFiniteError: when called, pictures of samples that are NaN or infinite.
    """
    form = form_of(function)
    if form is None:
        return function

    @functools.wraps(function)
    def calling(x: Tensor, *condition: Any) -> Any:
        return scores_of(function(form.made(x.detach()), *condition), x).detach().to(x.dtype)

    first, *others = signature_of(function).parameters.values()
    parameters = [first.replace(annotation=Tensor), *others]
    calling.__dict__["__signature__"] = inspect.Signature(parameters)
    calling.__dict__[GIVEN_AS] = form.words
    return calling


def given_as(function: Callable[..., Any]) -> str | None:
    """What a reward is given in place of tensors, in words, if `of_tensors` has adapted it; otherwise None."""
    return getattr(function, GIVEN_AS, None)


def like(function: Callable[..., Any], adapted: Callable[..., Any]) -> Callable[..., Any]:
    """The function, noted as one that hands its samples on to another one, which `of_tensors` may have adapted."""
    if given_as(adapted) is not None:
        function.__dict__[GIVEN_AS] = given_as(adapted)
    return function


def _annotation(function: Callable[..., Any]) -> str:
    """The annotation of the first parameter as text, with the names that it stands for where they can be found."""
    try:
        parameters = list(signature_of(function, eval_str=True).parameters.values())
    except Exception:  # strings with names that only a type checker imports
        try:
            parameters = list(signature_of(function).parameters.values())
        except (TypeError, ValueError):  # built-in functions may have no signature
            return ""
    if not parameters or parameters[0].annotation is inspect.Parameter.empty:
        return ""
    annotation = parameters[0].annotation
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def signature_of(function: Callable[..., Any], *, eval_str: bool = False) -> inspect.Signature:
    """The signature of a function, or of a network's forward pass.

    Raises:
        TypeError: it is not callable.
        ValueError: built-in functions may have none.
    """
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function, eval_str=eval_str)


def _shown(x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n H W C"]:
    """Images in [0, 1] on the CPU, in the operations and the order of diffusers' image processor."""
    return (x * 0.5 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float()


def _bytes(x: Float[Tensor, "n C H W"]) -> UInt8[np.ndarray, "n H W C"]:
    if not x.isfinite().all():
        raise NonFiniteError("the samples are NaN or infinite, and no picture can be made of them for the reward")
    return (255 * _shown(x)).round().to(torch.uint8).numpy()


def _pictures(x: Tensor) -> list[Any]:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InvalidInputError(
            "reward takes PIL images, and only samples of shape (n, 1, H, W) or (n, 3, H, W) become such, got "
            f"{tuple(x.shape)}; annotate its first argument as np.ndarray or torch.Tensor"
        )
    require("PIL")
    from PIL import Image

    pixels = _bytes(x)
    return [Image.fromarray(each[..., 0] if x.shape[1] == 1 else each) for each in pixels]


def _plain(x: Tensor) -> np.ndarray:
    """Samples that are not images, as they are."""
    return x.cpu().clone().numpy()
