"""Files from elsewhere: regular, bounded, no deeper than a parser can go."""

import json
import os
import socket
import threading

import pytest

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.files.reading import DEEPEST, LONGEST_REASON, one_line, read_bytes, read_json


def test_a_file_is_read_up_to_its_bound(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == read_bytes(path) == b"12345"
    with pytest.raises(InvalidInputError, match="is larger than 4 bytes"):
        read_bytes(path, 4)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(10**12)  # without a disk behind it
    with pytest.raises(InvalidInputError, match="is larger than"):
        read_bytes(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "is a pipe"),
        ("folder", "is a folder"),
        ("zero", "is a device"),
        ("socket", "cannot be read"),
        ("", "No"),
    ],
)
def test_what_is_no_regular_file_is_never_waited_for(tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("it")
    said = []

    def read():
        with pytest.raises(InvalidInputError, match=message) as caught:
            read_bytes(path)
        said.append(caught.value)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20)
    assert said, "still reading"
    assert len(os.listdir("/dev/fd")) < 200


def deep(levels):
    return '{"a":' * levels + "1" + "}" * levels


def test_json_is_an_object_of_bounded_depth(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(deep(DEEPEST))
    assert read_json(path) == json.loads(deep(DEEPEST))
    for text, message in {
        deep(DEEPEST + 1): "nested deeper than 64",
        deep(10**6): "nested deeper than 64",
        "[" * 10**6: "nested deeper than 64",
        "[1]": "holds a JSON list",
        "null": "holds a JSON NoneType",
        "9" * 10**5: "not valid JSON",
        '{"a"': "not valid JSON",
        "": "not valid JSON",
    }.items():
        path.write_text(text)
        with pytest.raises(InvalidInputError, match=message):
            read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InvalidInputError, match=r"not valid JSON .*utf-8"):
        read_json(path)


def test_words_of_libraries_are_one_bounded_line():
    assert one_line(ValueError("a\n  b\r\n\tc\u2028d")) == "a b c d"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line("x" * 10**6)) == LONGEST_REASON + 2
