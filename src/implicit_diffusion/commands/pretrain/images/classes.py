"""Classes of images: the subfolders that they lie in, in the order of their names, or the labels of the digits.

A model with classes is u(x, t, c), with c the number of a class (`num_class_embeds` of the U-Net). All its samples are
drawn with the classes in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from implicit_diffusion.commands.pretrain.images.files import ImageFile
from implicit_diffusion.commands.pretrain.summary import ImagesSummary
from implicit_diffusion.commands.shared.formatting import markdown
from implicit_diffusion.commands.shared.usage import PipelineUse, usage
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.noise import Noise

NAMED = 10  # files or classes that a line names
ROWS, COLUMNS, LONG = 24, 12, 16  # classes that a picture has a row for, images in a row, letters of a name beside it


def classes_of(pictures: Sequence[ImageFile], data: str) -> tuple[tuple[str, ...], Int[Tensor, " n"]]:
    """The names of the classes, and the number of each picture's class: that of its subfolder.

    Raises:
        InvalidInputError: fewer than two such subfolders, or images outside of them.
    """
    names = sorted({picture.subfolder for picture in pictures} - {""})
    outside = [picture.name for picture in pictures if not picture.subfolder]
    if len(names) < 2:
        raise InvalidInputError(
            f"--classes: the classes of {data!r} are its subfolders with images, and it has {len(names) or 'none'}; "
            "put the images of every class into a subfolder of its own, or leave --classes out"
        )
    if outside:
        raise InvalidInputError(
            f"--classes: {len(outside)} images of {data!r} lie in no subfolder, so that they have no class: "
            f"{listed(outside)}; move them into one, or leave --classes out"
        )
    return tuple(names), torch.tensor([names.index(picture.subfolder) for picture in pictures])


def mention(pictures: Sequence[ImageFile]) -> str | None:
    """A note on subfolders that look like classes but are not used as such; None without such subfolders."""
    names = sorted({picture.subfolder for picture in pictures})
    if len(names) < 2 or "" in names:
        return None
    return (
        f"classes   the {len(names)} subfolders ({listed(names)}) are not used as classes: the model does not "
        "distinguish them; --classes conditions it on them"
    )


def check_split(names: Sequence[str], labels: Int[Tensor, " train"]) -> None:
    """Raise `InvalidInputError` where a class has no image to train on."""
    count = Counter(labels.tolist())
    empty = [name for label, name in enumerate(names) if not count[label]]
    if empty:
        raise InvalidInputError(f"--classes: no image is left to train on, when some are held out, of {listed(empty)}")


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def in_turn(classes: int, count: int) -> Int[Tensor, " count"]:
    """0, 1, …, classes − 1, 0, 1, …"""
    return torch.arange(count) % classes


class InTurn:
    """The condition of a chain whose samples have the classes in turn."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, noise: Noise, batch: int, index: int) -> dict[str, Int[Tensor, " batch"]]:
        """The labels; they do not depend on the noise."""
        return {"class_labels": in_turn(self.classes, batch)}


def to_draw(classes: int) -> int:
    """Samples for a picture: 96, or a row of each class."""
    return max(96, COLUMNS * classes) if classes <= ROWS else 96


def by_class(images: Float[Tensor, "n *event"], labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, "m *event"]:
    """The first images of each class, a row of `COLUMNS` for each; black where there are not as many."""
    black = torch.full_like(images[:1], -1).expand(COLUMNS, *images.shape[1:])
    return torch.cat([torch.cat([images[labels == label], black])[:COLUMNS] for label in range(classes)])


def name_rows(axis: Any, classes: Sequence[str], height: int) -> None:
    """Write the classes beside the rows of a picture whose images are `height` pixels high, each in a frame."""
    axis.set_axis_on()
    axis.spines[:].set_visible(False)
    places = [(height + 2) * (row + 0.5) for row in range(len(classes))]
    axis.set_yticks(places, [name if len(name) <= LONG else f"{name[: LONG - 1]}…" for name in classes])
    axis.set_xticks([])
    axis.tick_params(length=0, labelsize=8)


def card_section(classes: Sequence[str]) -> str:
    """The classes, for a model card; empty where there are none."""
    if not classes:
        return ""
    rows = "\n".join(f"| {label} | {markdown(name)} |" for label, name in enumerate(classes))
    return f"""
## Classes

The network takes the number of a class, `class_labels`. `implicit-diffusion finetune` and `sample` use the model as it
is, and draw the classes in turn or at random. There is no label that stands for no class, so there is no guidance.

| label | class |
|---|---|
{rows}
"""


def drawing(images: ImagesSummary) -> str:
    """Lines of Python that draw from the pipeline, after it is loaded."""
    condition = "classes" if images.classes else None
    use = PipelineUse(50, condition, "DDPMPipeline", images.event_shape, guidance=1.0, num_classes=len(images.classes))
    return usage(use)
