"""Images to pretrain on: the digits, a folder of image files, or a data set of the hub.

Nothing is fetched unless a hub id `owner/name` is asked for by name, and then only after one request with a short
timeout has found it, so that a closed network is an error after seconds. `HF_HUB_OFFLINE=1` takes a data set that is in
the local cache without asking.

Sizes: a U-Net of L levels halves height and width L − 1 times, so both must be multiples of 2^{L−1}. Images are taken
as they are where they fit. Otherwise height and width are rounded to the nearest multiples, and every image is scaled
until it covers that rectangle and cropped around its centre (`PIL.ImageOps.fit`). Nothing is padded: a frame would be
learnt as part of the images. Grey images have one channel, unless one image of the set is in colour; transparency is
dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from implicit_diffusion.denoisers.checkpoints import HUB_ID, HUB_TIMEOUT
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.experiments import digits

HELD_OUT, MOST_HELD_OUT = 0.1, 1000  # share of the images that nothing is trained on, and its limit
SPLIT_SEED = 0
DEEP = ("I", "F")  # modes of PIL with more than eight bits


@dataclass(frozen=True)
class Images:
    """A data set in memory, as bytes or as it came.

    Args:
        train: images to train on; uint8 in 0..255, or floats in [-1, 1].
        held_out: images that nothing is trained on, likewise.
        name: for reports and file names.
    """

    train: Shaped[Tensor, "train channels height width"]
    held_out: Shaped[Tensor, "held_out channels height width"]
    name: str

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


def load_images(data: str, size: tuple[int, int] | None = None, levels: int | None = None) -> Images:
    """The images called `data`.

    Args:
        data: "digits", a folder of image files (subfolders too), or a hub id `owner/name` of the `datasets` library.
        size: (height, width) to bring the images to; by default their own.
        levels: of the U-Net; by default those of the rule (`levels_for`).

    Raises:
        InvalidInputError: nothing of that name can be had; no images in it, or a single one; images of several sizes
            without a `size`; more than eight bits per channel.
        MemoryLimitError: the images do not fit into the memory that is free.
    """
    if data == "digits":
        if size not in (None, digits.EVENT_SHAPE[1:]):
            raise InvalidInputError(f"size: the digits have 8 by 8 pixels, got {size}; leave it out")
        real = digits.load_digits()
        return Images(real.train, real.held_out, "digits")
    if size is not None and min(size) < 4:
        raise InvalidInputError(f"size: height and width must be at least 4 pixels, got {size}")
    if data and Path(data).is_dir():
        rows, name = _folder(Path(data)), Path(data).resolve().name
    elif HUB_ID.fullmatch(data) and not Path(data).exists():
        rows, name = _hub(data), data.split("/")[1]
    else:
        raise InvalidInputError(
            f"data: {data!r} is neither 'digits', nor a folder of images, nor a hub id 'owner/name' such as "
            "'ylecun/mnist' or 'uoft-cs/cifar10'"
        )
    images = _tensor(rows, data, size, levels)
    if len(images) < 2:
        raise InvalidInputError(f"data: {data!r} holds {len(images)} image; at least 2 are needed, one is held out")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    count = max(1, min(MOST_HELD_OUT, int(HELD_OUT * len(images))))
    return Images(images[order[count:]], images[order[:count]], name)


def _folder(folder: Path) -> Any:
    """The images of a folder, in the order of their paths, by the loader of `datasets`."""
    from datasets import load_dataset

    try:
        found = load_dataset("imagefolder", data_dir=str(folder), drop_labels=True, drop_metadata=True)
    except Exception as error:  # FileNotFoundError, DataFilesNotFoundError, DatasetGenerationError, ... by release
        raise InvalidInputError(f"data: {folder} holds no images that can be read ({_first_line(error)})") from error
    return _image_column(found, str(folder))


def _hub(hub_id: str) -> Any:
    """The images of a data set of the hub, or of the local cache under HF_HUB_OFFLINE=1."""
    import huggingface_hub
    from datasets import load_dataset

    advice = "name a folder of images instead, or set HF_HUB_OFFLINE=1 if the data set is in the local cache"
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT)  # one request that is not repeated
        found = load_dataset(hub_id)
    except Exception as error:  # whatever the HTTP library of the day raises
        raise InvalidInputError(
            f"data: {hub_id!r} cannot be had from the hub ({_first_line(error)}); {advice}"
        ) from error
    return _image_column(found, hub_id)


def _image_column(found: Any, name: str) -> Any:
    """The split called train, else the first, reduced to its first column of images."""
    from datasets import Image

    split = found["train"] if "train" in found else next(iter(found.values()))
    columns = [column for column, feature in split.features.items() if isinstance(feature, Image)]
    if not columns:
        raise InvalidInputError(f"data: {name!r} has no column of images; its columns are {', '.join(split.features)}")
    return split.select_columns(columns[:1])


def _tensor(rows: Any, name: str, size: tuple[int, int] | None, levels: int | None) -> Shaped[Tensor, "n c h w"]:
    """All images as bytes, of one size, grey or in colour."""
    from PIL import ImageOps

    images: list[Any] = []
    first = target = (0, 0)
    for image in _decoded(rows, name):
        own = (image.height, image.width)
        if not images:
            first, (height, width) = own, size or own
            target = fitting_size(height, width, levels)
            _check_memory(len(rows), target)
            if target != own:
                print(f"images of {own[0]}×{own[1]} pixels are brought to {target[0]}×{target[1]}")
        if size is None and own != first:
            raise InvalidInputError(
                f"data: {name!r} has images of several sizes, {first[0]}×{first[1]} and {own[0]}×{own[1]} (height × "
                "width); give one with --size HEIGHT WIDTH"
            )
        image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        images.append(image if own == target else ImageOps.fit(image, target[::-1]))
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    arrays = np.stack([np.asarray(image.convert(mode)).reshape(*image.size[::-1], -1) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()


def _decoded(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """PIL images."""
    found = 0
    try:
        for row in rows:
            found += 1
            (image,) = row.values()
            if image.mode.startswith(DEEP):
                raise InvalidInputError(
                    f"data: image {found} of {name!r} has more than eight bits per channel (mode {image.mode}); "
                    "convert it to 8 bits"
                )
            yield image
    except (OSError, SyntaxError) as error:
        raise InvalidInputError(f"data: image {found + 1} of {name!r} cannot be read ({_first_line(error)})") from error
    if not found:
        raise InvalidInputError(f"data: {name!r} holds no images")


def _check_memory(count: int, size: tuple[int, int]) -> None:
    import psutil

    needed, free = 2 * 3 * count * size[0] * size[1], psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"data: {count} images of {size[0]}×{size[1]} pixels need {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} are free; give a smaller --size, or fewer images"
        )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
