"""Images to pretrain on: the digits, a folder of image files, arrays, IDX files, or a data set of the hub.

Nothing is fetched unless a hub id `owner/name` is asked for by name, and then only after one request with a short
timeout has found it, so that a closed network is an error after seconds. With `HF_HUB_OFFLINE=1`, a data set that is in
the local cache is used without asking.

Sizes: a U-Net of L levels halves height and width L − 1 times, so both must be multiples of 2^{L−1}. Images are used
as they are where they fit. Otherwise height and width are rounded to the nearest multiples, and every image is scaled
until it covers that rectangle and cropped around its centre (`PIL.ImageOps.fit`). Nothing is padded: a frame would be
learnt as part of the images. Grey images have one channel, unless one image of the set is in colour; transparency is
dropped, and of several frames the first is used; both are said.
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

from implicit_diffusion.commands.pretrain.images import classes as image_classes
from implicit_diffusion.commands.pretrain.images.arrays import is_array, load_array
from implicit_diffusion.commands.pretrain.images.classes import listed
from implicit_diffusion.commands.pretrain.images.files import (
    ARCHIVES,
    FolderImages,
    ImageFile,
    Stream,
    decode,
    find,
    first_line,
)
from implicit_diffusion.commands.pretrain.network import fitting_size
from implicit_diffusion.commands.shared.arrays.idx import PACKAGES
from implicit_diffusion.digits import EVENT_SHAPE, load_digits
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.extras import require
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


def load_images(
    data: str, size: tuple[int, int] | None = None, levels: int | None = None, *, classes: bool = False
) -> Images:
    """The images called `data`; what of a folder is left out is printed, with reasons.

    Args:
        data: "digits", a folder of image files (subfolders too), an array or a folder of IDX files (`arrays`), a
            data set of `idx.PACKAGES`, or a hub id `owner/name` of the `datasets` library.
        size: (height, width) to bring the images to; by default their own.
        levels: of the U-Net; by default those of the rule (`levels_for`).
        classes: with the classes of the images: the folder's subfolders, or the labels of digits and arrays.

    Raises:
        InvalidInputError: nothing of that name can be had; no images in it, or a single one; images that cannot be read
            or have more than eight bits per channel; images of several sizes without a `size`; classes that are not
            there, or of which no image is left to train on.
        MemoryLimitError: the images do not fit into the memory that is free.
    """
    if data == "digits":
        if size not in (None, EVENT_SHAPE[1:]):
            raise InvalidInputError(f"size: the digits have 8 by 8 pixels, got {size}; leave it out")
        real = load_digits()
        if not classes:
            return Images(real.train, real.held_out, "digits")
        names = tuple("0123456789")
        return Images(real.train, real.held_out, "digits", (), names, real.train_labels, real.held_out_labels)
    if size is not None and min(size) < 4:
        raise InvalidInputError(f"size: height and width must be at least 4 pixels, got {size}")
    if is_array(data):
        array = load_array(data, size, levels, classes=classes)
        name, left_out, names, labels, images = array.name, array.left_out, array.classes, array.labels, array.images
    else:
        source, name = _source(data, classes=classes)
        left_out = tuple(source.left_out)
        names, labels = image_classes.classes_of(source.pictures, data) if classes else ((), None)
        line = None if classes else image_classes.mention(source.pictures)
        if line is not None:
            print(line)
        images = _tensor(source.pictures, data, size, levels)
    if left_out:
        print(f"left out: {listed(left_out)}")
    _mention_copies(images)
    if len(images) < 2:
        raise InvalidInputError(f"data: {data!r} holds {len(images)} image; at least 2 are needed, one is held out")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    count = max(1, min(MOST_HELD_OUT, int(HELD_OUT * len(images))))
    train, held_out = order[count:], order[:count]
    kept = Images(images[train], images[held_out], name, left_out, names)
    if labels is None:
        return kept
    image_classes.check_split(names, labels[train])
    return replace(kept, train_labels=labels[train], held_out_labels=labels[held_out])


def _source(data: str, *, classes: bool) -> tuple[FolderImages, str]:
    """Image files, and what they are called."""
    if data and os.path.isdir(data):  # unlike Path.is_dir, it takes names of any length
        return _folder(Path(data)), Path(data).resolve().name
    if HUB_ID.fullmatch(data) and not os.path.exists(data):
        if classes:
            raise InvalidInputError(
                f"--classes is for folders with class subfolders, for arrays and for the digits, not for {data} of the "
                "hub"
            )
        return _hub(data), data.split("/")[1]
    archive = "; an archive has to be unpacked first" if data.lower().endswith(ARCHIVES) else ""
    raise InvalidInputError(
        f"data: {data!r} is neither 'digits' nor {' nor '.join(map(repr, PACKAGES))}, nor a folder of images or IDX "
        "files, nor an array (.npy, .npz, .safetensors, …-ubyte.gz), nor a hub id 'owner/name' such as 'ylecun/mnist' "
        f"or 'uoft-cs/cifar10'{archive}"
    )


def _folder(folder: Path) -> FolderImages:
    """The images of a folder."""
    images = find(folder)
    if not images.pictures:
        left_out = f"; left out: {listed(images.left_out)}" if images.left_out else ""
        raise InvalidInputError(f"data: {str(folder)!r} holds no images that can be read{left_out}")
    return images


def _hub(hub_id: str) -> FolderImages:
    """The images of a data set of the hub, or of the local cache under HF_HUB_OFFLINE=1.

    They are those of the split called train, else of the first, in its first column of images.
    """
    require("datasets", "huggingface_hub")
    import huggingface_hub
    from datasets import Image, load_dataset

    advice = "name a folder of images instead, or set HF_HUB_OFFLINE=1 if the data set is in the local cache"
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT)  # one request that is not repeated
        splits = load_dataset(hub_id)
    except Exception as error:  # whatever the HTTP library of the day raises
        raise InvalidInputError(
            f"data: {hub_id!r} cannot be loaded from the hub ({first_line(error)}); {advice}"
        ) from error
    chosen = "train" if "train" in splits else next(iter(splits))
    split = splits[chosen]
    columns = [column for column, feature in split.features.items() if isinstance(feature, Image)]
    if not columns:
        raise InvalidInputError(
            f"data: {hub_id!r} has no column of images; its columns are {', '.join(split.features)}"
        )
    encoded = split.select_columns(columns[:1]).cast_column(columns[0], Image(decode=False))
    pictures = [
        ImageFile(f"image {i + 1} of {hub_id!r}", partial(_row, encoded, i, columns[0])) for i in range(len(split))
    ]
    if not pictures:
        raise InvalidInputError(f"data: {hub_id!r} holds no images")
    left_out = [f"the split {other!r}" for other in splits if other != chosen]
    return FolderImages(pictures, left_out + [f"the column {other!r} of images" for other in columns[1:]])


def _row(rows: Any, i: int, column: str) -> Stream:
    """The bytes of an image of a data set."""
    content = rows[i][column]
    if content is None:
        raise ValueError("it is missing")
    return Path(content["path"]).open("rb") if content["bytes"] is None else BytesIO(content["bytes"])


def _tensor(
    pictures: Sequence[ImageFile], name: str, size: tuple[int, int] | None, levels: int | None
) -> Shaped[Tensor, "n c h w"]:
    """All images as bytes, of one size, grey or in colour; all that cannot be read are named at once."""
    require("PIL")
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
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _mention_copies(images: Shaped[Tensor, "n c h w"]) -> None:
    copies = len(images) - len({sha256(image.tobytes()).digest() for image in images.numpy()})
    if copies:
        print(f"{copies} of {len(images)} images are copies of others, pixel by pixel; some may be held out")


def _check_memory(count: int, size: tuple[int, int]) -> None:
    import psutil

    needed, free = 2 * 3 * count * size[0] * size[1], psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"data: {count} images of {size[0]}×{size[1]} pixels need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} are free; give a smaller --size, or fewer images"
        )
