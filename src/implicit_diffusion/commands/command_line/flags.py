"""Arguments in the messages of the library, under the names of a command's flags.

The library names arguments, in backquotes or at the beginning of a message: "choose another `path`", "use a smaller
`lr`", "batch must be an integer ≥ 1, got 0", "build it with `clip=False`". On a command line these are flags, and the
table of a command follows from its options. An argument that is not an option of the command keeps its name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from implicit_diffusion.commands.command_line.options import Option, options_of

OPTIONS = {  # by the name of an argument in the library: its options where these are called otherwise; the first counts
    "path": ("run", "out"),
    "folder": ("run", "out"),
    "rank": ("lora_rank",),
    "alpha": ("lora_alpha",),
    "sampler": ("scheduler",),
    "targets": ("lora_targets",),
    "python": ("reward_python",),
    "timeout": ("reward_timeout",),
    "ema_decay": ("ema_decay", "ema"),
}
PHRASES = {  # arguments with a value that an option expresses in another way
    "clip=False": "no_clip=True",
    "clip_sample=False": "no_clip=True",
    "thresholding=False": "no_clip=True",
    "precision=torch.bfloat16": "precision='bf16'",
}


def with_flags(message: str, config: type) -> str:
    """A message of the library in the words of a command.

    Args:
        message: what an error says.
        config: the options of the command.
    """
    options = {option.field: option for option in options_of(config)}

    def leading(match: re.Match[str]) -> str:
        return (_flag(match[1], options) or match[1]) + match[2]

    def quoted(match: re.Match[str]) -> str:
        return _flag(match[1], options) or match[0]

    message = re.sub(r"^(\w+)( must |: )", leading, message)
    return re.sub(r"`([^`]+)`", quoted, message)


def _flag(text: str, options: Mapping[str, Option]) -> str | None:
    """The flag for `name` or `name=value`; None where that is no option."""
    name, equals, value = PHRASES.get(text, text).partition("=")
    option = next((options[field] for field in OPTIONS.get(name, (name,)) if field in options), None)
    if option is None:
        return None
    if not equals:
        return option.name
    try:
        given: Any = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a placeholder, such as WEIGHT
        given = value
    if isinstance(given, bool):
        on, off = option.spellings[0], option.spellings[-1]
        return on if given else off if off != on else None
    return " ".join([option.name, *map(str, given if isinstance(given, list | tuple) else (given,))])
