"""Model folders made to do harm: nothing in them is executed, and nothing outside of them is read."""

import builtins
import json
import os
import pickle
import shutil
import struct

import pytest
import torch

from implicit_diffusion.cli import main
from implicit_diffusion.errors import ImplicitDiffusionError
from implicit_diffusion.models.energy_model import load_energy_model
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.models.prompts import embed_prompts
from tests.helpers import energy_models, tiny

INDEX, TOKENIZER = "model_index.json", "tokenizer/tokenizer_config.json"
UNET = "unet/diffusion_pytorch_model"


class Payload:
    """A pickle that makes a file when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound, tmp_path):
    """A sound model, beside a place of its user's."""
    (tmp_path / "private").mkdir()
    shutil.copytree(sound / "tokenizer", tmp_path / "private" / "tokenizer")
    vocabulary = json.loads((sound / "tokenizer/tokenizer.json").read_text())
    (tmp_path / "private" / "tokenizer.1.json").write_text(json.dumps(vocabulary | {"private": 1}))
    for name in ("unet", "vae"):
        shutil.copytree(sound / name, tmp_path / "private" / name)
    return shutil.copytree(sound, tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def code(path, canary):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Model: pass\n")


def pickled(folder, canary):
    """Pickles of every name that a library looks for, in place of the weights."""
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.pt", "model.ckpt", "pytorch_model.bin"):
        (folder / "unet" / name).write_bytes(pickle.dumps(Payload(canary)))
    (folder / f"{UNET}.safetensors").unlink()


def a_pickle_called_safetensors(folder, canary):
    (folder / f"{UNET}.safetensors").write_bytes(pickle.dumps(Payload(canary)))


def a_torch_archive_called_safetensors(folder, canary):
    torch.save(Payload(canary), folder / f"{UNET}.safetensors")  # idf: a pickle, to be refused


def a_pickled_index(folder, canary):
    (folder / INDEX).write_bytes(pickle.dumps(Payload(canary)))


def own_pipeline(folder, canary):
    code(folder / "pipeline.py", canary)
    change(folder / INDEX, _class_name=["pipeline", "Model"])


def a_pipeline_elsewhere(folder, canary):
    code(folder.parent / "elsewhere.py", canary)
    change(folder / INDEX, _class_name="elsewhere.Model")


def own_network(folder, canary):
    code(folder / "unet" / "my_unet.py", canary)
    change(folder / INDEX, unet=["my_unet", "Model"])


def own_text_encoder(folder, canary):
    code(folder / "text_encoder" / "mine.py", canary)
    change(folder / INDEX, text_encoder=["mine", "Model"])


def any_class(folder, canary):
    change(folder / INDEX, text_encoder=["transformers", "Trainer"])


def any_scheduler(folder, canary):
    change(folder / INDEX, scheduler=["diffusers", "DiffusionPipeline"])


def a_scheduler_of_a_module(folder, canary):
    code(folder / "scheduler" / "mine.py", canary)
    change(folder / INDEX, scheduler=["mine", "Model"])


def an_automatic_tokenizer(folder, canary):
    """Which would ask a user whether the code in the folder may run."""
    code(folder / "tokenizer" / "mine.py", canary)
    change(folder / INDEX, tokenizer=["transformers", "AutoTokenizer"])
    change(folder / TOKENIZER, auto_map={"AutoTokenizer": ["mine.Model", "mine.Model"]})


def a_function_for_a_tokenizer(folder, canary):
    change(folder / INDEX, tokenizer=["transformers", "set_seed"])


def a_quantised_network(folder, canary):
    change(folder / "unet/config.json", quantization_config={"quant_method": "gguf", "compute_dtype": "float32"})


def a_quantised_text_encoder(folder, canary):
    change(folder / "text_encoder/config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def attention_of_the_hub(folder, canary):
    change(folder / "text_encoder/config.json", _attn_implementation="someone/kernels:attention")


def a_part_called_up(folder, canary):
    change(folder / INDEX, **{"../private/vae": ["diffusers", "AutoencoderKL"]})


def a_linked_part(folder, canary):
    shutil.rmtree(folder / "unet")
    (folder / "unet").symlink_to(folder.parent / "private" / "unet")


def a_linked_index(folder, canary):
    (folder / INDEX).rename(folder.parent / "private" / INDEX)
    (folder / INDEX).symlink_to(folder.parent / "private" / INDEX)


def a_linked_chain(folder, canary):
    (folder.parent / "private" / "chain.json").write_text("{}")
    (folder / "chain.json").symlink_to(folder.parent / "private" / "chain.json")


def sharded(folder, name):
    weights = folder / f"{UNET}.safetensors"
    with open(weights, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        names = json.loads(file.read(length)).keys() - {"__metadata__"}
    weights.rename(folder / f"{UNET}-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / f"{UNET}.safetensors.index.json").write_text(json.dumps(index))


def shards_above(folder, canary):
    sharded(folder, "../../private/unet/diffusion_pytorch_model.safetensors")


def shards_elsewhere(folder, canary):
    sharded(folder, str(folder.parent / "private/unet/diffusion_pytorch_model.safetensors"))


def pickled_shards(folder, canary):
    (folder / "unet" / "diffusion_pytorch_model-00001-of-00001.bin").write_bytes(pickle.dumps(Payload(canary)))
    sharded(folder, "diffusion_pytorch_model-00001-of-00001.bin")


def a_header_with_a_name_twice(folder, canary):
    path = folder / f"{UNET}.safetensors"
    contents = path.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    header = contents[8 : 8 + length].decode().rstrip()
    first = next(iter(json.loads(header).keys() - {"__metadata__"}))
    header = header[:-1] + f',"{first}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + contents[8 + length :])


def a_header_of_depth(folder, canary):
    header = ('{"a":' * 10**5 + "1" + "}" * 10**5).encode()
    (folder / f"{UNET}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def a_header_of_blanks(folder, canary):
    (folder / f"{UNET}.safetensors").write_bytes(struct.pack("<Q", 99 * 10**6) + b" " * (99 * 10**6))


def not_a_number(folder, canary):
    path = folder / "unet/config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "dropout": NaN}')


def a_file_of_terabytes(folder, canary):
    with open(folder / "unet/config.json", "wb") as file:
        file.truncate(10**12)


FAST = (pickled, own_network, shards_above, a_linked_part, a_quantised_network, an_automatic_tokenizer, not_a_number)
REFUSED = (
    *(pickled, a_pickle_called_safetensors, a_torch_archive_called_safetensors, a_pickled_index),
    *(own_pipeline, a_pipeline_elsewhere, own_network, own_text_encoder, any_class, any_scheduler),
    *(a_scheduler_of_a_module, an_automatic_tokenizer, a_function_for_a_tokenizer, a_quantised_network),
    *(a_quantised_text_encoder, attention_of_the_hub, a_part_called_up, a_linked_part, a_linked_index),
    *(shards_above, shards_elsewhere, pickled_shards, a_header_with_a_name_twice, a_header_of_depth),
    *(a_header_of_blanks, not_a_number, a_file_of_terabytes),
)


@torch.no_grad()
def used(folder):
    loaded = load_pretrained(folder)
    return embed_prompts(loaded.checkpoint, loaded.denoiser.model, ["a cat"], torch.device("cpu"))


def once_in_a_while(attack):
    return pytest.param(attack, id=attack.__name__, marks=[] if attack in FAST else pytest.mark.slow)


@pytest.mark.parametrize("attack", map(once_in_a_while, REFUSED))
def test_nothing_is_executed_and_it_is_refused_by_name(attack, folder, tmp_path, monkeypatch):
    canary = tmp_path / "executed"
    attack(folder, canary)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # as where a user starts Python in the folder
    with pytest.raises(ImplicitDiffusionError) as caught:
        used(folder)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model")
    assert not canary.exists()


def test_a_chain_file_elsewhere_is_refused(folder, tmp_path, capsys):
    a_linked_chain(folder, None)
    assert main(["sample", "--model", str(folder), "--out", str(tmp_path / "x.png"), "--device", "cpu"]) == 2
    assert "chain.json" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


PLACES = {
    "vocab_file": "tokenizer/vocab.json",
    "merges_file": "tokenizer/merges.txt",
    "tokenizer_file": "tokenizer/tokenizer.json",
    "special_tokens_map_file": "tokenizer/tokenizer_config.json",
}


def test_a_tokenizer_reads_its_own_folder(folder, sound, monkeypatch):
    """Whatever its config says of other places, whose files are as good as its own; it is exported without them."""
    private = folder.parent / "private"
    change(
        folder / TOKENIZER,
        **{
            key: [f"../../private/{name}"] if key.endswith("s") else str(private / name) for key, name in PLACES.items()
        },
        auto_map={"AutoTokenizer": ["mine.Model", None]},
    )
    expected, opened = used(sound), []
    real = builtins.open
    monkeypatch.setattr(
        builtins, "open", lambda file, *more, **named: opened.append(file) or real(file, *more, **named)
    )
    table = used(folder)
    assert all(torch.equal(table[name], expected[name]) for name in expected)
    assert not [file for file in opened if str(file).startswith(str(private))]
    loaded = load_pretrained(folder)
    out = save_pipeline(folder.parent / "out", loaded.denoiser, loaded.scheduler, "card", original=loaded)
    assert not {"auto_map", "fast_tokenizer_files", *PLACES} & json.loads((out / TOKENIZER).read_text()).keys()


def test_what_lies_beside_a_model_is_not_copied(folder, tmp_path):
    """Pickles and programs in a folder that is otherwise sound."""
    canary = tmp_path / "executed"
    for name in ("unet/diffusion_pytorch_model.bin", "vae/notes.pkl", "tokenizer/vocab.pkl", "text_encoder/model.bin"):
        (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    code(folder / "unet/unet.py", canary), code(folder / "__init__.py", canary)
    loaded = load_pretrained(folder)
    used(folder)
    out = save_pipeline(tmp_path / "out", loaded.denoiser, loaded.scheduler, "card", original=loaded)
    assert not canary.exists()
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pkl", ".py") or path.is_symlink()]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "pickle"])
def test_an_energy_model_is_read_inside_its_folder(name, kind, tmp_path):
    file = tmp_path / "model" / name
    energy_models.gaussian().save(file.parent)
    if kind == "link":
        file.rename(tmp_path / name)
        file.symlink_to(tmp_path / name)
    else:
        file.unlink()
        os.mkfifo(file) if kind == "pipe" else file.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(ImplicitDiffusionError, match=r"^model: "):
        load_energy_model(tmp_path / "model")
    assert not (tmp_path / "executed").exists()
