import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.files import states as checkpoint
from implicit_diffusion.files.manifest import MANIFEST, Manifest
from implicit_diffusion.files.states import HEADER, STATE_FILE, load_state, save_state


def assert_same(given, loaded):
    """Equal in type, dtype, shape and bits."""
    if isinstance(given, torch.Tensor):
        assert type(loaded) is torch.Tensor
        assert (loaded.dtype, loaded.shape) == (given.dtype, given.shape)
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8).tolist() for t in (given, loaded)]
        assert bits[0] == bits[1]
    elif isinstance(given, dict):
        assert type(loaded) is dict
        assert [(type(k), k) for k in given] == [(type(k), k) for k in loaded]
        for key in given:
            assert_same(given[key], loaded[key])
    elif isinstance(given, list | tuple):
        assert type(loaded) is type(given)
        assert len(loaded) == len(given)
        for one, other in zip(given, loaded, strict=True):
            assert_same(one, other)
    elif isinstance(given, float) and math.isnan(given):
        assert math.isnan(loaded)
    else:
        assert (type(loaded), loaded) == (type(given), given)


def test_plain_values_come_back_as_they_were(tmp_path):
    state = {
        "": [None, True, False, 0, -1, 2**63, "", "β · {}", '{"tensor": "0"}'],
        3: (1, (2.0, ()), [], {}),
        "3": {"tensor": "0", "float": "nan", "list": [1]},  # looks like the header's own words
        -1: [0.1, 1 / 3, 5e-324, -0.0, math.inf, -math.inf, math.nan],
    }
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert_same(state, loaded)
    assert math.copysign(1, loaded[-1][3]) == -1


@pytest.mark.parametrize("plain", [None, 7, [1, 2]])
def test_a_state_need_not_be_a_dict(tmp_path, plain):
    save_state(tmp_path, plain)
    assert_same(plain, load_state(tmp_path))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([math.nan, -0.0, math.inf, 1 / 3], dtype=torch.float64),
        torch.tensor([math.nan, 1 / 3]),
        torch.tensor([1 / 3, -7.0]).bfloat16(),
        torch.tensor([1 / 3]).half(),
        torch.tensor([[True, False]]),
        torch.tensor(2**62),
        torch.arange(6, dtype=torch.int32).reshape(2, 3),
        torch.Generator().manual_seed(1).get_state(),
        torch.empty(0, 3),
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_tensors_come_back_bit_for_bit(tmp_path, tensor):
    save_state(tmp_path, {"x": tensor})
    assert_same(tensor.resolve_conj(), load_state(tmp_path)["x"])


def test_views_and_shared_storage(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    image = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    state = [x, x, x[1], x.T, x[:, ::2], x[0, 0].expand(5), image, nn.Parameter(x)]
    save_state(tmp_path, state)
    loaded = load_state(tmp_path)
    assert_same(state, loaded)
    loaded[0].zero_()
    assert loaded[1].equal(x)  # memory of its own


def test_a_loaded_state_outlives_its_file_and_may_be_written_over(tmp_path):
    save_state(tmp_path, torch.ones(1000))
    first = load_state(tmp_path)
    save_state(tmp_path, torch.zeros(1000))
    assert first.eq(1).all()
    assert load_state(tmp_path).eq(0).all()


def test_training_continues_bit_for_bit(tmp_path):
    def fresh():
        model = nn.Linear(3, 1, dtype=torch.float64)
        nn.init.constant_(model.weight, 0.5)
        nn.init.zeros_(model.bias)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # keeps an infinity

    def train(model, optimizer, schedule, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(torch.eye(3, dtype=torch.float64)) - 1).square().sum()
            loss.backward()
            optimizer.step()
            schedule.step(loss.item())

    parts, resumed = fresh(), fresh()
    save_state(tmp_path, parts[2].state_dict())
    assert load_state(tmp_path)["best"] == math.inf

    train(*parts, 3)
    save_state(tmp_path, [part.state_dict() for part in parts])
    train(*parts, 3)
    state = load_state(tmp_path)
    assert set(state[1]["state"]) == {0, 1}
    for part, saved in zip(resumed, state, strict=True):
        part.load_state_dict(saved)
    train(*resumed, 3)
    assert_same([dict(part.state_dict()) for part in parts], [dict(part.state_dict()) for part in resumed])


def test_mappings_become_dicts(tmp_path):
    save_state(tmp_path, OrderedDict(b=1, a=2))
    assert_same({"b": 1, "a": 2}, load_state(tmp_path))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"a": [{1, 2}]}, r"state\['a'\]\[0\] is a set"),
        ({"fn": len}, r"state\['fn'\] is a builtin_function"),
        ({"dtype": torch.float32}, r"state\['dtype'\] is a dtype"),
        ({1.5: 0}, "key 1.5"),
        ({True: 0}, "key True"),
        ({"z": 1j}, "is a complex"),
        ({"sparse": torch.eye(2).to_sparse()}, r"state\['sparse'\] is a tensor of layout"),
        ({"z": torch.zeros(1, dtype=torch.complex128)}, "complex128"),
    ],
)
def test_what_is_no_state_is_refused_and_the_old_one_stays(tmp_path, bad, words):
    save_state(tmp_path, {"good": 1})
    with pytest.raises(InvalidInputError, match=words):
        save_state(tmp_path, bad)
    assert load_state(tmp_path) == {"good": 1}


@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_a_failure_leaves_the_previous_state(tmp_path, monkeypatch, moment):
    save_state(tmp_path, {"step": 1, "x": torch.ones(3)})

    def half_a_file(tensors, path, metadata):
        path.write_bytes(b"\x10\x00\x00")
        raise OSError("disk full")

    def killed(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(*((checkpoint, "save_file", half_a_file) if moment == "while writing" else (os, "fsync", killed)))
        with pytest.raises(OSError, match="disk full"):
            save_state(tmp_path, {"step": 2, "x": torch.zeros(3)})
    assert_same({"step": 1, "x": torch.ones(3)}, load_state(tmp_path))
    save_state(tmp_path, {"step": 3})
    assert load_state(tmp_path) == {"step": 3}
    assert {path.name for path in tmp_path.iterdir()} == {STATE_FILE, MANIFEST}


KILLED = """
import sys, torch
from implicit_diffusion.files.states import save_state
for k in range(10**6):
    save_state(sys.argv[1], {"k": k, "xs": [torch.full((200_000,), float(k)) for _ in range(5)]})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_leaves_a_whole_state(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not (tmp_path / MANIFEST).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.03)  # it does nothing but write: this is in the middle of a later state
    process.kill()
    process.wait()
    state = load_state(tmp_path)
    assert all(x.eq(state["k"]).all() for x in state["xs"])


def test_nothing_to_load(tmp_path):
    with pytest.raises(InvalidInputError, match="no state to continue from"):
        load_state(tmp_path / "nowhere")


def describe(folder):
    """A manifest for a file that was not written here, as somebody may make one who wants it to be read."""
    tensors = {}
    with suppress(SafetensorError, TypeError), safe_open(folder / STATE_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    Manifest.of(folder / STATE_FILE, tensors, {}).write(folder)


def header(tree):
    return {HEADER: tree if isinstance(tree, str) else json.dumps(tree)}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        header("{"),
        header({"call": "os.system"}),
        header({"tensor": "1"}),
        header({"dict": [[[], 1]]}),
        header({"dict": 3}),
        header({"list": None}),
        header({"tensor": "0", "list": []}),
        header({}),
        header([1, 2]),
        header({"float": "one"}),
    ],
)
def test_foreign_files_are_refused(tmp_path, metadata):
    save_file({"0": torch.ones(2)}, tmp_path / STATE_FILE, metadata=metadata)
    describe(tmp_path)
    with pytest.raises(InvalidInputError, match="not a state"):
        load_state(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    save_state(tmp_path, {"x": torch.ones(1000)})
    whole = (tmp_path / STATE_FILE).read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], b"\x80\x04K\x01."):
        (tmp_path / STATE_FILE).write_bytes(damaged)
        with pytest.raises(InvalidInputError, match="damaged"):
            load_state(tmp_path)


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def test_nesting_without_end_is_refused_both_ways(tmp_path):
    with pytest.raises(InvalidInputError, match="nested too deeply"):
        save_state(tmp_path / "deep", nested(10**5))
    assert not (tmp_path / "deep").exists()
    save_file({}, tmp_path / STATE_FILE, metadata={HEADER: 10**5 * '{"list": ['})
    describe(tmp_path)
    with pytest.raises(InvalidInputError, match="damaged, or not a state"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"0": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}, 4),
        ({"0": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, 4),
        ({"0": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, 0),
    ],
)
def test_sizes_that_a_header_claims(header, size, tmp_path):
    text = json.dumps({"__metadata__": {HEADER: '{"tensor": "0"}'}} | header).encode()
    (tmp_path / STATE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    describe(tmp_path)
    with pytest.raises(InvalidInputError, match="damaged"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("state", "where"),
    [
        (
            {"optimizer": {0: {"exp_avg": torch.tensor([1.0, math.nan])}}},
            r"state\['optimizer'\]\[0\]\['exp_avg'\] holds",
        ),
        ([{"x": torch.tensor(-math.inf, dtype=torch.bfloat16)}], r"state\[0\]\['x'\] holds NaN or infinity"),
        ({"log_weights": torch.tensor([-math.inf, math.nan])}, r"state\['log_weights'\] holds"),
        ((1.0, math.nan), r"state\[1\] is NaN"),
    ],
)
def test_what_is_not_finite_is_found(state, where):
    with pytest.raises(NonFiniteError, match=where):
        checkpoint.check_finite(state, ["log_weights"])


def test_infinities_that_are_meant_pass():
    checkpoint.check_finite(
        {"best": math.inf, "log_weights": [torch.tensor(-math.inf)], "module.mask": torch.tensor([-math.inf, 0.0])},
        ["log_weights", "module.mask"],
    )
    checkpoint.check_finite({"count": torch.tensor(2**62), "on": torch.tensor([True]), "none": None, "word": "nan"})
