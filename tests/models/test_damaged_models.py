"""Model folders that were damaged in transit, or made to do harm: an error of ours in one line, or the same model."""

import itertools
import json
import os
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from implicit_diffusion.errors import ImplicitDiffusionError
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.models.prompts import embed_prompts
from tests.helpers import tiny

CPU = torch.device("cpu")
INDEX = "model_index.json"
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
DESCRIPTIONS = (
    INDEX,
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
)
WEIGHTS = (UNET, VAE, TEXT)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def emptied(path):
    path.write_bytes(b"")


def a_text(path):
    path.write_text("Not found.\nPlease try again later.\n")


def noise(path):
    path.write_bytes(random.Random(1).randbytes(500))


def removed(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def a_circle(path):
    path.unlink()
    path.symlink_to(path)


def elsewhere(path):
    outside = next(parent for parent in path.parents if parent.name == "model").parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def within(path):
    """The same file by a link that stays in the folder: no damage."""
    beside = path.with_name("renamed")
    path.rename(beside)
    path.symlink_to("renamed")


def nested(path):
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def a_list(path):
    path.write_text("[1, 2]")


def a_number(path):
    path.write_text("9" * 6000)


def values_of_no_type(path):
    path.write_text(json.dumps({key: {"is": ["nothing"]} for key in json.loads(path.read_text())}))


def header(path, change):
    """Weights with another header; `change` gets the header, and the names of its tensors."""
    contents = path.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    said = json.loads(contents[8 : 8 + length])
    change(said, sorted(said.keys() - {"__metadata__"}))
    written = json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + contents[8 + length :])


def a_trillion_rows(path):
    header(path, lambda said, names: said[names[0]].update(shape=[10**12, 4]))


def negative_rows(path):
    header(path, lambda said, names: said[names[0]].update(shape=[-1]))


def offsets_beyond_the_end(path):
    header(path, lambda said, names: said[names[0]].update(data_offsets=[0, 10**15]))


def offsets_that_overlap(path):
    header(path, lambda said, names: said[names[1]].update(data_offsets=said[names[0]]["data_offsets"]))


def a_header_of_exabytes(path):
    contents = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**63) + contents[8:])


def a_type_that_is_none(path):
    header(path, lambda said, names: said[names[0]].update(dtype="pickle"))


def changed(path, change):
    weights = load_file(path)
    names = sorted(name for name in weights if weights[name].is_floating_point() and weights[name].ndim > 1)
    save_file(change(weights, names[0]), path, metadata={"format": "pt"})


def nan(path):
    changed(path, lambda weights, name: weights | {name: weights[name] * torch.nan})


def infinite(path):
    changed(path, lambda weights, name: weights | {name: weights[name] + torch.inf})


def one_missing(path):
    changed(path, lambda weights, name: {key: value for key, value in weights.items() if key != name})


def whole_numbers(path):
    changed(path, lambda weights, name: weights | {name: weights[name].long()})


def transposed(path):
    changed(path, lambda weights, name: weights | {name: weights[name].flatten(1).T.contiguous()})


ANY = (truncated, emptied, a_text, noise, removed, a_folder, a_pipe, a_device, a_circle, elsewhere, within)
OF_JSON = (nested, a_list, a_number, values_of_no_type)
OF_WEIGHTS = (
    a_trillion_rows,
    negative_rows,
    offsets_beyond_the_end,
    offsets_that_overlap,
    a_header_of_exabytes,
    a_type_that_is_none,
    nan,
    infinite,
    one_missing,
    whole_numbers,
    transposed,
)
EVERY = [*itertools.product(DESCRIPTIONS, (*ANY, *OF_JSON)), *itertools.product(WEIGHTS, (*ANY, *OF_WEIGHTS))]
SAME = {(file, within) for file in (*DESCRIPTIONS, *WEIGHTS)}
CHOSEN = random.Random(0).sample(EVERY, 50)
CHOSEN = [pytest.param(*case, marks=[pytest.mark.slow] * (i >= 12)) for i, case in enumerate(CHOSEN)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


@torch.no_grad()
def drawn(folder):
    """What prompts, network and decoder make of fixed inputs."""
    loaded = load_pretrained(folder)
    table = embed_prompts(loaded.checkpoint, loaded.denoiser.model, ["a cat", "red dog"], CPU)
    x = torch.linspace(-1, 1, 256).reshape(1, *loaded.event_shape)
    states = table["encoder_hidden_states"][:1]
    u = loaded.denoiser(x, torch.tensor([30.0]), encoder_hidden_states=states)
    return u, states, loaded.decoder(x)


@pytest.fixture(scope="module")
def expected(sound):
    return drawn(sound)


def check(folder, expected):
    """An error of ours in one line, or the same numbers."""
    try:
        found = drawn(folder)
    except ImplicitDiffusionError as error:
        said = str(error)
        assert "\n" not in said and len(said) < 900 and "implicit-diffusion-" not in said
        return said
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    return None


@pytest.mark.parametrize(("file", "damage"), CHOSEN, ids=lambda value: getattr(value, "__name__", str(value)))
def test_damage_is_an_error_of_ours(folder, expected, file, damage):
    damage(folder / file)
    said = check(folder, expected)
    assert (said is None) == ((file, damage) in SAME) or file.startswith("tokenizer")


@pytest.mark.slow
def test_every_damage_is_an_error_of_ours(sound, expected, tmp_path):
    for number, (file, damage) in enumerate(EVERY):
        folder = shutil.copytree(sound, tmp_path / str(number) / "model")
        damage(folder / file)
        said = check(folder, expected)
        assert (said is None) == ((file, damage) in SAME) or file.startswith("tokenizer"), (file, damage)
