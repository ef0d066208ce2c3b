"""What of a model folder is read and copied: its own files or the hub cache's, of known kinds, as plain files."""

import inspect
import json
import os
import shutil
import stat
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.checkpoints import DIGITS, find_checkpoint
from implicit_diffusion.models.families import FAMILIES
from implicit_diffusion.models.parts import bounded
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.models.prompts import embed_prompts
from tests.helpers import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.stable_diffusion(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def expected(made):
    return everything(made)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def everything(folder):
    """All weights of network and decoder, and the embeddings of two prompts."""
    loaded = load_pretrained(folder)
    prompts = embed_prompts(loaded.checkpoint, loaded.denoiser.model, ["a cat", "red dog"], CPU)
    return loaded.denoiser.state_dict() | loaded.decoder.state_dict() | dict(prompts)


def same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance)


def saved(folder, out):
    loaded = load_pretrained(folder)
    return save_pipeline(out, loaded.denoiser, loaded.scheduler, "# Card", original=loaded)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def listed(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.parametrize("name", ["../../../x", "/etc", "..", "a/b", "extra", ""])
def test_parts_that_the_pipeline_does_not_have_are_refused(folder, name):
    edit(folder / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(InvalidInputError, match=r"names a part '.*', and a StableDiffusionPipeline has only "):
        find_checkpoint(folder)


@pytest.mark.parametrize("family", FAMILIES[1:], ids=lambda family: family.pipelines[0])
def test_parts_and_options_are_those_of_diffusers(family):
    slots = inspect.signature(getattr(diffusers, family.pipelines[0]).__init__).parameters.keys() - {"self"}
    assert slots == family.parts | {*family.options}


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer", "text_encoder", "scheduler"])
def test_a_folder_that_is_a_link_to_elsewhere_is_refused(folder, part):
    (folder / part).rename(folder.parent / "private")
    (folder / part).symlink_to("../private")
    with pytest.raises(InvalidInputError, match=r"is a link to .*private/.*, outside of the model's folder"):
        find_checkpoint(folder)


def test_a_file_of_the_user_never_lands_in_the_exported_model(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("a password")
    for name in ("secret.txt", "notes.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
        (folder / "tokenizer" / name).symlink_to(tmp_path / "secret.txt")
        with pytest.raises(InvalidInputError, match=rf"tokenizer/{name} is a link to .*secret\.txt, outside"):
            find_checkpoint(folder)
        (folder / "tokenizer" / name).unlink()
    (folder / "vae" / "secret.txt").symlink_to(tmp_path / "secret.txt")  # of no kind that is read
    assert not [name for name in listed(saved(folder, tmp_path / "out")) if "secret" in name]


def test_only_what_the_pipeline_consists_of_is_copied(made, folder, tmp_path):
    for place in ("", "vae", "text_encoder", "tokenizer", "unrelated"):
        for name in ("code.py", "run.sh", "old.bin", "model.ckpt", ".hidden", "photo.png"):
            (folder / place).mkdir(exist_ok=True)
            (folder / place / name).write_text("")
    (folder / "vae" / "diffusion_pytorch_model.non_ema.safetensors").write_text("")
    (folder / "vae" / "nested").mkdir()
    (folder / "vae" / "nested" / "config.json").write_text("{}")
    edit(folder / "model_index.json", note="x", _name_or_path="/home/somebody")
    assert listed(saved(folder, tmp_path / "out")) == sorted([*listed(made), "README.md"])
    assert "somebody" not in (tmp_path / "out" / "model_index.json").read_text()


def test_copies_belong_to_the_user(folder, tmp_path):
    originals = [folder / name for name in listed(folder)]
    for path in originals:
        path.chmod(0o444)
    for _ in range(2):  # the second time over the first
        out = saved(folder, tmp_path / "out")
        for path in out.rglob("*"):
            assert not path.is_symlink() and os.access(path, os.W_OK)
            assert stat.S_IMODE(path.stat().st_mode) & 0o200
    assert {stat.S_IMODE(path.stat().st_mode) for path in originals} == {0o444}


def test_a_copy_replaces_a_link_and_leaves_what_it_points_to(folder, tmp_path):
    out = saved(folder, tmp_path / "out")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (out / "vae" / "config.json").unlink()
    (out / "vae" / "config.json").symlink_to(precious)
    saved(folder, out)
    assert precious.read_text() == "mine" and not (out / "vae" / "config.json").is_symlink()


def test_the_network_is_saved_before_an_original_that_has_gone_is_missed(folder, tmp_path):
    loaded = load_pretrained(folder)
    shutil.rmtree(folder)
    with pytest.raises(InvalidInputError, match="cannot be copied"):
        save_pipeline(tmp_path / "out", loaded.denoiser, loaded.scheduler, "# Card", original=loaded)
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    same(weights, loaded.denoiser.model.state_dict(), rtol=0, atol=0)


def test_a_model_is_saved_over_itself(folder, expected):
    same(everything(saved(folder, folder)), expected, rtol=0, atol=0)


def cache(folder, home):
    """The folder as the hub's cache holds it: links to blobs."""
    snapshot = home / "snapshots" / ("0" * 40)
    (home / "blobs").mkdir(parents=True)
    for number, name in enumerate(listed(folder)):
        blob = (home / "blobs" / f"{number:040x}").resolve()
        shutil.copy(folder / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


@pytest.mark.slow
def test_the_links_of_the_hub_cache_are_followed(folder, expected, tmp_path):
    snapshot = cache(folder, tmp_path / "models--some--model")
    same(everything(snapshot), expected, rtol=0, atol=0)
    (tmp_path / "alias").symlink_to(snapshot)  # the folder itself may be one
    out = saved(tmp_path / "alias", tmp_path / "out")
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    same(everything(out), expected, rtol=0, atol=0)


def test_the_cache_holds_no_links_to_elsewhere(folder, tmp_path):
    snapshot = cache(folder, tmp_path / "models--some--model")
    (tmp_path / "models--some--model" / "other").write_text("{}")
    (snapshot / "vae" / "config.json").unlink()
    (snapshot / "vae" / "config.json").symlink_to("../../../other")
    with pytest.raises(InvalidInputError, match=r"vae/config\.json is a link to .*other, outside"):
        find_checkpoint(snapshot)


def test_the_shipped_model_may_consist_of_links(tmp_path, monkeypatch):
    """Installers link the files of packages to caches of their own."""
    digits = tmp_path / "digits"
    for path in (path for path in DIGITS.rglob("*") if path.is_file()):
        (digits / path.relative_to(DIGITS)).parent.mkdir(parents=True, exist_ok=True)
        (digits / path.relative_to(DIGITS)).symlink_to(path)
    monkeypatch.setattr("implicit_diffusion.models.checkpoints.DIGITS", digits)
    assert load_pretrained("digits").event_shape == (1, 8, 8)
    with pytest.raises(InvalidInputError, match="outside of the model's folder"):
        load_pretrained(digits)


PACKED = {"fp16 sharded": (), **dict.fromkeys(["fp16", "bf16", "sharded", "sharded as of old"], pytest.mark.slow)}


@pytest.fixture(params=[pytest.param(kind, marks=marks) for kind, marks in PACKED.items()])
def packed(request, made, tmp_path):
    """The model as one variant alone, or in parts, or both."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(made, local_files_only=True)
    kind, options = request.param, {}
    if kind[1:] in ("p16", "f16") or "fp16" in kind:
        options["variant"] = kind[:4]
        pipeline.to(torch.float16 if kind.startswith("fp16") else torch.bfloat16)
    if "sharded" in kind:
        options["max_shard_size"] = "12KB"
    folder = tmp_path / "packed"
    pipeline.save_pretrained(folder, **options)
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    if kind == "sharded as of old":  # the variant stood last
        for part in ("unet", "vae"):
            for path in (folder / part).glob("*.safetensors"):
                path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
            for path in (folder / part).glob("*.index.json"):
                path.rename(path.with_name(path.name.replace(".index", ".index.fp16")))
                path = path.with_name(path.name.replace(".index", ".index.fp16"))
                path.write_text(path.read_text().replace('.safetensors"', '.fp16.safetensors"'))
    return kind, folder


def test_variants_and_shards_are_loaded_and_saved_plain(packed, expected, tmp_path):
    kind, folder = packed
    tolerance = {"fp16": 2e-3, "bf16": 2e-2}.get(kind[:4], 0)
    found = everything(folder)
    assert all(value.dtype == torch.float32 for value in found.values())
    same(found, expected, rtol=tolerance, atol=tolerance)
    out = saved(folder, tmp_path / "out")
    assert not [name for name in listed(out) if "16" in name]
    again = diffusers.DiffusionPipeline.from_pretrained(out, local_files_only=True)
    for name, value in again.unet.state_dict().items():
        assert torch.equal(value, found[f"model.{name}"])
    for name, value in again.vae.state_dict().items():
        assert torch.equal(value, found[f"vae.{name}"])
    same(everything(out), found, rtol=0, atol=0)


def test_plain_weights_are_preferred_to_variants(folder, expected):
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.fp16.safetensors").write_text("never read")
    same(everything(folder), expected, rtol=0, atol=0)


def test_other_variants_are_named(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    with pytest.raises(
        InvalidInputError, match=r"none of the weights that are loaded .*\*\.fp16\.s.*non_ema\.safetensors"
    ):
        find_checkpoint(folder)


def sharded(folder):
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    vae.save_pretrained(folder / "vae", max_shard_size="12KB")
    return folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"


SHARDS = ["../../secret.safetensors", "/etc/passwd", "config.json", "", "..", "missing.safetensors"]


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_names_no_file_but_its_shards(folder, tmp_path, name):
    index = sharded(folder)
    (tmp_path / "secret.safetensors").write_text("")
    said = json.loads(index.read_text())
    edit(index, weight_map=said["weight_map"] | {sorted(said["weight_map"])[0]: name})
    with pytest.raises(InvalidInputError, match=r"index\.json names the file '.*', which is not one of these weights"):
        load_pretrained(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 3}, "x"])
def test_an_index_without_a_map_is_refused(folder, weight_map):
    edit(sharded(folder), weight_map=weight_map)
    with pytest.raises(InvalidInputError, match="has no weight_map"):
        load_pretrained(folder)


def test_an_index_that_promises_tensors_which_are_nowhere_is_refused(folder):
    """Diffusers believes the index, and would leave such weights as they were allocated."""
    index = sharded(folder)
    said = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=said | {"one.more": next(iter(said.values()))})
    with pytest.raises(InvalidInputError, match=r"1 tensors, such as 'one\.more', are not in the files"):
        load_pretrained(folder)


HUGE = {
    "unet/config.json": [
        {"block_out_channels": [10**9, 10**9]},
        {"layers_per_block": 10**9},
        {"cross_attention_dim": 10**12},
        {"sample_size": 10**9},
        {"in_channels": 10**12},
        {"projection_class_embeddings_input_dim": 10**10, "class_embed_type": "projection"},
        {"num_class_embeds": 10**10},
    ],
    "vae/config.json": [{"block_out_channels": [2**30, 2**30]}, {"layers_per_block": 10**8}],
    "text_encoder/config.json": [
        {"hidden_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**11},
        {"max_position_embeddings": 10**10},
        {"intermediate_size": 10**11},
    ],
    "scheduler/scheduler_config.json": [{"num_train_timesteps": 10**10}, {"num_train_timesteps": 1e12}],
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, all_changes in HUGE.items() for changes in all_changes],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_absurd_sizes_are_refused_before_they_are_allocated(folder, name, changes, monkeypatch):
    edit(folder / name, **changes)

    def refuse(*arguments, **options):
        raise AssertionError("was allocated")

    owner = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "scheduler": diffusers.DDPMScheduler,
    }
    if (part := name.split("/")[0]) in owner:
        monkeypatch.setattr(owner[part], "from_pretrained", refuse)
    with pytest.raises(InvalidInputError) as caught:
        everything(folder)
    assert "was allocated" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_bound_stops_at_the_first_tensor_too_many():
    with pytest.raises(Exception, match="much larger than its weights"), bounded(100, 100), torch.device("meta"):
        torch.nn.Linear(10**9, 10**9)
    with pytest.raises(Exception, match="much larger than its weights"), bounded(10**6, 100):
        torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(10**9)))
    with pytest.raises(Exception, match="much larger than its weights"), bounded(10**6, 100):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(10**4)))
    torch.nn.Linear(20, 20)  # nothing is bound any more
    with bounded(100, 100):
        torch.nn.Linear(9, 10)


def test_code_that_a_config_names_is_refused(folder):
    edit(folder / "text_encoder" / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(InvalidInputError, match=r"asks for attn_implementation = 'somebody/kernel'"):
        everything(folder)


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "Trainer", "CLIPTextConfig", "no_such", "__doc__"])
def test_only_models_are_loaded_as_models(folder, name):
    edit(folder / "model_index.json", text_encoder=["transformers", name])
    with pytest.raises(InvalidInputError, match=f"text encoder .*transformers has no model class '{name}'"):
        everything(folder)


def test_decoders_of_other_kinds_are_named(folder):
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(InvalidInputError, match="decoder AutoencoderTiny; only AutoencoderKL"):
        find_checkpoint(folder)


def test_weights_that_the_config_does_not_ask_for_are_refused(folder):
    edit(folder / "vae" / "config.json", use_post_quant_conv=False)
    with pytest.raises(InvalidInputError, match="hold 2 tensors that its config does not ask for, such as 'post_quant"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", Path("x" * 300)])
def test_names_that_no_file_system_takes(name):
    with pytest.raises(InvalidInputError, match="model: '"):
        load_pretrained(name)
