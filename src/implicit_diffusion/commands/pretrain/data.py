"""Images to pretrain on: the digits, a folder of image files, or a data set of the hub.

Nothing is fetched unless a hub id `owner/name` is asked for by name, and then only after one request with a short
timeout has found it, so that a closed network is an error after seconds. `HF_HUB_OFFLINE=1` takes a data set that is in
the local cache without asking.

Sizes: a U-Net of L levels halves height and width L − 1 times, so both must be multiples of 2^{L−1}. Images are taken
as they are where they fit. Otherwise height and width are rounded to the nearest multiples, and every image is scaled
until it covers that rectangle and cropped around its centre (`PIL.ImageOps.fit`). Nothing is padded: a frame would be
learnt as part of the images. Grey images have one channel, unless one image of the set is in colour; transparency is
dropped, and of several frames the first is taken, both with a word.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from implicit_diffusion import digits
from implicit_diffusion.commands.pretrain import image_classes
from implicit_diffusion.commands.pretrain.image_classes import listed
from implicit_diffusion.commands.pretrain.image_files import ARCHIVES, Found, Picture, Stream, decode, find, first_line
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.models.checkpoints import HUB_ID, HUB_TIMEOUT
from implicit_diffusion.showing import Shown

HELD_OUT, MOST_HELD_OUT = 0.1, 1000  # share of the images that nothing is trained on, and its limit
SPLIT_SEED = 0


@dataclass(frozen=True, repr=False)
class Images(Shown):
    """A data set in memory, as bytes or as it came.

    Args:
        train: images to train on; uint8 in 0..255, or floats in [-1, 1].
        held_out: images that nothing is trained on, likewise.
        name: for reports and file names.
        left_out: files that are not among the images, each with the reason.
        classes: their names, where the images have classes that are asked for.
        train_labels, held_out_labels: the number of every image's class; None without classes.
    """

    train: Shaped[Tensor, "train channels height width"]
    held_out: Shaped[Tensor, "held_out channels height width"]
    name: str
    left_out: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    train_labels: Int[Tensor, " train"] | None = None
    held_out_labels: Int[Tensor, " held_out"] | None = None

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width


def as_floats(images: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels in [-1, 1]."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def levels_for(height: int, width: int) -> int:
    """Levels of the U-Net: as many as leave at least 4 pixels of the shorter side at the lowest, 2 to 5."""
    return max(2, min(5, min(height, width).bit_length() - 2))


def widths_for(height: int, width: int) -> tuple[int, ...]:
    """Channels of the levels: w, 2w, 2w, …, with w = 24 up to 8 pixels of the shorter side, 32 up to 16, else 64.

    One level less than `levels_for` where the longer side cannot be halved as often.
    """
    shorter, levels = min(height, width), levels_for(height, width)
    while height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        levels -= 1
    w = 24 if shorter <= 8 else 32 if shorter <= 16 else 64
    return (w,) + (2 * w,) * (levels - 1)


def fitting_size(height: int, width: int, levels: int | None = None) -> tuple[int, int]:
    """The nearest height and width that `levels` levels (by default those of the rule) can halve."""
    multiple = 2 ** ((levels or levels_for(height, width)) - 1)
    return max(multiple, multiple * round(height / multiple)), max(multiple, multiple * round(width / multiple))


def load_images(
    data: str, size: tuple[int, int] | None = None, levels: int | None = None, *, classes: bool = False
) -> Images:
    """The images called `data`; what of a folder is left out is printed, with reasons.

    Args:
        data: "digits", a folder of image files (subfolders too), or a hub id `owner/name` of the `datasets` library.
        size: (height, width) to bring the images to; by default their own.
        levels: of the U-Net; by default those of the rule (`levels_for`).
        classes: with the classes of the images: the folder's subfolders, or the labels of the digits.

    Raises:
        InvalidInputError: nothing of that name can be had; no images in it, or a single one; images that cannot be read
            or have more than eight bits per channel; images of several sizes without a `size`; classes that are not
            there, or of which no image is left to train on.
        MemoryLimitError: the images do not fit into the memory that is free.
    """
    if data == "digits":
        if size not in (None, digits.EVENT_SHAPE[1:]):
            raise InvalidInputError(f"size: the digits have 8 by 8 pixels, got {size}; leave it out")
        real = digits.load_digits()
        if not classes:
            return Images(real.train, real.held_out, "digits")
        names = tuple("0123456789")
        return Images(real.train, real.held_out, "digits", (), names, real.train_labels, real.held_out_labels)
    if size is not None and min(size) < 4:
        raise InvalidInputError(f"size: height and width must be at least 4 pixels, got {size}")
    if data and os.path.isdir(data):  # unlike Path.is_dir, it takes names of any length
        found, name = _folder(Path(data)), Path(data).resolve().name
    elif HUB_ID.fullmatch(data) and not os.path.exists(data):
        if classes:
            raise InvalidInputError(
                f"--classes is for folders with class subfolders and for the digits, not for {data} of the hub"
            )
        found, name = _hub(data), data.split("/")[1]
    else:
        archive = "; an archive has to be unpacked first" if data.lower().endswith(ARCHIVES) else ""
        raise InvalidInputError(
            f"data: {data!r} is neither 'digits', nor a folder of images, nor a hub id 'owner/name' such as "
            f"'ylecun/mnist' or 'uoft-cs/cifar10'{archive}"
        )
    if found.left_out:
        print(f"left out: {listed(found.left_out)}")
    names, labels = image_classes.classes_of(found.pictures, data) if classes else ((), None)
    line = None if classes else image_classes.mention(found.pictures)
    if line is not None:
        print(line)
    images = _tensor(found.pictures, data, size, levels)
    if len(images) < 2:
        raise InvalidInputError(f"data: {data!r} holds {len(images)} image; at least 2 are needed, one is held out")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    count = max(1, min(MOST_HELD_OUT, int(HELD_OUT * len(images))))
    train, held_out = order[count:], order[:count]
    kept = Images(images[train], images[held_out], name, tuple(found.left_out), names)
    if labels is None:
        return kept
    image_classes.check_split(names, labels[train])
    return replace(kept, train_labels=labels[train], held_out_labels=labels[held_out])


def _folder(folder: Path) -> Found:
    """The images of a folder."""
    found = find(folder)
    if not found.pictures:
        left_out = f"; left out: {listed(found.left_out)}" if found.left_out else ""
        raise InvalidInputError(f"data: {str(folder)!r} holds no images that can be read{left_out}")
    return found


def _hub(hub_id: str) -> Found:
    """The images of a data set of the hub, or of the local cache under HF_HUB_OFFLINE=1.

    They are those of the split called train, else of the first, in its first column of images.
    """
    import huggingface_hub
    from datasets import Image, load_dataset

    advice = "name a folder of images instead, or set HF_HUB_OFFLINE=1 if the data set is in the local cache"
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT)  # one request that is not repeated
        found = load_dataset(hub_id)
    except Exception as error:  # whatever the HTTP library of the day raises
        raise InvalidInputError(
            f"data: {hub_id!r} cannot be had from the hub ({first_line(error)}); {advice}"
        ) from error
    chosen = "train" if "train" in found else next(iter(found))
    split = found[chosen]
    columns = [column for column, feature in split.features.items() if isinstance(feature, Image)]
    if not columns:
        raise InvalidInputError(
            f"data: {hub_id!r} has no column of images; its columns are {', '.join(split.features)}"
        )
    encoded = split.select_columns(columns[:1]).cast_column(columns[0], Image(decode=False))
    pictures = [
        Picture(f"image {i + 1} of {hub_id!r}", partial(_row, encoded, i, columns[0])) for i in range(len(split))
    ]
    if not pictures:
        raise InvalidInputError(f"data: {hub_id!r} holds no images")
    left_out = [f"the split {other!r}" for other in found if other != chosen]
    return Found(pictures, left_out + [f"the column {other!r} of images" for other in columns[1:]])


def _row(rows: Any, i: int, column: str) -> Stream:
    """The bytes of an image of a data set."""
    content = rows[i][column]
    if content is None:
        raise ValueError("it is missing")
    return Path(content["path"]).open("rb") if content["bytes"] is None else BytesIO(content["bytes"])


def _tensor(
    pictures: Sequence[Picture], name: str, size: tuple[int, int] | None, levels: int | None
) -> Shaped[Tensor, "n c h w"]:
    """All images as bytes, of one size, grey or in colour; all that cannot be read are named at once."""
    from PIL import ImageOps

    images: list[Any] = []
    refused: list[str] = []
    lost: dict[str, list[str]] = {}
    first = target = (0, 0)
    for picture in pictures:
        try:
            image, less = decode(picture)
        except InvalidInputError as error:
            refused.append(str(error))
            continue
        for what in less:
            lost.setdefault(what, []).append(picture.name)
        own = (image.height, image.width)
        if first == (0, 0):
            first, (height, width) = own, size or own
            target = fitting_size(height, width, levels)
            _check_memory(len(pictures), target)
            if target != own:
                print(f"images of {own[0]}×{own[1]} pixels are brought to {target[0]}×{target[1]}")
        if size is None and own != first:
            raise InvalidInputError(
                f"data: {name!r} has images of several sizes, {first[0]}×{first[1]} and {own[0]}×{own[1]} (height × "
                f"width, {picture.name}); give one with --size HEIGHT WIDTH"
            )
        images.append(image if own == target else ImageOps.fit(image, target[::-1]))
    if refused:
        raise InvalidInputError(
            f"data: {len(refused)} of {len(pictures)} images of {name!r} cannot be used: {listed(refused)}"
        )
    for what, names in lost.items():
        print(f"{len(names)} of {len(images)} images {what}: {listed(names)}")
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    arrays = np.stack([np.asarray(image.convert(mode)).reshape(*image.size[::-1], -1) for image in images])
    copies = len(arrays) - len({sha256(array.tobytes()).digest() for array in arrays})
    if copies:
        print(f"{copies} of {len(arrays)} images are copies of others, pixel by pixel; some may be held out")
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _check_memory(count: int, size: tuple[int, int]) -> None:
    import psutil

    needed, free = 2 * 3 * count * size[0] * size[1], psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"data: {count} images of {size[0]}×{size[1]} pixels need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} are free; give a smaller --size, or fewer images"
        )
