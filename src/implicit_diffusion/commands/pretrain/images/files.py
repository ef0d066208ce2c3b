"""The images of a folder: which files are images, and their pixels in eight bits.

Every file below the folder is an image that is loaded, or is left out by name and with a reason, or is an image that
cannot be read, which is an error. Names mean nothing: brackets are not a pattern, "test" is not a split. Links to files
and to folders are followed; what is reached by two ways is loaded once.

Pillow decodes. A file is an image if its contents say so, or if its suffix does: a picture.jpg without an image is an
error, not a file of another kind.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.extras import require
from implicit_diffusion.showing import Shown

# Formats that announce themselves in their first bytes. Left out: those that run another program, as EPS does, stubs
# without a decoder, and formats without a mark, for which Pillow takes files of any kind.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
BY_SUFFIX = ("DDS", "DIB", "ICO", "PCX", "PSD", "SGI", "TGA")  # decoded where the suffix says so
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
Stream = BufferedReader | BytesIO
DEEP = ("I", "F")  # modes of Pillow with more than eight bits


@dataclass(frozen=True, repr=False)
class ImageFile(Shown):
    """An image that can be decoded.

    Args:
        name: for messages, in quotes where it is a file.
        open: its bytes.
        suffix: of its name, in lower case; it tells formats that nothing else tells.
        subfolder: of the folder, that it lies in or below; empty where it lies in none.
    """

    name: str
    open: Callable[[], Stream]
    suffix: str = ""
    subfolder: str = ""


@dataclass
class FolderImages:
    """The images of a folder in the order of their paths, and what is left out, with reasons."""

    pictures: list[ImageFile]
    left_out: list[str]


def find(folder: Path) -> FolderImages:
    """The images below a folder, links included.

    Raises:
        InvalidInputError: something in it that cannot be looked at.
    """
    require("PIL")
    from PIL import Image

    Image.init()
    formats = Image.registered_extensions()
    images, seen = FolderImages([], []), dict[tuple[int, int], str]()
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        name = repr(path.relative_to(folder).as_posix())
        try:
            reason = None if path == folder else _useless(path)
            reason = reason or _again(path, name, seen)
            if reason is None and path.is_dir():
                waiting += sorted(path.iterdir(), reverse=True)
                continue
        except OSError as error:
            raise InvalidInputError(f"data: {str(path)!r} cannot be looked at ({first_line(error)})") from error
        above = path.relative_to(folder).parts[:-1]
        picture = ImageFile(name, partial(_open, path), path.suffix.lower(), above[0] if above else "")
        if (
            reason is None
            and formats.get(picture.suffix) not in (*FORMATS, *BY_SUFFIX, "MPO")
            and not _is_image(picture)
        ):
            reason = "an archive: unpack it" if picture.suffix in ARCHIVES else "not an image"
        if reason is None:
            images.pictures.append(picture)
        else:
            images.left_out.append(f"{name} ({reason})")
    return images


def _open(path: Path) -> Stream:
    return path.open("rb")


def _useless(path: Path) -> str | None:
    """Why something in a folder is not even opened: reading a pipe or a device might never end."""
    if path.name.startswith(".") or path.name == "__MACOSX":
        return "hidden"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
            return "a link to nothing"
        raise
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "neither a file nor a folder"


def _again(path: Path, name: str, seen: dict[tuple[int, int], str]) -> str | None:
    """Whether a file or a folder came before under another name, by a symbolic or a hard link."""
    status = path.stat()
    before = seen.setdefault((status.st_dev, status.st_ino), name) if status.st_ino else name
    return None if before == name else f"the same as {before}"


def _is_image(picture: ImageFile) -> bool:
    require("PIL")
    from PIL import Image

    try:
        with picture.open() as file, Image.open(file, formats=_formats(picture)):
            return True
    except Exception:  # whatever a decoder makes of the bytes of another format
        return False


def _formats(picture: ImageFile) -> list[str]:
    require("PIL")
    from PIL import Image

    Image.init()
    own = Image.registered_extensions().get(picture.suffix)
    return [name for name in (*FORMATS, *BY_SUFFIX) if name in Image.OPEN and (name in FORMATS or name == own)]


def decode(picture: ImageFile) -> tuple[Any, list[str]]:
    """The picture in mode "L" or "RGB", upright, and what of the file is not in it, in words.

    Grey are the modes of grey images and palettes of greys.

    Raises:
        InvalidInputError: it cannot be read, or has more than eight bits per channel.
    """
    require("PIL")
    from PIL import Image, ImageOps

    try:
        with picture.open() as file, Image.open(file, formats=_formats(picture)) as image:
            if _is_deep(image):
                raise InvalidInputError(
                    f"{picture.name} has more than eight bits per channel (mode {image.mode}); convert it to 8 bits"
                )
            lost = [] if getattr(image, "n_frames", 1) == 1 else ["hold several frames, of which the first is used"]
            image.load()
            lost += ["have transparency, which is dropped"] * _is_transparent(image)
            return _eight_bit(ImageOps.exif_transpose(image)), lost
    except InvalidInputError:
        raise
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, ValueError, struct.error, ...
        raise InvalidInputError(f"{picture.name} cannot be read ({first_line(error)})") from error


def _is_deep(image: Any) -> bool:
    """Whether the file has more than eight bits per channel, of which Pillow may hand out the upper eight only."""
    arguments = [part for tile in image.tile for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    sixteen = any(isinstance(part, str) and ";16" in part for part in arguments)
    maximum = image.format == "PPM" and any(isinstance(part, int) and part > 255 for part in arguments)
    return image.mode.startswith(DEEP) or sixteen or maximum


def _is_transparent(image: Any) -> bool:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return bool(image.convert("RGBA").getchannel("A").getextrema()[0] < 255)
    return "transparency" in image.info


def _eight_bit(image: Any) -> Any:
    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode in ("LA", "La"):
        return image.convert("LA").convert("L")
    if image.mode in ("P", "PA"):
        colours = image.convert("RGBA").convert("RGB")
        red, *others = colours.split()
        return red if all(channel.tobytes() == red.tobytes() for channel in others) else colours
    return (image.convert("RGBA") if image.mode == "RGBa" else image).convert("RGB")


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
