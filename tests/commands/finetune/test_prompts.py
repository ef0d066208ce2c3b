"""Files of prompts as editors of all systems save them: lines that they show as lines, or a refusal with the line."""

import codecs
import json
import os

import pytest

from implicit_diffusion.cli import main
from implicit_diffusion.commands.shared.prompt_files import MOST, copy_of, read_prompts, write_prompts
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


RECORDS = [
    {"prompt": "a red house", "negative_prompt": "fog", "weight": 2, "metadata": {"id": 7, "tags": ["x", None]}},
    {"prompt": " two\u2028lines ", "metadata": {}},
    {"prompt": "Lärm, 海", "weight": 0.5},
]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_lines_of_json(tmp_path, mark, end):
    file = tmp_path / "prompts.JSONL"
    file.write_bytes(mark + (end + (2 * end).join(map(json.dumps, RECORDS)) + end).encode())
    prompts = read_prompts(file)
    assert prompts == [each["prompt"] for each in RECORDS]
    assert [prompt.negative for prompt in prompts] == ["fog", "", ""]
    assert [prompt.weight for prompt in prompts] == [2.0, 1.0, 0.5]
    assert [prompt.metadata for prompt in prompts] == [RECORDS[0]["metadata"], {}, None]
    assert [prompt.line for prompt in prompts] == [2, 4, 6]
    copy = tmp_path / copy_of(file, "prompts")
    write_prompts(prompts, copy)
    assert copy.name == "prompts.jsonl" and [vars(each) | {"line": 0} for each in read_prompts(copy)] == [
        vars(each) | {"line": 0} for each in prompts
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a house", "is no JSON"),
        ('["a house"]', "is no JSON object"),
        ("{}", "has no prompt"),
        ('{"prompt": 3}', "must have a prompt of words, got 3"),
        ('{"prompt": " "}', "must have a prompt of words"),
        ('{"prompt": "a", "prompt": "b"}', "has a key twice"),
        ('{"prompt": "a", "tag": 1}', "has the key 'tag', which is none of prompt, "),
        ('{"prompt": "a", "negative_prompt": null}', "must have a negative_prompt of words"),
        *[(f'{{"prompt": "a", "weight": {w}}}', "must have a finite weight") for w in ("-1", "true", '"2"', "null")],
        ('{"prompt": "a", "weight": NaN}', "holds NaN"),
        ('{"prompt": "a", "metadata": {"x": -Infinity}}', "holds -Infinity"),
        ('{"prompt": "a", "metadata": {"x": 1e999}}', "holds 1e999"),
        ('{"prompt": "a", "metadata": [1]}', r"must have an object of metadata, got \[1\]"),
        (r'{"prompt": "\ud800"}', "holds half of a character"),
        ('{"prompt": "a", "metadata": ' + 5000 * "[" + "]" * 5000 + "}", "is no JSON"),
    ],
)
def test_lines_of_other_json_are_refused_by_number(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n' + line + "\n")
    with pytest.raises(InvalidInputError, match=rf"--held {file}: line 3 {message}"):
        read_prompts(file, "--held")


def test_prompts_that_are_never_drawn_and_json_in_a_text_file_are_refused(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "weight": 0}\n')
    with pytest.raises(InvalidInputError, match="all weights are 0"):
        read_prompts(file)
    with pytest.raises(InvalidInputError, match="let the name end in"):
        read_prompts(file.rename(tmp_path / "prompts.txt"))
