"""Folders of images as people have them: every file is loaded once, or left out by name, or refused by name."""

import ast
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from implicit_diffusion.commands.pretrain.images.files import ImageFile, decode, find
from implicit_diffusion.commands.pretrain.images.loading import listed, load_images
from implicit_diffusion.errors import InvalidInputError


def pixels(seed, mode="RGB", size=(8, 8)):
    draws = np.random.default_rng(seed).integers(0, 256, (*size, 3) if mode == "RGB" else size, dtype=np.uint8)
    return Image.fromarray(draws)


def write(folder, *names, mode="RGB", seed=0):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.suffix.lower() in Image.registered_extensions()
        pixels(seed + i, mode).save(path, format=None if known else "PNG")
    return folder


def names(folder):
    return [ast.literal_eval(picture.name) for picture in find(folder).pictures]


def png(colour_type, channels, depth=16, claims=8):
    """A PNG by hand, since Pillow writes none of more than eight bits in colour, nor one that claims another size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(8 * channels * depth // 8) for _ in range(8))
    head = struct.pack(">IIBBBBB", claims, claims, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "test",
        "validation-0",
        "set [final]",
        "a*",
        "what?",
        "{a,b}",
        "100 %",
        "#1",
        "__pycache__",
        "ünï",
        "a\nb",
    ],
)
def test_names_mean_nothing(name, tmp_path):
    """In the name of the folder, of a folder in it, and of a file; what lies beside them is not taken along."""
    write(tmp_path / name, f"{name}/{name}.png", f"{name}.PNG", "other/x.jpeg")
    write(tmp_path / "a-other", "b.png")
    images = load_images(str(tmp_path / name))
    assert len(images.train) + len(images.held_out) == 3 and images.left_out == () and images.name == name
    assert names(tmp_path / name) == sorted([f"{name}.PNG", f"{name}/{name}.png", "other/x.jpeg"], key=by_parts)


def by_parts(path):
    return path.split("/")


def test_a_name_that_is_not_text_is_shown_in_one_line_of_ascii(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff\n.txt")
    with open(path, "wb"):
        pass
    (said,) = find(tmp_path).left_out
    assert said == "'\\udcff\\n.txt' (not an image)" and said.encode()


def test_links_are_followed_once(tmp_path):
    """Links to files and folders, a circle, hard links, a link to nothing, a link to itself."""
    outside = write(tmp_path / "outside", "a.png", "b.png", "deep/c.png")
    folder = write(tmp_path / "folder", "one.png")
    (folder / "all").symlink_to(outside)
    (folder / "again").symlink_to(outside / "deep")
    (folder / "b.png").symlink_to(outside / "b.png")
    (outside / "deep" / "up").symlink_to(folder)
    (folder / "hard.png").hardlink_to(folder / "one.png")
    (folder / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "own.png").symlink_to(folder / "own.png")
    listing = find(folder)
    assert names(folder) == ["again/c.png", "all/a.png", "all/b.png", "hard.png"]
    assert listing.left_out == [
        "'again/up' (the same as '.')",
        "'all/deep' (the same as 'again')",
        "'b.png' (the same as 'all/b.png')",
        "'lost.png' (a link to nothing)",
        "'one.png' (the same as 'hard.png')",
        "'own.png' (a link to nothing)",
    ]


def test_what_is_no_image_is_left_out_by_name(tmp_path, capsys):
    folder = write(tmp_path / "mixed", "a.png", "b.webp", "c.TIFF", "d.gif", "e.bmp", "f", "g.jpg.part", "h.tga")
    for name in ("labels.csv", "Thumbs.db", "notes", "model.h5", "page.pdf", "drawing.eps", ".DS_Store", "._a.png"):
        (folder / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n" if name == "drawing.eps" else b"\x00\x01words\x00")
    write(folder, ".thumbnails/a.png", "__MACOSX/a.png", seed=9)
    (folder / "images.zip").write_bytes(b"PK\x03\x04")
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    images = load_images(str(folder))
    assert len(images.train) + len(images.held_out) == 8
    reasons = dict(said.rsplit(" (", 1) for said in images.left_out)
    assert reasons == {
        "'.DS_Store'": "hidden)",
        "'._a.png'": "hidden)",
        "'.thumbnails'": "hidden)",
        "'Thumbs.db'": "not an image)",
        "'__MACOSX'": "hidden)",
        "'drawing.eps'": "not an image)",
        "'images.zip'": "an archive: unpack it)",
        "'labels.csv'": "not an image)",
        "'model.h5'": "not an image)",
        "'notes'": "not an image)",
        "'page.pdf'": "not an image)",
        "'pipe.png'": "neither a file nor a folder)",
        "'zero.png'": "neither a file nor a folder)",
    }
    said = capsys.readouterr().out
    assert said.startswith("left out: '.DS_Store' (hidden), ") and "and 3 more" in said
    assert listed(["a"] * 10) == ", ".join(["a"] * 10) and listed([]) == ""


def test_archives_alone_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(InvalidInputError, match=r"holds no images.*'images.zip' \(an archive: unpack it\)"):
        load_images(str(tmp_path))
    with pytest.raises(InvalidInputError, match=r"neither 'digits'.*an archive has to be unpacked"):
        load_images(str(tmp_path / "images.zip"))
    with pytest.raises(InvalidInputError, match="neither 'digits'"):
        load_images("x" * 5000)


def palette(colours):
    """An image of 256 indices with a palette of these colours, and the same image without one."""
    index = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(index).copy()
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image, colours.astype(np.uint8)[index]


GREYS = np.repeat(np.arange(255, -1, -1)[:, None], 3, axis=1)
COLOURS = np.random.default_rng(4).integers(0, 256, (256, 3))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(content, suffix=""):
    return decode(ImageFile("x", lambda: io.BytesIO(content), suffix))


def test_palettes_are_what_their_colours_are():
    """A palette of greys is grey, whatever the order of its indices; of colours, in colour."""
    image, _ = palette(GREYS)
    decoded, _ = opened(encoded(image))
    assert decoded.mode == "L" and np.array_equal(np.asarray(decoded), GREYS[:, 0].reshape(16, 16))
    image, expected = palette(COLOURS)
    decoded, lost = opened(encoded(image))
    assert decoded.mode == "RGB" and np.array_equal(np.asarray(decoded), expected) and lost == []
    decoded, lost = opened(encoded(image, transparency=bytes(range(256))))
    assert np.array_equal(np.asarray(decoded), expected) and lost == ["have transparency, which is dropped"]


def test_every_mode_is_converted_or_refused_by_name():
    colour, plain = pixels(1), pixels(2, "L")
    alpha = pixels(3, "L")
    with_alpha = colour.copy()
    with_alpha.putalpha(alpha)
    grey_alpha = Image.merge("LA", (plain, alpha))
    opaque = colour.copy()
    opaque.putalpha(255)
    dropped = ["have transparency, which is dropped"]
    for content, expected, lost in (
        (encoded(colour), colour, []),
        (encoded(plain), plain, []),
        (encoded(with_alpha), colour, dropped),
        (encoded(opaque), colour, []),
        (encoded(grey_alpha), plain, dropped),
        (encoded(plain.convert("1")), plain.convert("1").convert("L"), []),
        (encoded(colour.convert("CMYK"), "TIFF"), colour, []),
        (encoded(colour.convert("YCbCr"), "TIFF"), colour.convert("YCbCr").convert("RGB"), []),
        (encoded(plain, transparency=7), plain, dropped),
    ):
        decoded, less = opened(content)
        assert decoded.mode == expected.mode and decoded.tobytes() == expected.tobytes() and less == lost
    deep = Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
    for content in (
        encoded(deep),
        encoded(deep.convert("I"), "TIFF"),
        encoded(deep.convert("F"), "TIFF"),
        png(2, 3),
        png(4, 2),
        png(6, 4),
        b"P6 2 2 65535\n" + bytes(24),
    ):
        with pytest.raises(InvalidInputError, match=r"^x has more than eight bits per channel .*convert it to 8 bits$"):
            opened(content)


def test_images_are_upright():
    """EXIF orientation 6: the camera was turned; its rows are columns, from the right."""
    image, exif = pixels(0, size=(4, 6)), Image.Exif()
    exif[0x0112] = 6
    decoded, _ = opened(encoded(image, exif=exif))
    assert np.array_equal(np.asarray(decoded), np.rot90(np.asarray(image), -1))


def test_the_first_of_several_frames_is_taken_with_a_word(tmp_path, capsys):
    frames = [pixels(i, "L") for i in range(3)]
    for name in ("a.gif", "b.png", "c.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    images = load_images(str(tmp_path))
    for image in torch.cat([images.train, images.held_out]):
        assert np.array_equal(image[0].numpy(), np.asarray(frames[0]))
    said = capsys.readouterr().out
    assert "3 of 3 images hold several frames, of which the first is used: 'a.gif', 'b.png', 'c.tiff'" in said
    assert "2 of 3 images are copies of others, pixel by pixel" in said


def long_text(path):
    info = PngImagePlugin.PngInfo()
    info.add_text("settings", "x" * (2 * 1024 * 1024), zip=True)
    pixels(0).save(path, pnginfo=info)


BROKEN = {
    "a long text": (long_text, "ValueError: Decompressed data too large"),
    "too many pixels": (lambda p: p.write_bytes(png(0, 1, 8, claims=14000)), "DecompressionBombError"),
    "half": (lambda p: p.write_bytes(encoded(pixels(0))[:120]), "cannot be read"),
    "nothing": (lambda p: p.write_bytes(b""), "UnidentifiedImageError"),
    "a page of a web server": (lambda p: p.write_text("<html>404</html>"), "UnidentifiedImageError"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_images_that_cannot_be_read_are_named_at_once(what, tmp_path):
    """Whatever the decoder raises, in one line, and all of them together."""
    make, reason = BROKEN[what]
    write(tmp_path, "good.png")
    for name in ("bad 1.png", "bad 2.png"):
        make(tmp_path / name)
    with pytest.raises(InvalidInputError) as raised:
        load_images(str(tmp_path))
    said = str(raised.value)
    assert said.startswith("data: 2 of 3 images of ") and said.count("\n") == 0
    assert "'bad 1.png'" in said and "'bad 2.png'" in said and reason in said and "good" not in said
