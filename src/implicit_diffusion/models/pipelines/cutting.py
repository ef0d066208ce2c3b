"""What text encoders will not read: the end of a prompt that is longer than its tokenizer keeps.

A tokenizer keeps the first L − s tokens of a text, where s of its L tokens are its own marks, such as those of begin
and end. L is its `model_max_length`, or the pipeline's `max_sequence_length` where that is smaller: CLIP keeps 77, T5
256 in Stable Diffusion 3 and 512 in FLUX. Pipelines that put a template around the prompt, as those with language
models do, choose L so that the prompt has about as much room as without.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from implicit_diffusion.errors import InvalidInputError, check_integer
from implicit_diffusion.files.reading import one_line
from implicit_diffusion.showing import Shown, brief

NAMED = 5  # prompts in a warning
CHUNK = 1024  # texts that are cut into tokens together
ARGUMENT = "max_sequence_length"  # of a pipeline's call


class CutPromptWarning(UserWarning):
    """A text encoder does not see the end of some prompts."""


@dataclass(frozen=True, repr=False)
class CutPrompt(Shown):
    """A prompt that a tokenizer cuts.

    Attributes:
        index: of the prompt.
        tokenizer: its name in the pipeline.
        tokens: of the whole prompt, without the tokenizer's own marks.
        kept: of them.
        cut: the end of the text, which the encoder does not see.
    """

    index: int
    tokenizer: str
    tokens: int
    kept: int
    cut: str

    def _words(self) -> Iterable[str]:
        return f"index={self.index}", self.tokenizer, f"{self.kept} of {self.tokens} tokens", f"cut={brief(self.cut)}"


def cut_prompts(pipeline: Any, prompts: Sequence[str], *, max_sequence_length: int | None = None) -> list[CutPrompt]:
    """The prompts that a pipeline's tokenizers cut, in their order; a prompt may be cut by several.

    Args:
        pipeline: of diffusers, or its tokenizers by name. Tokenizers are all parts with a `model_max_length` that can
            be called.
        prompts: m texts.
        max_sequence_length: given to the pipeline's call; None for its default.

    Raises:
        InvalidInputError: `prompts` are not strings; a pipeline without parts.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not all(isinstance(p, str) for p in prompts):
        raise InvalidInputError(f"prompts must be a list of strings, got {one_line(repr(prompts))[:80]}")
    parts = pipeline if isinstance(pipeline, Mapping) else getattr(pipeline, "components", None)
    if not isinstance(parts, Mapping):
        raise InvalidInputError(
            f"pipeline must be one of diffusers, or map names to tokenizers, got {type(pipeline).__name__}"
        )
    if max_sequence_length is None:
        max_sequence_length = _default(pipeline)
    else:
        check_integer("max_sequence_length", max_sequence_length)
    cuts = [
        CutPrompt(first + i, name, tokens, kept, cut)
        for name, tokenizer in tokenizers_of(parts).items()
        for first in range(0, len(prompts), CHUNK)
        for i, tokens, kept, cut in _cut(tokenizer, list(prompts[first : first + CHUNK]), max_sequence_length)
    ]
    return sorted(cuts, key=lambda each: each.index)


def warn_of_cuts(pipeline: Any, prompts: Sequence[str], *, max_sequence_length: int | None = None) -> None:
    """Warn of prompts that are cut, and of what is lost; arguments as in `cut_prompts`."""
    cuts = cut_prompts(pipeline, prompts, max_sequence_length=max_sequence_length)
    for name in dict.fromkeys(each.tokenizer for each in cuts):
        own = [each for each in cuts if each.tokenizer == name]
        several = "1 prompt is" if len(own) == 1 else f"{len(own)} prompts are"
        lost = "; ".join(f"{brief(prompts[each.index])} loses {brief(each.cut)}" for each in own[:NAMED])
        more = f"; and {len(own) - NAMED} more" if len(own) > NAMED else ""
        words = f"{several} longer than the {own[0].kept} tokens that {name} keeps: {lost}{more}"
        warnings.warn(f"prompts: {words}", CutPromptWarning, stacklevel=2)


def token_counts(pipeline: Any, texts: Sequence[str]) -> list[list[int]]:
    """How many tokens texts have by each of a pipeline's tokenizers, which may be none."""
    return [
        [
            len(ids)
            for first in range(0, len(texts), CHUNK)
            for ids in tokenizer(
                list(texts[first : first + CHUNK]), add_special_tokens=False, truncation=False, verbose=False
            )["input_ids"]
        ]
        for tokenizer in tokenizers_of(pipeline.components).values()
    ]


def tokenizers_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """All parts with a `model_max_length` that can be called."""
    return {name: part for name, part in parts.items() if hasattr(part, "model_max_length") and callable(part)}


def _default(pipeline: Any) -> int | None:
    """The pipeline's own max_sequence_length."""
    call: Callable[..., Any] | None = None if isinstance(pipeline, Mapping) else type(pipeline).__call__
    argument = None if call is None else inspect.signature(call).parameters.get(ARGUMENT)
    return argument.default if argument is not None and isinstance(argument.default, int) else None


def _cut(tokenizer: Any, texts: list[str], longest: int | None) -> Iterator[tuple[int, int, int, str]]:
    """Of every text that is cut: its number, its tokens, those that are kept, and its end."""
    limit = tokenizer.model_max_length if longest is None else min(tokenizer.model_max_length, longest)
    kept = max(0, limit - tokenizer.num_special_tokens_to_add())
    placed = {"return_offsets_mapping": True} if getattr(tokenizer, "is_fast", False) else {}
    tokens = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False, **placed)
    for i, (text, ids) in enumerate(zip(texts, tokens["input_ids"], strict=True)):
        if len(ids) > kept:
            end = text[tokens["offset_mapping"][i][kept][0] :] if placed else tokenizer.decode(ids[kept:])
            yield i, len(ids), kept, end
