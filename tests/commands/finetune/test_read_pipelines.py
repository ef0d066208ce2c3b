"""`finetune` and `sample` on pipelines that no family knows: their chain is read off by running them."""

import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import training
from implicit_diffusion.commands.finetune.command import run
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem.setup import build
from implicit_diffusion.commands.finetune.specs import setup_spec
from implicit_diffusion.commands.shared.conditioning import ConditioningSpec
from implicit_diffusion.commands.shared.models.read_model import read_model
from implicit_diffusion.commands.shared.models.sizes import sized
from implicit_diffusion.errors import InvalidInputError, MemoryLimitError
from implicit_diffusion.models.chain_file import read_chain
from implicit_diffusion.models.checkpoints import find_checkpoint
from implicit_diffusion.models.families import probed_family
from implicit_diffusion.models.pipelines import loading
from implicit_diffusion.models.pipelines.loading import load_pipeline
from implicit_diffusion.models.pipelines.reading import read_pipeline
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from implicit_diffusion.samplers.chain import Chain
from tests.helpers import tiny, tiny_pipelines
from tests.helpers.stops import interrupt_at

NAMES = [
    "Stable Diffusion XL",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("FLUX.1", "AuraFlow", "Wan", "LTX-Video")),
]
SIZES = {"FLUX.1": {"size": (16, 32)}, "AuraFlow": {"size": (16, 16)}, "Wan": {"size": (16, 16), "frames": 5}}
SIZES |= {"LTX-Video": {"size": (32, 32), "frames": 3}, "Stable Diffusion XL": {}}
STEPS = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny pipeline, with a file of prompts beside it."""
    made = {}

    def folder(name):
        if name not in made:
            place = tmp_path_factory.mktemp("saved")
            tiny_pipelines.FAMILIES[name](place).pipeline.save_pretrained(place / "model")
            (place / "prompts.txt").write_text("a cat\nred dogs\n", encoding="utf-8")
            made[name] = place
        return made[name]

    return folder


def options(place, name, **more):
    given = {"model": str(place / "model"), "prompts": place / "prompts.txt", "num_steps": STEPS, "device": "cpu"}
    return Config(**given | SIZES[name] | {"lora_rank": 2, "updates": 2, "batch": 2, "starts": 4, "lr": 1e-2} | more)


DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

folder, given, out = sys.argv[1:4]
pipeline = DiffusionPipeline.from_pretrained(folder)
pipeline.set_progress_bar_config(disable=True)
options = {name: int(value) for name, value in (word.split("=") for word in sys.argv[4:])}
guided = {"guidance_scale": options.pop("guidance") / 10}
drawn = pipeline(["a cat", "red dogs"], latents=load_file(given)["x"], output_type="pt", return_dict=False,
                 **options, **guided)
save_file({"images": drawn[0].contiguous()}, out)
"""


@pytest.mark.parametrize("name", NAMES)
def test_from_a_folder_to_a_folder(saved, tmp_path, capsys, name):
    """Plan, two updates of adapters for a reward of images or frames, a run that `sample` draws from again."""
    place = saved(name)
    config = options(place, name, out=tmp_path / "run")
    summary = run(config)
    assert summary["path_kl"] > 0 and summary["updates"] == 2
    trained = read_chain(tmp_path / "run" / "model")
    size, frames = config.size, config.frames
    assert len(trained.table) == STEPS and (trained.size, trained.num_frames) == (size, frames)
    model, prompts = str(tmp_path / "run" / "model"), str(place / "prompts.txt")
    drawn = ["--num", "2", "--out", str(tmp_path / "grid.png"), "--device", "cpu"]
    main(["sample", "--model", model, "--prompts", prompts, *drawn])
    assert (tmp_path / "grid.png").stat().st_size > 100
    assert "guidance_scale" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    again = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert again["size"] == (None if size is None else list(size)) and again["frames"] == frames


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AuraFlow", "Wan"])
def test_the_export_in_a_process_of_diffusers_alone(saved, tmp_path, name):
    """The pipeline that a run exports, loaded by diffusers, samples the chain that the summary speaks of."""
    place = saved(name)
    config = options(place, name, scheduler="flow-euler", penalty="drift", kl_weight=0.1, out=tmp_path / "run")
    run(config)
    model = tmp_path / "run" / "model"
    checkpoint = find_checkpoint(model)
    conditions = ConditioningSpec(str(model), place / "prompts.txt")
    read = read_model(checkpoint, conditions, STEPS, sampler="own", size=config.size, frames=config.frames)
    chain = Chain(
        read.pretrained.denoiser,
        read_chain(model).table,
        read.pretrained.event_shape,
        condition=lambda noise, batch, index: {"prompt": torch.arange(batch)},
    )
    x = chain.initial(Noise(1), 2)
    with torch.no_grad():
        ours = (read.pretrained.decoder(chain.sample(Noise(1), 2)) / 2 + 0.5).clamp(0, 1)
    from safetensors.torch import load_file, save_file

    save_file({"x": x / chain.table.initial_std}, tmp_path / "x.safetensors")
    words = [f"height={config.size[0]}", f"width={config.size[1]}", f"num_inference_steps={STEPS}"]
    words += [f"guidance={round(10 * checkpoint.family.guidance)}"]
    words += [] if config.frames is None else [f"num_frames={config.frames}"]
    command = [sys.executable, "-c", DRAW, str(model), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(tmp_path / "y.safetensors")["images"]
    theirs = theirs.transpose(1, 2) if ours.ndim == 5 else theirs  # diffusers puts the frames before the colours
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_text_encoders_are_in_memory_one_at_a_time(saved, monkeypatch):
    """Each is loaded for its calls, and gone before the next one comes; what they answer is what diffusers' answer."""
    place = saved("Stable Diffusion XL")
    alive, most, own = weakref.WeakSet(), [], loading.load_model

    def load_model(checkpoint, folder, part, *args, **kwargs):
        loaded = own(checkpoint, folder, part, *args, **kwargs)
        if part.startswith("text_encoder"):
            alive.add(loaded)
            most.append(len(alive))
        return loaded

    monkeypatch.setattr(loading, "load_model", load_model)
    prompts = ["a cat", "red dogs"]
    ours = read_pipeline(load_pipeline(place / "model"), 1, prompts=prompts)
    assert len(most) >= 2 and max(most) == 1 and not alive

    from diffusers import DiffusionPipeline

    theirs = read_pipeline(DiffusionPipeline.from_pretrained(place / "model"), 1, prompts=prompts)
    x, t = Noise(0).normal((2, *ours.event_shape), 0), torch.tensor([3.0, 500.0])
    which = torch.tensor([1, 0])
    assert torch.equal(ours.denoiser(x, t, prompt=which), theirs.denoiser(x, t, prompt=which))
    assert torch.equal(ours.decoder(x), theirs.decoder(x))


@pytest.mark.slow
def test_each_prompt_has_its_own_negative_one(saved, tmp_path):
    """As many calls with one prompt each have it."""
    place = saved("Stable Diffusion XL")
    lines = [{"prompt": "a cat", "negative_prompt": "dogs"}, {"prompt": "red dogs"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = options(place, "Stable Diffusion XL", prompts=tmp_path / "p.jsonl", lora_rank=None)
    chain = build(setup_spec(config)).chain
    x, t = Noise(0).normal((2, *chain.event_shape), 0), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        both = chain.denoiser(x, t, prompt=torch.arange(2))
        for i, line in enumerate(lines):
            negative = line.get("negative_prompt", "")
            pipeline = load_pipeline(place / "model")
            one = read_pipeline(pipeline, 1, prompts=[line["prompt"]], negative_prompt=negative)
            torch.testing.assert_close(both[i : i + 1], one.denoiser(x[i : i + 1], t[i : i + 1]), rtol=1e-5, atol=1e-5)
        without = read_pipeline(load_pipeline(place / "model"), 1, prompts=["a cat"])
        assert not torch.allclose(both[:1], without.denoiser(x[:1], t[:1]), atol=1e-3)


def refused(config, match):
    with pytest.raises(InvalidInputError, match=match):
        build(setup_spec(config))


def test_what_a_pipeline_does_not_have_is_refused_before_it_is_loaded(saved, monkeypatch):
    place = saved("Stable Diffusion XL")
    monkeypatch.setattr("implicit_diffusion.commands.shared.models.read_model.pipeline_of", None)

    def of(**more):
        return options(place, "Stable Diffusion XL", **more)

    refused(of(prompts=None), "is text-conditional: give --prompts FILE")
    refused(of(frames=3), "--frames: a StableDiffusionXLPipeline makes images, not videos")
    refused(of(null_class=3), "--null-class: .* is not conditioned on classes")


def test_what_a_pipeline_refuses_is_refused_with_its_words(saved):
    place = saved("Stable Diffusion XL")
    config = options(place, "Stable Diffusion XL", size=(17, 32))
    refused(config, r"StableDiffusionXLPipeline\(.*\) fails: ValueError: .*divisible by 8")
    refused(options(place, "Stable Diffusion XL", scheduler="flow-euler"), "is for flow models")


@pytest.mark.slow
def test_the_reference_must_be_the_same_network(saved, tmp_path):
    """Another network with the same plan, or a refusal that says what differs."""
    place = saved("Stable Diffusion XL")
    config = options(place, "Stable Diffusion XL", reference=str(place / "model"), lora_rank=None)
    chain = build(setup_spec(config)).chain
    x, t, which = Noise(0).normal((2, *chain.event_shape), 0), torch.tensor([3.0, 500.0]), torch.arange(2)
    with torch.no_grad():
        assert torch.equal(chain.reference(x, t, prompt=which), chain.denoiser(x, t, prompt=which))
    other = tiny.stable_diffusion(tmp_path / "other")
    refused(options(place, "Stable Diffusion XL", reference=str(other)), "is read off|is not the original")


def edited(saved, tmp_path, change):
    """A copy of the index of a pipeline, changed, with links to its parts."""
    folder = tmp_path / "edited"
    folder.mkdir()
    for part in (saved("Stable Diffusion XL") / "model").iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    index = json.loads((saved("Stable Diffusion XL") / "model" / "model_index.json").read_text(encoding="utf-8"))
    change(index)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_class_name": "NoSuchPipeline"}, "diffusers has no pipeline of that name"),
        ({"_class_name": "UNet2DConditionModel"}, "diffusers has no pipeline of that name"),
        ({"unet_2": ["diffusers", "UNet2DConditionModel"]}, "a StableDiffusionXLPipeline has no part 'unet_2'"),
        ({"unet": ["diffusers", "AutoencoderKL"]}, "has none"),
        ({"scheduler": [None, None]}, "has no scheduler"),
        ({"unet": ["my_code", "UNet2DConditionModel"]}, "has none|brings its own"),
    ],
)
def test_pipelines_that_are_no_chains_are_refused_by_their_index(saved, tmp_path, change, match):
    with pytest.raises(InvalidInputError, match=match):
        find_checkpoint(edited(saved, tmp_path, lambda index: index.update(change)))


def test_two_networks_and_class_labels_are_refused_with_the_reason():
    """Wan 2.2 has one network for the noisy rows and another one for the rest."""
    wan = ("diffusers", "WanTransformer3DModel")
    parts = {"transformer": wan, "transformer_2": wan, "scheduler": ("diffusers", "UniPCMultistepScheduler")}
    with pytest.raises(InvalidInputError, match="this WanPipeline has transformer and transformer_2"):
        probed_family("WanPipeline", parts)
    other = {"transformer": wan, "scheduler": ("diffusers", "DDIMScheduler")}
    with pytest.raises(InvalidInputError, match="sampled under class labels"):
        probed_family("DiTPipeline", other)


def test_load_pretrained_says_how_others_are_read(saved):
    with pytest.raises(InvalidInputError, match=r"use read_pipeline\(load_pipeline\(model\), num_steps, prompts=…\)"):
        load_pretrained(saved("Stable Diffusion XL") / "model")


def test_the_size_of_a_family_that_is_known(tmp_path):
    """Latents of the size over the autoencoder's factor; what its network cannot do is refused."""
    model = load_pretrained(tiny.stable_diffusion(tmp_path))
    other = sized(model, (16, 32), None)
    assert other.event_shape == (4, 8, 16)
    assert other.decoder(torch.zeros(1, 4, 8, 16)).shape == (1, 3, 16, 32)
    assert sized(model, None, None) is model and sized(model, (16, 16), None) is model
    for side in (32, 17):  # which, rounded down, is the model's own size
        with pytest.raises(InvalidInputError, match=f"--size 17 {side}: both must be multiples of 2"):
            sized(model, (17, side), None)
    with pytest.raises(InvalidInputError, match="--size 9 7: the network"):
        sized(load_pretrained("digits"), (9, 7), None)
    with pytest.raises(InvalidInputError, match="--frames: digits makes images"):
        sized(load_pretrained("digits"), None, 4)


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_model(saved, tmp_path, monkeypatch):
    """Bit for bit, from the run's own copy of the prompts, with the size and the guidance that it began with."""
    from safetensors.torch import load_file

    place = saved("FLUX.1")
    config = options(place, "FLUX.1", guidance=2.0)
    run(replace(config, out=tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(1)])
        with pytest.raises(KeyboardInterrupt):
            run(replace(config, out=tmp_path / "parts"))
    assert main(["resume", str(tmp_path / "parts")]) == 0
    whole, parts = (tmp_path / run / "model" for run in ("whole", "parts"))
    for name in ("transformer/diffusion_pytorch_model.safetensors", "chain.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    one, other = (load_file(run / "lora" / "pytorch_lora_weights.safetensors") for run in (whole, parts))
    assert one.keys() == other.keys()  # the order of its header's metadata is not determined
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_exact_samples_of_a_read_pipeline(saved, tmp_path):
    """The run's problem is set up again from its folder, whose exported scheduler is another one than the model's."""
    place = saved("FLUX.1")
    run(options(place, "FLUX.1", out=tmp_path / "run", kl_weight=1.0))
    model, out = str(tmp_path / "run" / "model"), str(tmp_path / "grid.png")
    drawn = ["--num", "2", "--particles", "4", "--out", out, "--device", "cpu"]
    assert main(["sample", "--exact", "--model", model, *drawn]) == 0
    assert json.loads((tmp_path / "grid.json").read_text(encoding="utf-8"))["acceptance"] > 0


@pytest.mark.parametrize("kind", ["sharded", "variant"])
def test_weights_in_parts_and_in_variants_are_loaded(tmp_path, kind):
    """In the places where diffusers puts them."""
    family = tiny_pipelines.FAMILIES["Stable Diffusion XL"](tmp_path)
    how = {"max_shard_size": "20KB"} if kind == "sharded" else {"variant": "fp16"}
    family.pipeline.save_pretrained(tmp_path / "model", **how)
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > (kind == "sharded")
    loaded = load_pipeline(tmp_path / "model").unet.state_dict()
    assert all(torch.equal(loaded[key], weight) for key, weight in family.pipeline.unet.state_dict().items())


def test_pickled_and_quantised_parts_are_refused(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved("Stable Diffusion XL") / "model", folder)
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    other = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "unet" / "config.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(InvalidInputError, match="its weights are quantised"):
        load_pipeline(folder)
    for path in (folder / "text_encoder_2").glob("*.safetensors"):
        path.rename(path.with_name("pytorch_model.bin"))
    with pytest.raises(InvalidInputError, match="holds only pickled weights"):
        load_pipeline(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Stable Diffusion XL", pytest.param("FLUX.1", marks=pytest.mark.slow)])
def test_a_frozen_network_keeps_half_precision(tmp_path, name):
    """Under adapters the base stays as it was saved; u is that of single precision, and the path KL begins at 0."""
    family = tiny_pipelines.FAMILIES[name](tmp_path)
    part = "unet" if name == "Stable Diffusion XL" else "transformer"
    getattr(family.pipeline, part).to(torch.bfloat16)
    family.pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\nred dogs\n", encoding="utf-8")
    chain = build(setup_spec(options(tmp_path, name))).chain
    kinds = {p.dtype for p in chain.denoiser.parameters() if not p.requires_grad}
    assert torch.bfloat16 in kinds and all(
        p.dtype == torch.float32 for p in chain.denoiser.parameters() if p.requires_grad
    )
    whole = build(setup_spec(options(tmp_path, name, lora_rank=None))).chain
    x, which = Noise(0).normal((2, *chain.event_shape), 0), torch.arange(2)
    t = torch.full((2,), float(chain.table.t[1]))
    with torch.no_grad():
        assert torch.equal(chain.denoiser(x, t, prompt=which), whole.denoiser(x, t, prompt=which))
        assert torch.equal(chain.denoiser(x, t, prompt=which), chain.reference(x, t, prompt=which))


def test_what_cannot_fit_is_refused_before_weights_are_read(saved, monkeypatch):
    """By the run of the pipeline without memory: states and activations are those of its own size, with guidance."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**4}))
    monkeypatch.setattr("implicit_diffusion.models.parts._load", lambda *a: pytest.fail("weights were read"))
    spec = setup_spec(options(saved("Stable Diffusion XL"), "Stable Diffusion XL"))
    match = r"cpu has 10 kB free.*at least .*network .*states .*activations .*text encoder 2 .*have not been read"
    with pytest.raises(MemoryLimitError, match=match):
        build(spec)
