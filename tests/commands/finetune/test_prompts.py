"""Files of prompts as editors of all systems save them: lines that they show as lines, or a refusal with the line."""

import codecs
import os

import pytest

from implicit_diffusion.cli import main
from implicit_diffusion.commands.shared.conditioning import MOST, read_prompts
from implicit_diffusion.errors import InvalidInputError

WORDS = ["a red house", "Lärm, 海", "x\ty"]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_encodings_that_say_what_they_are(file, mark, encoding, end):
    text = f"{end}  {WORDS[0]} {end}{end} \u00a0{end}{WORDS[1]}{end}{WORDS[2]}"
    for last in ("", end, 2 * end):
        file.write_bytes(mark + (text + last).encode(encoding))
        assert read_prompts(file) == WORDS


def test_line_ends_may_be_mixed(file):
    file.write_bytes(b"a\r\nb\rc\nd\r\r\n\ne")
    assert read_prompts(file) == ["a", "b", "c", "d", "e"]


# All that str.splitlines splits on beside \n, \r and \r\n, and what else no editor shows.
@pytest.mark.parametrize("character", "\v\f\x1c\x1d\x1e\x85\u2028\u2029\0\x1b\x7f\x80\ufeff")
@pytest.mark.parametrize("place", ["{}a house", "a{}house", "a house{}", "{}"])
def test_other_separators_are_refused_by_line(file, character, place):
    file.write_bytes(("a\r\nb\r\n\r\n" + place.format(character) + "\r\nc").encode())
    with pytest.raises(InvalidInputError, match=rf"line 4 contains the character U\+{ord(character):04X}, "):
        read_prompts(file)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "shift-jis"])
def test_other_encodings_are_refused_by_line(file, encoding):
    file.write_bytes("a\n\nb\n".encode(encoding) + ("caf\u00e9" if encoding != "shift-jis" else "海").encode(encoding))
    with pytest.raises(InvalidInputError, match=r"line 4 is not utf-8 \(.*\); save it as UTF-8"):
        read_prompts(file)


def test_utf_16_without_a_mark_is_refused(file):
    file.write_bytes("a house".encode("utf-16-le"))
    with pytest.raises(InvalidInputError, match=r"line 1 contains the character U\+0000"):
        read_prompts(file)


@pytest.mark.parametrize("text", ["a\nb", "\ufeffa\r\n b\u00a0\n", "a\rb\n\n\n", "\u3000x y\u200dz\n"])
def test_the_copy_of_a_run_is_the_same_list(file, text):
    """As `finetune` writes it."""
    file.write_text(text, encoding="utf-8", newline="")
    prompts = read_prompts(file)
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    assert read_prompts(file) == prompts


@pytest.mark.parametrize("contents", [b"", b"\n\n", b" \r\n\t\r\n", codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
def test_nothing_is_no_prompt(file, contents):
    file.write_bytes(contents)
    with pytest.raises(InvalidInputError, match="holds no prompts"):
        read_prompts(file)


def test_files_are_bounded_and_regular(file):
    file.write_bytes(b"a\n" * (MOST // 2 + 1))
    with pytest.raises(InvalidInputError, match=r"--prompts: .* is larger than"):
        read_prompts(file)
    file.unlink()
    for make, said in (
        (os.mkfifo, "is a pipe"),
        (os.mkdir, "is a folder"),
        (lambda p: os.symlink("/dev/zero", p), "dev"),
    ):
        make(file)
        with pytest.raises(
            InvalidInputError, match=rf"--prompts: .*{said}.*; it must be a text file with one prompt per line"
        ):
            read_prompts(file)
        os.rmdir(file) if file.is_dir() else file.unlink()
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_prompts("a\0b")


def test_the_command_says_so_in_one_line(tmp_path, capsys):
    from tests.helpers import tiny

    model = tiny.stable_diffusion(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    call = ["sample", "--model", str(model), "--prompts", str(tmp_path / "pipe"), "--out", str(tmp_path / "grid.png")]
    assert main(call) == 2
    said = capsys.readouterr().err
    assert "is a pipe, and only regular files are read" in said and "Traceback" not in said
