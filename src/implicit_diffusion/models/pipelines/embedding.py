"""Embeddings of many prompts, read off a pipeline by chunks of a few.

    chunk      the pipeline runs its first row with a few prompts: what its network is called with are their embeddings
    anchors    prompts with the fewest and the most tokens go with every chunk: what is padded to the longest prompt of
               a call is then padded to the longest of all
    encoders   that are `deferred` are loaded once, one after the other: each answers for all chunks while the others
               answer zeros, and sets the numbers that are others than when all of them answer zeros

The last is exact where every number depends on one encoder, as where their answers stand side by side. Whether it is so
is seen on the samples of a recording; if not, every chunk loads every encoder. Where chunks do not fit together, all
prompts are embedded in one call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map_only

from implicit_diffusion.errors import NonAffineError
from implicit_diffusion.models.pipelines.arguments import Constant, constant_role, same
from implicit_diffusion.models.pipelines.columns import Columns, Entangled, Uneven, by_role, merged, rebuilt
from implicit_diffusion.models.pipelines.cutting import token_counts
from implicit_diffusion.models.pipelines.deferred import Deferral, deferrals_of
from implicit_diffusion.models.pipelines.recording import NetworkCall

CHUNK = 16  # prompts embedded together, besides anchors


class Text(NamedTuple):
    """A prompt, and what it is guided away from; None for what the pipeline's call says."""

    prompt: str
    negative: str | None = None


class Recorded(NamedTuple):
    """The first row of a run of these texts: its calls, and the roles of the arguments of each."""

    texts: list[Text]
    calls: Sequence[NetworkCall]
    roles: list[Any]


Run = Callable[[Sequence[Text]], Sequence[NetworkCall]]  # the calls of the first row


def embedded(run: Run, pipeline: Any, texts: Sequence[Text], recorded: Recorded) -> list[Any]:
    """The roles of the arguments of every call, bound to the values of all texts.

    Args:
        run: of the pipeline.
        pipeline: whose tokenizers and encoders they are.
        texts: at least one, and none twice.
        recorded: see there.

    Raises:
        NonAffineError: an argument depends on the prompts, but not by one entry per prompt.
    """
    encoders, size = deferrals_of(pipeline), CHUNK
    while True:
        chunks = [list(texts[first : first + size]) for first in range(0, len(texts), size)]
        anchors = _anchors(pipeline, texts) if len(chunks) > 1 else []
        try:
            with _saying_once() if len(chunks) > 1 else nullcontext():
                return _Embedding(run, encoders, chunks, anchors, recorded).bound()
        except Uneven as error:
            if size >= len(texts):
                raise NonAffineError(f"pipeline: {error}") from error
            size = len(texts)


@contextmanager
def _saying_once() -> Iterator[None]:
    """Keep what libraries say of every chunk, such as that prompts are cut, to errors."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _anchors(pipeline: Any, texts: Sequence[Text]) -> list[Text]:
    """The shortest and the longest prompt and negative prompt, by each tokenizer."""
    chosen: dict[Text, None] = {}
    for words in zip(*((text.prompt, text.negative or "") for text in texts)):
        for lengths in token_counts(pipeline, words) or [list(map(len, words))]:
            chosen |= dict.fromkeys(texts[lengths.index(extreme)] for extreme in (min(lengths), max(lengths)))
    return list(chosen)


@dataclass(frozen=True)
class _Embedding:
    """Chunks to be embedded, each together with the anchors."""

    run: Run
    encoders: list[Deferral]
    chunks: list[list[Text]]
    anchors: list[Text]
    recorded: Recorded

    def bound(self) -> list[Any]:
        """The roles with the values of all chunks."""
        with ExitStack() as stack:
            for encoder in self.encoders:
                stack.enter_context(encoder.silent())
            roles = self._settled([*self.chunks[0], *self.anchors])
        if len(self.encoders) > 1:
            try:
                return self._one_after_the_other(roles)
            except Entangled:
                pass
        columns = Columns(roles, sum(map(len, self.chunks)))
        with ExitStack() as stack:
            if len(self.encoders) == 1:
                stack.enter_context(self.encoders[0].resident())
            for chunk in self.chunks:
                columns.add(self._entries(columns, chunk, self.anchors), len(chunk))
        return columns.bound()

    def _settled(self, texts: list[Text]) -> list[Any]:
        """The roles under several texts: some that are constant under one are not, such as masks of padding."""
        settled, wider = [], None
        for i, (roles, call) in enumerate(zip(self.recorded.roles, self.run(texts), strict=True)):
            new, recorded = [], by_role(roles, self.recorded.calls[i].arguments)
            for (_, role, one), (name, _, several) in zip(recorded, by_role(roles, call.arguments), strict=True):
                if isinstance(role, Constant) and not same(one, several):
                    wider = wider or self.run([*texts, texts[0]])
                    more = next(value for key, _, value in by_role(roles, wider[i].arguments) if key == name)
                    role = constant_role(name, several, more, len(texts), len(texts) + 1)
                new.append(role)
            settled.append(rebuilt(roles, iter(new)))
        return settled

    def _one_after_the_other(self, roles: list[Any]) -> list[Any]:
        """The same with one encoder in memory at a time.

        Raises:
            Entangled: numbers depend on several encoders.
        """
        few = self.recorded.texts
        columns, trial = Columns(roles, sum(map(len, self.chunks))), Columns(self.recorded.roles, len(few))
        for encoder in self.encoders:
            with ExitStack() as stack:
                for other in self.encoders:
                    stack.enter_context(other.resident() if other is encoder else other.silent())
                self._add(trial, few, [], encoder)
                if encoder is self.encoders[-1]:
                    expected = trial.entries(self.recorded.calls, len(few), len(few))
                    if not same(tree_map_only(Tensor, Tensor.cpu, expected), trial.held(len(few))):
                        raise Entangled
                for chunk in self.chunks:
                    self._add(columns, chunk, self.anchors, encoder)
        return columns.bound()

    def _add(self, columns: Columns, chunk: list[Text], anchors: list[Text], encoder: Deferral) -> None:
        entries = self._entries(columns, chunk, anchors)
        if encoder is not self.encoders[0]:
            with encoder.silent():
                silent = self._entries(columns, chunk, anchors)
            entries = merged(columns.held(len(chunk)), silent, entries)
        columns.add(entries, len(chunk))

    def _entries(self, columns: Columns, chunk: list[Text], anchors: list[Text]) -> list[Any]:
        texts = [*chunk, *anchors]
        return columns.entries(self.run(texts), len(texts), len(chunk))
