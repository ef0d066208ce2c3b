"""What a model's name stands for, and what is refused before anything is loaded."""

import json
import re
import socket
import time
from types import SimpleNamespace

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.checkpoints import DIGITS, find_checkpoint, inspect_folder
from implicit_diffusion.models.image_text import find_image_text
from tests.helpers import image_text

INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def write(folder, index=INDEX, weights="diffusion_pytorch_model.safetensors", flat=False):
    """The files of a pipeline, as empty as an inspection allows."""
    unet, scheduler = (folder, folder) if flat else (folder / "unet", folder / "scheduler")
    for part in (unet, scheduler):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    (unet / "config.json").write_text("{}")
    (unet / weights).write_bytes(b"")
    (scheduler / "scheduler_config.json").write_text("{}")
    return folder


def test_both_layouts_are_found(tmp_path):
    nested = inspect_folder(write(tmp_path / "nested"))
    assert (nested.network.name, nested.scheduler.name, nested.scheduler_class) == (
        "unet",
        "scheduler",
        "DDPMScheduler",
    )
    flat = inspect_folder(write(tmp_path / "flat", flat=True))
    assert flat.network == flat.scheduler == tmp_path / "flat"


def test_digits_is_the_shipped_folder():
    assert DIGITS.parts[-3:] == ("digits", "assets", "digits")


@pytest.mark.parametrize("weights", ["diffusion_pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, weights):
    with pytest.raises(InvalidInputError, match=rf"only pickled .*{re.escape(weights)}.*use_safetensors=False"):
        find_checkpoint(write(tmp_path / "model", weights=weights))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("not json", "not a valid model index"),
        ("[]", "not a valid model index"),
        (
            {**INDEX, "text_encoder": ["transformers", "CLIPTextModel"]},
            "a DDPMPipeline has no part 'text_encoder'; it has unet, scheduler",
        ),
        (
            {**INDEX, "_class_name": "MyPipeline", "vae": ["diffusers", "AutoencoderKL"]},
            "What can be fine-tuned are the pipelines of diffusers whose rows",
        ),
        ({**INDEX, "unet": ["my_code", "UNet2DModel"]}, r"my_code\.UNet2DModel.*never run"),
        ({**INDEX, "scheduler": ["my_code", "MyScheduler"]}, r"my_code\.MyScheduler.*never run"),
        ({"_class_name": "DDPMPipeline"}, "this DDPMPipeline has no scheduler"),
    ],
)
def test_other_pipelines_are_refused(tmp_path, index, message):
    with pytest.raises(InvalidInputError, match=message):
        find_checkpoint(write(tmp_path / "model", index=index))


def test_a_folder_that_is_no_model_is_listed(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "photos").mkdir()
    with pytest.raises(InvalidInputError, match=r"no model_index\.json; it holds notes\.txt, photos/\."):
        find_checkpoint(tmp_path)


def test_missing_parts_are_named(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"holds no \*\.safetensors weights; it holds config\.json"):
        find_checkpoint(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"lacks scheduler.scheduler_config\.json"):
        find_checkpoint(folder)


@pytest.mark.parametrize("model", ["./nowhere", "nowhere", "/a/b/c", "a/b/c", "", "../a/b"])
def test_names_that_are_nothing(model):
    with pytest.raises(InvalidInputError, match="give 'digits', a diffusers folder, or a hub id"):
        find_checkpoint(model)


def test_a_file_is_no_model(tmp_path):
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(InvalidInputError, match="is not a folder"):
        find_checkpoint(tmp_path / "model.ckpt")


ADVICE = "hf download nobody/nothing --local-dir FOLDER"


@pytest.fixture
def hub(monkeypatch):
    """Point the hub's library at an address of this machine, and let it ask: all other tests run offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return lambda port: monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")


def test_a_hub_out_of_reach_is_an_error_after_seconds(hub):
    hub(port=9)
    start = time.perf_counter()
    with pytest.raises(InvalidInputError, match=f"'nobody/nothing' cannot be reached .*refused.*{ADVICE}"):
        find_checkpoint("nobody/nothing")
    assert time.perf_counter() - start < 10


def test_a_hub_that_never_answers_is_given_up(hub, monkeypatch):
    monkeypatch.setattr("implicit_diffusion.models.checkpoints.HUB_TIMEOUT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub(silent.getsockname()[1])
        start = time.perf_counter()
        with pytest.raises(InvalidInputError, match=r"cannot be reached .*timed out"):
            find_checkpoint("nobody/nothing")
        assert 0.4 < time.perf_counter() - start < 10


def test_offline_mode_asks_nobody(hub, monkeypatch):
    hub(port=9)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInputError, match=f"offline mode is enabled.*{ADVICE}"):
        find_checkpoint("nobody/nothing")


def cached(folder, hub_id, write_files):
    """A hub cache that holds `hub_id` as a download would have left it."""
    repository = folder / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return write_files(repository / "snapshots" / ("0" * 40))


def test_a_cached_model_needs_no_hub(tmp_path, hub, monkeypatch):
    hub(port=9)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = cached(tmp_path, "some/model", write)
    assert find_checkpoint("some/model").network == snapshot / "unet"
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # an interrupted download
    with pytest.raises(InvalidInputError, match="cannot be reached on the hub"):
        find_checkpoint("some/model")


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A hub with one repository, the folder `tmp_path / "remote"`; returns the list of files that are downloaded."""
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    remote, local, downloaded = tmp_path / "remote", tmp_path / "local", []

    def names():
        return sorted(str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file())

    def snapshot_download(hub_id, *, local_files_only=False, allow_patterns=None, ignore_patterns=None):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        for name in filter_repo_objects(names(), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            (local / name).write_bytes((remote / name).read_bytes())
            downloaded.append(name)
        return str(local)

    def model_info(self, hub_id, timeout):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names()])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    return downloaded


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_is_fetched_without_what_is_not_loaded(tmp_path, downloads, flat):
    remote = write(tmp_path / "remote", flat=flat)
    for extra in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "code.py"):
        (remote / extra).write_bytes(b"")
    assert find_checkpoint("some/model").scheduler_class == "DDPMScheduler"
    assert {name.rsplit("/")[-1] for name in downloads} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "model_index.json",
        "scheduler_config.json",
    }


LATENT = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
}


def test_a_latent_pipeline_is_fetched_with_all_its_parts_and_nothing_else(tmp_path, downloads):
    remote = write(tmp_path / "remote", index=LATENT)
    wanted = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json"]
    wanted += ["text_encoder/model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    extra = [
        "v1-5.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/weights.bin",
        "vae_2/config.json",
    ]
    for name in (*wanted, *extra):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_text("{}")
    found = find_checkpoint("some/model")
    assert found.family.pipelines == ("StableDiffusionPipeline",) and found.family.latent
    own = {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert set(downloads) == {*wanted, *own, "scheduler/scheduler_config.json"}
    for file in (found.folder / "tokenizer").iterdir():
        file.unlink()
    (found.folder / "tokenizer").rmdir()
    with pytest.raises(InvalidInputError, match="lacks tokenizer, which its model_index"):
        find_checkpoint(found.folder)


def test_an_image_text_model_is_fetched_without_pickles_and_code(tmp_path, downloads):
    remote = image_text.clip(tmp_path / "remote")
    needed = {path.name for path in remote.iterdir()}
    for extra in ("pytorch_model.bin", "model.fp16.safetensors", "code.py", "onnx/config.json"):
        (remote / extra).parent.mkdir(exist_ok=True)
        (remote / extra).write_bytes(b"")
    assert find_image_text("some/model").folder == tmp_path / "local"
    assert set(downloads) == needed and "model.safetensors" in needed
    (remote / "model.safetensors").unlink()
    (remote / "model.fp16.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"model: some/model holds only pickled weights \(pytorch_model\.bin\)"):
        find_image_text("some/model")


def test_an_image_text_model_that_cannot_be_reached(hub):
    hub(port=9)
    with pytest.raises(InvalidInputError, match=f"'nobody/nothing' cannot be reached .*refused.*{ADVICE}"):
        find_image_text("nobody/nothing")


def test_a_model_that_is_a_variant_alone_is_fetched_as_such(tmp_path, downloads):
    remote = write(tmp_path / "remote", weights="diffusion_pytorch_model.fp16.safetensors")
    for name in ("diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.bin"):
        (remote / "unet" / name).write_bytes(b"")
    (remote / "chain.json").write_text("{}")  # of a fine-tuned model
    found = find_checkpoint("some/model")
    weights = "unet/diffusion_pytorch_model"
    assert found.files[f"{weights}.safetensors"].name == "diffusion_pytorch_model.fp16.safetensors"
    own = {"model_index.json", "chain.json", "unet/config.json", "scheduler/scheduler_config.json"}
    assert set(downloads) == {*own, f"{weights}.fp16.safetensors"}


def test_shards_are_fetched_with_their_index_and_without_those_of_variants(tmp_path, downloads):
    remote = write(tmp_path / "remote", weights="diffusion_pytorch_model-00001-of-00002.safetensors")
    stem = "diffusion_pytorch_model"
    for name in (f"{stem}-00002-of-00002", f"{stem}.fp16-00001-of-00001", f"{stem}-00001-of-00001.fp16"):
        (remote / "unet" / f"{name}.safetensors").write_bytes(b"")
    shards = {f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = {"metadata": {}, "weight_map": {shard[-22:]: shard for shard in shards}}
    (remote / "unet" / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    find_checkpoint("some/model")
    assert {name.removeprefix("unet/") for name in downloads if stem in name} == {
        *shards,
        f"{stem}.safetensors.index.json",
    }


def test_other_pipelines_and_pickles_are_refused_before_their_weights_are_fetched(tmp_path, downloads):
    write(tmp_path / "remote", index={**INDEX, "vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(InvalidInputError, match="a DDPMPipeline has no part 'vae'"):
        find_checkpoint("some/model")
    assert downloads == ["model_index.json"]
    (tmp_path / "remote" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    write(tmp_path / "remote", weights="diffusion_pytorch_model.bin")
    with pytest.raises(InvalidInputError, match="some/model holds only pickled weights"):
        find_checkpoint("some/model")
    assert downloads == ["model_index.json"] * 2
