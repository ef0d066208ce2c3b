"""chain.json beside a fine-tuned pipeline: the chain that the network was trained for, and what it was trained under.

num_steps     number of rows of the table
table         `ChainTable.to_dict()`
eta           noise of a DDIM scheduler, where it is one
guidance      scale of classifier-free guidance, where the model is conditional
null_class    the label that stands for no class, where one was named
height, width, num_frames     of a sample, where another size was asked for than the model's own
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import LARGEST_INTEGER, InvalidInputError
from implicit_diffusion.files.foreign import inside
from implicit_diffusion.files.reading import one_line, read_json
from implicit_diffusion.models.checkpoints import CHAIN
from implicit_diffusion.models.pipeline_files import names_in
from implicit_diffusion.processes import main_only
from implicit_diffusion.tables.table import ChainTable

SIZES = ("height", "width", "num_frames")
OPTIONS: dict[str, tuple[type, ...]] = {
    "eta": (int, float),
    "guidance": (int, float),
    "null_class": (int,),
    **dict.fromkeys(SIZES, (int,)),
}


@dataclass(frozen=True)
class TrainedChain:
    """The chain that a model was fine-tuned for.

    Args:
        table: of the chain.
        eta: noise of a DDIM scheduler; None for other schedulers.
        guidance: scale of classifier-free guidance in training; None for an unconditional model.
        null_class: the label that stood for no class; None where none was named.
        height: of a sample, in pixels; None for that of the model.
        width: of a sample, in pixels; None for that of the model.
        num_frames: of a video; None for those of the model, and for images.
    """

    table: ChainTable
    eta: float | int | None = None
    guidance: float | int | None = None
    null_class: int | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width; None for those of the model."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@main_only
def write_chain(folder: Path, chain: TrainedChain) -> None:
    """Write chain.json into the folder of a pipeline; options that are None are left out."""
    options = {name: value for name in OPTIONS if (value := getattr(chain, name)) is not None}
    content = {"num_steps": len(chain.table), **options, "table": chain.table.to_dict()}
    (folder / CHAIN).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_chain(folder: Path) -> TrainedChain | None:
    """The chain in the folder of a pipeline; None where there is no chain.json.

    Raises:
        InvalidInputError: the file is damaged.
    """
    if CHAIN not in names_in(folder):
        return None
    try:
        content = read_json(inside(folder, folder / CHAIN))
        table = ChainTable.from_dict(content["table"])
        if content["num_steps"] != len(table):
            raise InvalidInputError(f"num_steps is {content['num_steps']!r}, and its table has {len(table)} rows")
        options: dict[str, Any] = {name: content.get(name) for name in OPTIONS}
        for name, value in options.items():
            if value is not None and (type(value) not in OPTIONS[name] or not math.isfinite(value)):
                raise InvalidInputError(f"{name} is {value!r}")
            if value is not None and name in SIZES and not 1 <= value <= LARGEST_INTEGER:
                raise InvalidInputError(f"{name} is {value!r}")
    except (InvalidInputError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"`model` {folder}: {CHAIN}, the chain that it was fine-tuned for, is damaged ({one_line(error)}); without "
            "this file the folder's own pipeline is sampled"
        ) from error
    return TrainedChain(table, **options)
