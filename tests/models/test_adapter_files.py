"""Adapters as files: what diffusers, peft and ComfyUI's layout make of them is the network that was trained."""

import copy
import functools
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from implicit_diffusion.denoisers.lora import ADAPTABLE, add_lora, merged
from implicit_diffusion.denoisers.low_rank import adapter_of
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.adapters.layouts import LAYOUTS
from implicit_diffusion.models.adapters.reading import load_adapter, read_adapter
from implicit_diffusion.models.adapters.saving import has_loader, save_adapter, save_comfyui_adapter
from implicit_diffusion.models.pipelines.reading import read_pipeline
from implicit_diffusion.noise import Noise
from tests.helpers import adapter_cases, tiny, tiny_pipelines
from tests.helpers.adapter_cases import ALPHA, FAMILIES, RANK

COMFYUI = [name for name in FAMILIES if name not in ("Sana", "CogVideoX", "PixArt-Σ")]
CLOSE = {"rtol": 2e-5, "atol": 5e-6}
SD, FLUX = "Stable Diffusion 1 and 2", "FLUX.1"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return functools.cache(lambda name: adapter_cases.made(name, tmp_path_factory.mktemp("pipeline")))


def save(case, folder):
    return save_adapter(folder / "lora", case.adapted, type(case.pipeline), case.part)


def refused(match, place, case, network=None):
    with pytest.raises(InvalidInputError, match=match):
        load_adapter(place, network or copy.deepcopy(case.original), type(case.pipeline), case.part)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_pipeline_with_the_adapter_is_the_trained_network(case, name, tmp_path):
    """By the pipeline's own loader, or peft where it has none; and by ours, with rank and α as they were."""
    import peft

    made = case(name)
    folder, expected = save(made, tmp_path), made.answer(made.adapted)
    assert (expected - made.answer(made.original)).abs().max() > 1e-3
    fresh = made.fresh()
    if has_loader(type(fresh), made.part):
        fresh.load_lora_weights(folder)
        theirs = getattr(fresh, made.part)
    else:
        theirs = peft.PeftModel.from_pretrained(getattr(fresh, made.part), folder).base_model.model
    torch.testing.assert_close(made.answer(theirs), expected, rtol=1e-6, atol=1e-6)
    ours = copy.deepcopy(made.original)
    load_adapter(folder, ours, type(fresh), made.part)
    assert torch.equal(made.answer(ours), expected)
    again = adapter_of(ours)
    assert (again.rank, again.alpha, again.layers) == (RANK, ALPHA, adapter_of(made.adapted).layers)
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("name", COMFYUI)
def test_the_file_for_comfyui_is_the_same_network(case, name, tmp_path):
    """Read back by diffusers' own loader, which understands these layouts; entries for α, if any, are α."""
    made = case(name)
    path = save_comfyui_adapter(tmp_path / "lora.safetensors", made.adapted, type(made.pipeline), made.part)
    fresh = made.fresh()
    fresh.load_lora_weights(path)
    torch.testing.assert_close(made.answer(getattr(fresh, made.part)), made.answer(made.adapted), **CLOSE)
    entries, layers = load_file(path), adapter_of(made.adapted).layers
    alphas = {key: entry for key, entry in entries.items() if key.endswith(".alpha")}
    layout = LAYOUTS[type(made.original).__name__]
    assert len(alphas) == layout.alphas * len(layers) and all(entry == ALPHA for entry in alphas.values())
    assert all(key.startswith(layout.prefix) for key in entries) and len(entries) == (2 + layout.alphas) * len(layers)
    ours = copy.deepcopy(made.original)
    load_adapter(path, ours, type(fresh), made.part)
    torch.testing.assert_close(made.answer(ours), made.answer(made.adapted), **CLOSE)


def test_pixart_has_a_file_for_comfyui_though_diffusers_has_no_loader(case, tmp_path):
    made = case("PixArt-Σ")
    path = save_comfyui_adapter(tmp_path / "lora.safetensors", made.adapted, type(made.pipeline), made.part)
    entries, whole = load_file(path), dict(copy.deepcopy(made.original).named_parameters())
    down, up = (f"transformer.transformer_blocks.0.attn1.to_q.lora_{which}.weight" for which in "AB")
    name = "transformer_blocks.0.attn1.to_q"
    layer = made.adapted.get_submodule(name)
    torch.testing.assert_close(entries[up] @ entries[down], layer.get_delta_weight("default"))
    assert whole[f"{name}.weight"].shape == (entries[up] @ entries[down]).shape


@pytest.mark.parametrize("name", ["Sana", "CogVideoX"])
def test_networks_that_comfyui_does_not_have_are_refused(case, name, tmp_path):
    made = case(name)
    with pytest.raises(InvalidInputError, match=f"ComfyUI reads adapters of {type(made.original).__name__}"):
        save_comfyui_adapter(tmp_path / "lora.safetensors", made.adapted, type(made.pipeline), made.part)
    assert not any(tmp_path.iterdir())


def test_layers_without_a_name_in_comfyui_are_refused(case, tmp_path):
    for name, target in (("LTX-Video", "proj_in"), ("Wan", "condition_embedder.time_proj")):
        made = case(name)
        network = copy.deepcopy(made.original)
        add_lora(network, 2, Noise(0), [target])
        with pytest.raises(InvalidInputError, match=f"no name is known .* layer {target}"):
            save_comfyui_adapter(tmp_path / "lora.safetensors", network, type(made.pipeline), made.part)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMFYUI)
def test_every_layer_by_itself_is_the_same_in_comfyui_or_refused(case, name, tmp_path):
    """No layer is saved under the name of another: one of every name that there is in a block."""
    made, written = case(name), 0
    layers = [name for name, module in made.original.named_modules() if isinstance(module, ADAPTABLE)]
    kinds = {re.sub(r"^.*(blocks|resnets|attentions|layers|refiner)\.\d+\.", "", layer): layer for layer in layers}
    for layer in kinds.values():
        network = copy.deepcopy(made.original)
        try:
            add_lora(network, 2, Noise(0), [layer], alpha=3.0)
            adapter_cases.move(network)
            path = save_comfyui_adapter(tmp_path / "one.safetensors", network, type(made.pipeline), made.part)
        except InvalidInputError:
            continue
        fresh = made.fresh()
        fresh.load_lora_weights(path)
        torch.testing.assert_close(made.answer(getattr(fresh, made.part)), made.answer(network), **CLOSE)
        written += 1
    assert written >= 4


def test_kohya_files_with_convolutions_and_feed_forward_layers(case, tmp_path):
    made = case(SD)
    network = copy.deepcopy(made.original)
    add_lora(network, 2, Noise(0), ["to_q", "conv1", "conv2", "ff.net.2", "proj_in"], alpha=1.0)
    adapter_cases.move(network)
    path = save_comfyui_adapter(tmp_path / "lora.safetensors", network, type(made.pipeline), made.part)
    fresh = made.fresh()
    fresh.load_lora_weights(path)
    torch.testing.assert_close(made.answer(fresh.unet), made.answer(network), **CLOSE)


PLAIN = """
import sys, torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipeline.load_lora_weights(sys.argv[2])
call = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    answer = pipeline.transformer.eval()(**call)[0]
assert "implicit_diffusion" not in sys.modules
torch.save(answer, sys.argv[4])
"""


@pytest.mark.slow
def test_plain_diffusers_in_a_fresh_process(case, tmp_path):
    made = case(FLUX)
    made.pipeline.save_pretrained(tmp_path / "original")
    torch.save(made.keywords, tmp_path / "call.pt")
    path = save_comfyui_adapter(tmp_path / "one.safetensors", made.adapted, type(made.pipeline), made.part)
    for place in (save(made, tmp_path), path):
        words = [tmp_path / "original", place, tmp_path / "call.pt", tmp_path / "answer.pt"]
        subprocess.run([sys.executable, "-c", PLAIN, *map(str, words)], check=True, capture_output=True)
        answer = torch.load(tmp_path / "answer.pt", weights_only=True)
        torch.testing.assert_close(answer, made.answer(made.adapted), **CLOSE)


def test_a_pipeline_that_was_read_saves_the_adapter_of_its_denoiser(tmp_path):
    """`read_pipeline` gives a denoiser with the network; a second pipeline with the file has the same u, guided."""
    family = tiny_pipelines.FAMILIES["Wan"](tmp_path)
    original = copy.deepcopy(family.pipeline.transformer)
    probed = read_pipeline(family.pipeline, 2, prompts=family.prompts, **family.call)
    add_lora(probed.denoiser.model, RANK, Noise(0), alpha=ALPHA)
    adapter_cases.move(probed.denoiser.model)
    save_adapter(tmp_path / "lora", probed.denoiser, type(probed.pipeline), "transformer")
    x, t = Noise(1).normal((2, *probed.event_shape), 0), torch.full((2,), 500.0)
    with torch.no_grad():
        expected = probed.denoiser(x, t, prompt=torch.arange(2))
        probed.denoiser.model = original
        assert not torch.allclose(probed.denoiser(x, t, prompt=torch.arange(2)), expected, atol=1e-3)
        probed.pipeline.register_modules(transformer=original)
        probed.pipeline.load_lora_weights(tmp_path / "lora")
        assert torch.equal(probed.denoiser(x, t, prompt=torch.arange(2)), expected)


def test_alpha_is_the_factor_of_the_low_rank_part(case):
    """W + (α/r) B A, in the merged network as well; by default α is r."""
    made = case(FLUX)
    original = dict(made.original.named_parameters())
    for name in adapter_of(made.adapted).layers:
        layer = made.adapted.get_submodule(name)
        down, up = (getattr(layer, f"lora_{which}")["default"].weight for which in "AB")
        torch.testing.assert_close(layer.get_delta_weight("default"), ALPHA / RANK * up @ down)
        assert torch.equal(layer.base_layer.weight, original[f"{name}.weight"])
        assert not any(isinstance(part, torch.nn.Dropout) for part in layer.lora_dropout.values())
    network = tiny.unet(**tiny.PLAIN)
    add_lora(network, 2, Noise(0))
    assert adapter_of(network).alpha == 2
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="alpha must be positive and finite"):
            add_lora(tiny.unet(**tiny.PLAIN), 2, Noise(0), alpha=wrong)


def test_adapters_in_half_precision_are_read_in_single(case, tmp_path):
    made = case(SD)
    path = save(made, tmp_path) / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({name: entry.bfloat16() for name, entry in load_file(path).items()}, path, metadata=header)
    network = copy.deepcopy(made.original)
    load_adapter(path.parent, network, type(made.pipeline), made.part)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    torch.testing.assert_close(made.answer(network), made.answer(made.adapted), rtol=0.05, atol=0.05)


def test_the_layout_of_peft_and_its_other_scale_are_read(case, tmp_path):
    """r and α in adapter_config.json; with use_rslora the factor is α/√r."""
    made = case(FLUX)
    folder = save_adapter(tmp_path / "lora", made.adapted, None, made.part)
    network = copy.deepcopy(made.original)
    load_adapter(folder, network, type(made.pipeline), made.part)
    assert torch.equal(made.answer(network), made.answer(made.adapted))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    adapter = read_adapter(folder, made.original, type(made.pipeline), made.part)
    assert adapter.alpha / adapter.rank == pytest.approx(ALPHA / RANK**0.5)


def test_an_adapter_without_a_header_has_the_factor_one(case, tmp_path):
    made = case(FLUX)
    path = save(made, tmp_path) / "pytorch_lora_weights.safetensors"
    save_file(load_file(path), path)
    adapter = read_adapter(path, made.original, type(made.pipeline), made.part)
    assert adapter.alpha == adapter.rank == RANK


def test_an_adapter_of_another_network_is_refused_by_its_layers(case, tmp_path):
    flux, sd = case(FLUX), case(SD)
    lora = save(flux, tmp_path)
    refused(r"transformer\.single_transformer_blocks.*are not of the pipeline's unet", lora, sd)
    wide = tiny.seeded(type(flux.original), **dict(flux.original.config) | {"num_attention_heads": 4})
    refused(
        r"of another network: .*lora_A\.weight has shape \(3, 32\), and the layer needs \(3, 64\)", lora, flux, wide
    )
    short = tiny.seeded(type(flux.original), **dict(flux.original.config) | {"num_single_layers": 0})
    refused(r"adapts single_transformer_blocks\.0\.attn\.to_k.*; FluxTransformer2DModel has no such", lora, flux, short)
    network = copy.deepcopy(flux.original)
    add_lora(network, 2, Noise(0), ["proj_out"])
    state = {f"transformer.{name}": weight for name, weight in adapter_of(network).weights.items()}
    save_file({name: weight for name, weight in state.items() if "blocks" not in name}, tmp_path / "out.safetensors")
    refused(r"leaves out single_transformer_blocks\.0\.proj_out", tmp_path / "out.safetensors", flux)


def entries_of(case, tmp_path):
    return load_file(save(case, tmp_path) / "pytorch_lora_weights.safetensors")


BAD = {
    "holds NaN or infinity": lambda state, first: state | {first: state[first] * torch.inf},
    "must have one positive rank": lambda state, first: state | {first: state[first][:2]},
    r"is not one of the two matrices": lambda state, first: {k: v for k, v in state.items() if k != first},
    "belongs to another kind of adapter": lambda state, first: state | {first.replace("weight", "bias"): torch.ones(3)},
    "belongs to another kind": lambda state, first: state | {"transformer.a.lora_magnitude_vector": torch.ones(3)},
    r"alpha must be a positive number, got \[0": lambda state, first: state | {"transformer.a.alpha": torch.zeros(())},
    r"alpha must be a positive number, got \[-": lambda state, first: state | {"transformer.a.alpha": -torch.ones(())},
    "alpha must be a positive number": lambda state, first: state | {"transformer.a.alpha": torch.ones(3)},
    "text_encoder.* not of the pipeline's transformer": lambda state, first: (
        state | {"text_encoder.q.lora_A.weight": torch.ones(3, 2)}
    ),
    r"one positive rank, they have \[\]": lambda state, first: {},
}


@pytest.mark.parametrize("match", BAD)
def test_wrong_entries_are_refused_by_name(case, match, tmp_path):
    made = case(FLUX)
    state = entries_of(made, tmp_path)
    first = sorted(name for name in state if "lora_A" in name)[0]
    bad = BAD[match](state, first)
    save_file(bad, tmp_path / "bad.safetensors")
    refused(match, tmp_path / "bad.safetensors", made)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"lora_alpha": 0}, "lora_alpha must be positive and finite, got 0"),
        ({"lora_alpha": -2.0}, "lora_alpha must be positive"),
        ({"r": "3"}, "r must be positive"),
        ({"use_dora": True}, "DoRA"),
        ({"alpha_pattern": {"to_q": 3}}, "of their own"),
    ],
)
def test_wrong_headers_are_refused(case, config, match, tmp_path):
    made = case(FLUX)
    path, header = (
        tmp_path / "bad.safetensors",
        {f"transformer.{k}": v for k, v in ({"r": 3, "lora_alpha": 3} | config).items()},
    )
    save_file(entries_of(made, tmp_path), path, metadata={"lora_adapter_metadata": json.dumps(header)})
    refused(match, path, made)
    folder = save_adapter(tmp_path / "peft", made.adapted, None, made.part)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    refused(match, folder, made)
    (folder / "adapter_config.json").write_text(json.dumps(written | {"peft_type": "LOHA"}))
    refused("another kind of adapter", folder, made)
    save_file(entries_of(made, tmp_path), path, metadata={"lora_adapter_metadata": "[1"})
    refused("header lora_adapter_metadata is damaged", path, made)


def test_pickles_and_folders_without_an_adapter_are_refused_and_not_opened(case, tmp_path):
    made = case(FLUX)

    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the pickle was loaded",)

    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Trap()))
    refused(r"holds a pickle, pytorch_lora_weights.bin", folder, made)
    refused("is a pickle, and loading one can run any code", folder / "pytorch_lora_weights.bin", made)
    (folder / "renamed.safetensors").write_bytes(pickle.dumps(Trap()))
    refused("is damaged", folder, made)
    refused("is not a folder with an adapter", tmp_path / "nowhere", made)
    (tmp_path / "empty").mkdir()
    refused("holds no .safetensors file with an adapter; it holds nothing", tmp_path / "empty", made)
    state = entries_of(made, tmp_path)
    for name in ("a", "b"):
        save_file(state, tmp_path / "empty" / f"{name}.safetensors")
    refused("holds several files, a.safetensors, b.safetensors; name one", tmp_path / "empty", made)
    shutil.rmtree(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.safetensors").symlink_to(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    refused("is a link to .*, outside of", tmp_path / "empty", made)
    with pytest.raises(InvalidInputError, match="DiTPipeline loads no adapters"):
        from diffusers import DiTPipeline

        read_adapter(tmp_path / "lora", made.original, DiTPipeline, "transformer")
    with pytest.raises(InvalidInputError, match=r"path must end in \.safetensors, got lora"):
        save_comfyui_adapter(tmp_path / "lora", made.adapted, type(made.pipeline), made.part)


@pytest.mark.parametrize("kind", ["digits", "class_conditional", "dit"])
def test_peft_adds_the_adapter_where_diffusers_does_not(kind, tmp_path):
    """The original network with the saved adapter is the merged one, to rounding; merged by peft, to the last bit."""
    import peft
    from diffusers import DiffusionPipeline

    from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
    from implicit_diffusion.models.adapters.saving import adapter_usage
    from implicit_diffusion.models.checkpoints import DIGITS
    from implicit_diffusion.models.pretrained import load_pretrained

    folder = DIGITS if kind == "digits" else getattr(tiny, kind)(tmp_path / "model")
    pretrained = load_pretrained("digits" if kind == "digits" else folder)
    part, network = pretrained.family.part, pretrained.denoiser.model
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    add_lora(network, RANK, Noise(0), alpha=ALPHA)
    adapter_cases.move(network)
    saved = save_adapter(tmp_path / "lora", pretrained.denoiser, type(pipeline), part)
    assert {file.name for file in saved.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    usage = adapter_usage(type(pipeline), part)
    again = copy.deepcopy(getattr(pipeline, part))
    added = eval(usage.replace('"lora"', repr(str(saved))), {"peft": peft, "pipeline": pipeline})
    generator = torch.Generator().manual_seed(6)
    x, t = torch.randn(2, *pretrained.event_shape, generator=generator), torch.tensor([3.0, 500.0])
    given = {} if pretrained.condition is None else {"class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        expected = merged(pretrained.denoiser)(x, t, **given)
        theirs = DiffusersDenoiser(getattr(pipeline, part)).eval()(x, t, **given)
        torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)
        plain = DiffusersDenoiser(added.merge_and_unload()).eval()(x, t, **given)
        torch.testing.assert_close(plain, expected, rtol=1e-6, atol=1e-6)
        load_adapter(saved, again, type(pipeline), part)
        torch.testing.assert_close(DiffusersDenoiser(again).eval()(x, t, **given), pretrained.denoiser(x, t, **given))
        assert (expected - load_pretrained(pretrained.source).denoiser(x, t, **given)).abs().max() > 1e-3


def test_without_an_adapter_there_is_none_to_save(case, tmp_path):
    with pytest.raises(InvalidInputError, match="pipeline_class must be of type type"):
        save_adapter(tmp_path / "lora", case(FLUX).adapted, case(FLUX).pipeline, "transformer")
    network = tiny.unet(**tiny.PLAIN)
    for write in (save_adapter, save_comfyui_adapter):
        with pytest.raises(InvalidInputError, match="has no adapter; call add_lora on its network"):
            write(tmp_path / "lora.safetensors", network, None, "unet")
    assert not any(tmp_path.iterdir())


def test_the_page_lists_how_adapters_are_loaded(case, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "howto" / "adapters.md"
    assert adapter_cases.markdown(case, tmp_path) in page.read_text(encoding="utf-8")
