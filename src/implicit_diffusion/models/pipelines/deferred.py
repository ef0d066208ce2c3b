"""Text encoders that are in memory only while they are called.

A deferred encoder is a module without memory, so that a pipeline finds its config and dtype where it looks for them. A
call loads the weights, answers, and releases them; the last answers are kept. For many calls in a row it can be made
`resident`, loaded once, or `silent`, so that it answers zeros of the shape that it would answer.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from implicit_diffusion.denoisers.without_numbers import hollow
from implicit_diffusion.files.fingerprints import fingerprint

KEPT = 8  # calls whose answers are kept: a pipeline that is read several times asks for the same embeddings


class Deferral:
    """What stands behind the forward pass of a deferred encoder.

    Args:
        build: the encoder on the meta device.
        load: the encoder with its weights, where the network is.
        place: the device of the network.
    """

    def __init__(
        self, build: Callable[[], nn.Module], load: Callable[[], nn.Module], place: Callable[[], torch.device]
    ) -> None:
        self._build, self._load, self._place = build, load, place
        self._answers: OrderedDict[str, Any] = OrderedDict()
        self._instead: Callable[..., Any] | None = None
        self._zeros: nn.Module | None = None

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The encoder's answer."""
        if self._instead is not None:
            return self._instead(*args, **kwargs)
        key = _key((args, kwargs))
        if key not in self._answers:
            loaded = self._load()
            self._answers[key] = loaded(*args, **kwargs)
            del loaded
            gc.collect()  # modules refer to each other
        self._answers.move_to_end(key)
        while len(self._answers) > KEPT:
            self._answers.popitem(last=False)
        return self._answers[key]

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Context in which the encoder is in memory, and no answer is kept."""
        with self._calling(self._load()):
            yield
        gc.collect()

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Context in which it answers zeros."""
        if self._zeros is None:
            self._zeros = self._build()
            hollow(self._zeros, self._place())
        with self._calling(self._zeros):
            yield

    @contextmanager
    def _calling(self, instead: Callable[..., Any]) -> Iterator[None]:
        before, self._instead = self._instead, instead
        try:
            yield
        finally:
            self._instead = before
            del instead


def deferred(
    build: Callable[[], nn.Module], load: Callable[[], nn.Module], place: Callable[[], torch.device]
) -> nn.Module:
    """An encoder without memory; arguments as of `Deferral`."""
    encoder = build()
    deferral = Deferral(build, load, place)

    @functools.wraps(type(encoder).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return deferral(*args, **kwargs)

    own = inspect.signature(type(encoder).forward)
    forward.__dict__["__signature__"] = own.replace(parameters=list(own.parameters.values())[1:])
    encoder.__dict__.update(forward=forward, deferral=deferral)
    encoder.__class__ = type(
        type(encoder).__name__, (type(encoder),), {"device": property(lambda _: deferral._place())}
    )
    return encoder


def deferrals_of(pipeline: Any) -> list[Deferral]:
    """Those of a pipeline's encoders that are deferred."""
    parts = pipeline.components.values()
    return [part.__dict__["deferral"] for part in parts if "deferral" in getattr(part, "__dict__", ())]


def _key(arguments: Any) -> str:
    """A key of the arguments of a call, by their numbers."""
    leaves, tree = tree_flatten(arguments)
    return repr([tree, *((fingerprint(x), x.device) if isinstance(x, Tensor) else x for x in leaves)])
