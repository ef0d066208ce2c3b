"""Load one part of a pipeline that came from anywhere: a network, a decoder, a text encoder, a scheduler.

    config, headers of the weights  →  the model without memory (`meta` device)  →  its weights, checked

A config is a few lines and can ask for any amount of memory, or for more layers than there is time to build. So the
model is first built without memory, which stops at the first tensor that exceeds what the weights could fill. Then it
is loaded and checked against its files: no weight is missing, none is left over, and all are finite.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from implicit_diffusion.denoisers.half_weights import read_in_single
from implicit_diffusion.denoisers.without_numbers import without_numbers
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.files.reading import one_line, read_json
from implicit_diffusion.models.checkpoints import Checkpoint
from implicit_diffusion.models.code_refusals import part_class, refuse_code

SLACK = 2**20  # numbers that a model may hold in addition to its weights, such as tables of positions
LARGEST_OPTION = 10**6  # largest whole number in a scheduler's config, which has about a thousand timesteps
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _TooLargeError(ValueError):
    """The model has more numbers than the weights could fill."""


def load_model(
    checkpoint: Checkpoint,
    folder: Path,
    part: str,
    what: str,
    source: str,
    trial: Callable[[Any], object] = lambda model: None,
    *,
    own_dtype: bool = False,
) -> Any:
    """A model of diffusers or transformers with all its weights, on the CPU.

    Args:
        checkpoint: of the pipeline.
        folder: where `checkpoint` is laid out.
        part: its name.
        what: the part's name in messages.
        source: the model's name, for messages.
        trial: called with the model without memory before its weights are read; one evaluation, or other checks.
        own_dtype: whether weights that were all saved in one dtype of half precision stay in it; otherwise they are
            in single precision or better.

    Raises:
        InvalidInputError: its class does not exist, its config or weights are damaged, do not belong together or are
            not finite, or it cannot be evaluated.
        MissingExtraError: diffusers or transformers is not installed.
    """
    wanted, headers = without_memory(checkpoint, folder, part, what, source)
    model_class, place, about = type(wanted), folder / part, (checkpoint, folder, source)
    try:
        with torch.no_grad(), without_numbers():
            trial(wanted)
    except InvalidInputError:
        raise
    except Exception as error:
        if "meta" not in str(error).lower():  # otherwise the operation needs numbers, which a meta tensor lacks
            raise refused(what, "evaluated", error, *about) from error
    try:
        return _load(model_class, place, saved_dtype(headers) if own_dtype else torch.float32)
    except Exception as error:
        raise refused(what, "loaded", error, *about) from error


def load_network(
    checkpoint: Checkpoint,
    folder: Path,
    source: str,
    trial: Callable[[Any], object] = lambda model: None,
    *,
    own_dtype: bool = False,
) -> Any:
    """The network of a pipeline. Its weights are frozen if they stay in the dtype that they were saved in, and layers
    then read those of half precision in single precision.

    Arguments and errors as in `load_model`.
    """
    network = load_model(checkpoint, folder, checkpoint.family.part, "network", source, trial, own_dtype=own_dtype)
    if own_dtype:
        read_in_single(network)
    network.register_to_config(_name_or_path="")  # else the local path is saved with the result
    return network


def without_memory(
    checkpoint: Checkpoint, folder: Path, part: str, what: str, source: str
) -> tuple[nn.Module, dict[str, tuple[str, tuple[int, ...]]]]:
    """A model on the meta device in evaluation mode, as its config says, and the headers of its weights, compared.

    Arguments and errors as in `load_model`.
    """
    require("diffusers", "transformers")  # outside of what catches the errors of these libraries
    place = folder / part
    try:
        model_class = part_class(part, *checkpoint.parts[part])
        refuse_code(read_json(place / "config.json"))
        headers = read_headers(place)
        wanted = _build(model_class, place, headers)
        _compare(wanted, headers, strict=checkpoint.parts[part][0] == "diffusers")
    except Exception as error:  # the libraries raise many, depending on the damage
        raise refused(what, "loaded", error, checkpoint, folder, source) from error
    return wanted.eval(), headers


def refused(
    what: str, how: str, error: Exception, checkpoint: Checkpoint, folder: Path, source: str
) -> InvalidInputError:
    """The error for a part that cannot be used: the library's message, with the path that the user knows."""
    words = str(error).replace(str(folder), str(checkpoint.folder)) or type(error).__name__
    return InvalidInputError(f"model: the {what} of {source!r} cannot be {how}: {one_line(words)}")


def read_headers(place: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a model's weights, name → (dtype, shape), without reading them.

    The safetensors library checks that a header's lengths are those of the file.

    Raises:
        ValueError: an index and its files do not agree.
    """
    from safetensors import safe_open

    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    owners: dict[str, str] = {}
    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                headers[name], owners[name] = (tensor.get_dtype(), tuple(tensor.get_shape())), path.name
    for index in place.glob("*.index.json"):
        promised = read_json(index)["weight_map"]
        if promised != owners:
            wrong = sorted(name for name in promised.keys() | owners.keys() if promised.get(name) != owners.get(name))
            raise ValueError(f"{len(wrong)} tensors, such as {wrong[0]!r}, are not in the files that its index names")
    return headers


def saved_dtype(headers: Mapping[str, tuple[str, tuple[int, ...]]]) -> torch.dtype:
    """The narrowest dtype that holds all weights as they were saved."""
    kinds = {kind for kind, _ in headers.values() if kind in FLOATS}
    return functools.reduce(torch.promote_types, (FLOATS[kind] for kind in kinds)) if kinds else torch.float32


def _build(model_class: Any, place: Path, headers: dict[str, tuple[str, tuple[int, ...]]]) -> nn.Module:
    """The model without memory."""
    numbers = 2 * sum(math.prod(shape) for _, shape in headers.values()) + SLACK
    with bounded(numbers, tensors=4 * len(headers) + 100), torch.device("meta"):
        if hasattr(model_class, "config_class"):
            built = model_class(model_class.config_class.from_pretrained(str(place), local_files_only=True))
            built.tie_weights()  # transformers 5.0 leaves that to loading
        else:
            built = model_class.from_config(model_class.load_config(str(place), local_files_only=True))
    assert isinstance(built, nn.Module)
    return built


@contextmanager
def bounded(numbers: int, tensors: int) -> Iterator[None]:
    """Limit how many numbers and tensors the modules that this thread builds inside may register.

    Raises:
        ValueError: at the first tensor beyond either limit.
    """
    thread, seen = threading.get_ident(), [0.0, 0.0]

    def count(module: nn.Module, name: str, tensor: torch.Tensor | nn.Module | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        seen[0] += tensor.numel() if isinstance(tensor, torch.Tensor) else 0
        seen[1] += 1 if isinstance(tensor, torch.Tensor) else 0.1  # there are few modules without a weight
        if seen[0] > numbers or seen[1] > tensors:
            raise _TooLargeError("its config asks for a model much larger than its weights")

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(wanted: nn.Module, headers: dict[str, tuple[str, tuple[int, ...]]], *, strict: bool) -> None:
    """Raise where a weight is not of a floating-point type, or has another shape than the config asks for."""
    for name, tensor in wanted.named_parameters():
        kind, shape = headers.get(name, ("F32", tuple(tensor.shape)))
        if kind not in FLOATS:
            raise ValueError(f"its weight {name!r} is of type {kind}; only {', '.join(FLOATS)} are supported")
        if strict and shape != tuple(tensor.shape):
            raise ValueError(f"its weight {name!r} has shape {shape}, its config asks for {tuple(tensor.shape)}")


def _load(model_class: Any, place: Path, dtype: torch.dtype) -> Any:
    """The model in `dtype` where that is narrower than float32, otherwise in float32 or better."""
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if not hasattr(model_class, "config_class") and not getattr(model_class, "_keep_in_fp32_modules", None):
        options["low_cpu_mem_usage"] = False  # which diffusers refuses where it keeps some modules in single precision
    if dtype.itemsize < 4:
        options["dtype" if hasattr(model_class, "config_class") else "torch_dtype"] = dtype
    with quiet():
        model, info = model_class.from_pretrained(str(place), **options)
    if missing := sorted(info["missing_keys"]):
        # The libraries only warn, and leave these weights random.
        raise ValueError(f"the weights lack {len(missing)} tensors that its config asks for, such as {missing[0]!r}")
    if wrong := sorted(map(str, info.get("mismatched_keys", ()))):
        raise ValueError(f"{len(wrong)} weights have another shape than its config asks for, such as {wrong[0]}")
    if more := sorted(info["unexpected_keys"]):
        raise ValueError(f"the weights hold {len(more)} tensors that its config does not ask for, such as {more[0]!r}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"its weight {name!r} holds NaN or infinity")
    if dtype.itemsize < 4:
        return model.eval()
    return model.float().eval() if any(p.dtype.itemsize < 4 for p in model.parameters()) else model.eval()


def load_scheduler(checkpoint: Checkpoint, source: str) -> Any:
    """The checkpoint's own scheduler.

    Raises:
        InvalidInputError: a class that diffusers does not have, or a config that it cannot be built from.
    """
    require("diffusers")
    import diffusers

    scheduler_class: Any = getattr(diffusers, checkpoint.scheduler_class, None)
    known = isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)
    if not known:
        raise InvalidInputError(
            f"model: {source!r} asks for the scheduler {checkpoint.scheduler_class!r}, which diffusers "
            f"{diffusers.__version__} does not have; set DDPMScheduler or DDIMScheduler in its model_index.json."
        )
    with checkpoint.laid_out() as folder:
        place = folder / "scheduler"
        try:
            for name, value in read_json(place / "scheduler_config.json", finite=False).items():
                if isinstance(value, int | float) and abs(value) > LARGEST_OPTION and float(value).is_integer():
                    raise ValueError(f"its {name} is {value:.4g}, and no scheduler needs more than {LARGEST_OPTION}")
            return scheduler_class.from_pretrained(str(place), local_files_only=True)
        except Exception as error:  # as in load_model
            raise refused("scheduler", "loaded", error, checkpoint, folder, source) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off the progress bars of diffusers and transformers, for loading that takes seconds."""
    require("diffusers", "transformers")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    both = (diffusers_logging, transformers_logging)
    enabled = [library for library in both if library.is_progress_bar_enabled()]
    for library in enabled:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()
