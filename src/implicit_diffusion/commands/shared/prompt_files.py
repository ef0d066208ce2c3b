r"""Files of prompts: lines of text, or lines of JSON with what belongs to each prompt.

    a red house                                                                       FILE.txt
    {"prompt": "a red house", "negative_prompt": "fog", "weight": 2, "metadata": {"id": 7}}     FILE.jsonl

Trajectories draw prompts with probabilities in proportion to their weights, so every average over prompts, the plan's
and the bound's as well, is the weighted one. Guidance goes away from a prompt's negative prompt, which is the empty one
by default. The metadata are for rewards (`reward_values.with_metadata`).

The file is UTF-8, or begins with the byte order mark of UTF-8, UTF-16 or UTF-32. A line ends where a text editor ends
it: at \n, \r\n or \r; blank lines are skipped. Other characters that may be read as the end of a line (a form feed,
U+0085, U+2028, …), and other control characters, which editors do not show, are refused.
"""

from __future__ import annotations

import codecs
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from implicit_diffusion.errors import InvalidInputError, check_path
from implicit_diffusion.files.atomic import replacing
from implicit_diffusion.files.reading import read_bytes

MOST = 2**24  # largest size of a file of prompts, in bytes
MARKS = {  # byte order marks, with the encodings that they announce
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, since it begins with the mark of that
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MARK = "\ufeff"
UNSEEN = ("Cc", "Zl", "Zp")  # control characters, and separators of lines and paragraphs
KEYS = ("prompt", "negative_prompt", "weight", "metadata")
EXAMPLE = '{"prompt": "a red house", "weight": 2, "metadata": {"id": 7}}'


TRAINED, HELD_OUT = "prompts", "held-out-prompts"  # names of a run's own copies
COPIES = tuple(f"{name}{ending}" for name in (TRAINED, HELD_OUT) for ending in (".txt", ".jsonl"))


class Prompt(str):
    """A prompt: its text, with what stands beside it.

    Args:
        text: of the prompt.
        negative: the prompt that guidance goes away from.
        weight: ≥ 0, in proportion to which it is drawn.
        metadata: record for rewards; None where there is none.
        line: of the file, from 1 on.
    """

    negative: str
    weight: float
    metadata: Mapping[str, Any] | None
    line: int

    def __new__(
        cls,
        text: str,
        negative: str = "",
        weight: float = 1.0,
        metadata: Mapping[str, Any] | None = None,
        line: int = 0,
    ) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.negative, prompt.weight, prompt.metadata, prompt.line = negative, weight, metadata, line
        return prompt

    def as_json(self) -> str:
        """The line of a file that `read_prompts` reads this prompt from."""
        content = {"prompt": str(self), "negative_prompt": self.negative, "weight": self.weight}
        return json.dumps(content | ({} if self.metadata is None else {"metadata": self.metadata}))


def of_json_lines(path: Path) -> bool:
    """Whether a file of prompts is one of JSON lines, by the end of its name."""
    return path.suffix.lower() in (".jsonl", ".ndjson")


def copy_of(path: Path, name: str) -> str:
    """The name of a run's own copy of a file of prompts: one of the same kind."""
    return f"{name}{'.jsonl' if of_json_lines(path) else '.txt'}"


def read_prompts(path: str | PathLike[str], option: str = "--prompts") -> list[Prompt]:
    """The prompts of a file, one per line; of JSON lines where the name ends in .jsonl.

    Args:
        path: of the file.
        option: that names it, for messages.

    Raises:
        InvalidInputError: there is no such file, it is not a regular file, has more than `MOST` bytes, another
            encoding, a character that is not shown, a line that is no such JSON (the message names the line), no
            prompts, or none that may be drawn.
    """
    lines = _lines(path, option)
    if of_json_lines(Path(path)):
        prompts = [_record(line, number, f"{option} {path}: line {number}") for number, line in lines]
    else:
        prompts = [Prompt(line.strip(), line=number) for number, line in lines]
        if prompts and prompts[0].startswith("{") and all('"prompt"' in prompt for prompt in prompts):
            raise InvalidInputError(
                f"{option} {path} holds JSON, and its name says text; let the name end in .jsonl, or write the prompts "
                "alone"
            )
    if not prompts:
        raise InvalidInputError(f"{option} {path} holds no prompts; write one per line")
    if not sum(prompt.weight for prompt in prompts) > 0:
        raise InvalidInputError(f"{option} {path}: all weights are 0, so that no prompt is ever drawn; raise one")
    return prompts


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write a file from which `read_prompts` reads the same prompts; one that is there is replaced as a whole."""
    lines = [prompt.as_json() if of_json_lines(path) else str(prompt) for prompt in prompts]
    with replacing(path) as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(path: str | PathLike[str], option: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        contents = read_bytes(check_path(option, path), MOST)
    except InvalidInputError as error:
        raise InvalidInputError(f"{option}: {error}; it must be a text file with one prompt per line") from error
    encoding = next((name for mark, name in MARKS.items() if contents.startswith(mark)), "utf-8")
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError as error:
        at = contents.count(b"\n", 0, error.start) + 1
        raise InvalidInputError(
            f"{option} {path} cannot be read: line {at} is not {encoding} ({error.reason}); save it as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        for character in line:
            if (unicodedata.category(character) in UNSEEN and character != "\t") or character == MARK:
                raise InvalidInputError(
                    f"{option} {path}: line {number} contains the character U+{ord(character):04X}, which editors do "
                    "not show as it is read; remove it, or begin a new line there"
                )
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _record(line: str, number: int, where: str) -> Prompt:
    """The prompt of a line of JSON."""

    def refused(what: str) -> NoReturn:
        raise InvalidInputError(f"{where} {what}; write a line such as {EXAMPLE}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            refused("has a key twice")
        return content

    def constant(name: str) -> NoReturn:
        refused(f"holds {name}, which is no JSON")

    def finite(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refused(f"holds {digits}, which is too large")

    try:
        content = json.loads(line, object_pairs_hook=once, parse_constant=constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        refused(f"is no JSON ({error})")
    if not isinstance(content, dict):
        refused("is no JSON object")
    if unknown := content.keys() - set(KEYS):
        refused(f"has the key {min(unknown)!r}, which is none of {', '.join(KEYS)}; put it into the metadata")
    text, negative = content.get("prompt"), content.get("negative_prompt", "")
    weight, metadata = content.get("weight", 1.0), content.get("metadata")
    if not isinstance(text, str) or not text.strip():
        refused(f"must have a prompt of words, got {text!r}" if "prompt" in content else "has no prompt")
    if not isinstance(negative, str):
        refused(f"must have a negative_prompt of words, got {negative!r}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        refused(f"must have a finite weight ≥ 0, got {weight!r}")
    if metadata is not None and not isinstance(metadata, dict):
        refused(f"must have an object of metadata, got {metadata!r}")
    try:
        (text + negative).encode()
    except UnicodeEncodeError as error:
        refused(f"holds half of a character ({error.reason})")
    return Prompt(text, negative, float(weight), metadata, number)
