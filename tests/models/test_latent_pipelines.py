"""Text- and class-conditional pipelines of latents: our chain is their sampler, and they load again when saved."""

import json
import shutil

import pytest
import torch

from implicit_diffusion.denoisers.conditions import ClassifierFree, Drawn, Embedded
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.loops import Queue
from implicit_diffusion.models.decoders import Decoder
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.models.prompts import embed_prompts
from implicit_diffusion.noise import Noise
from implicit_diffusion.objectives import DriftPenalty, Reward
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.named import pipeline_for, scheduler_for, table_for
from implicit_diffusion.tables.scheduler import read_table
from tests.helpers import tiny

CPU = torch.device("cpu")
PROMPTS = ["a cat", "red dog"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": tiny.stable_diffusion(made / "sd"),
        "sd3": tiny.stable_diffusion_3(made / "sd3"),
        "dit": tiny.dit(made / "dit"),
    }


def guided(pretrained, scale):
    """The denoiser under prompts and guidance, with the condition of its chain: prompts in their order."""
    table = embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, PROMPTS, CPU)
    denoiser = ClassifierFree(Embedded(pretrained.denoiser, table), scale, {"prompt": len(PROMPTS)})
    return denoiser, lambda noise, batch, index: {"prompt": torch.arange(len(PROMPTS))}


def run_pipeline(pipeline, latents, **options):
    pipeline.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipeline(latents=latents, output_type="latent", **options).images)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("sd", 1.0),
        ("sd3", 4.5),
        *(pytest.param(kind, scale, marks=pytest.mark.slow) for kind, scale in (("sd", 4.5), ("sd3", 1.0))),
    ],
)
def test_our_chain_is_the_pipeline_of_diffusers(folders, kind, scale):
    """Deterministic samplers from the same latents: embeddings, guidance, times and steps must all agree."""
    pretrained = load_pretrained(folders[kind])
    scheduler = scheduler_for(pretrained.scheduler, "ddim", clip=False) if kind == "sd" else pretrained.scheduler
    denoiser, condition = guided(pretrained, scale)
    chain = Chain(denoiser, read_table(scheduler, 5), pretrained.event_shape, condition=condition)
    noise = Noise(1)
    ours = chain.sample(noise, 2)
    pipeline = pretrained.pipeline
    pipeline.scheduler = scheduler
    options = {"num_inference_steps": 5, "guidance_scale": scale, "prompt": PROMPTS}
    theirs = run_pipeline(pipeline, chain.initial(noise, 2), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (
        ours[0] - chain.replace(condition=lambda n, b, i: {"prompt": torch.tensor([1, 0])}).sample(noise, 2)[0]
    ).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd", "ddpm"), ("sd", "euler-ancestral"), ("sd", "euler"), ("sd", "dpm-solver"), ("sd3", "flow-memoryless")],
)
def test_an_exported_scheduler_runs_the_chain_in_the_pipeline(folders, name, kind, monkeypatch):
    """From the same latents and noise: what a folder is saved with makes its own pipeline sample the trained chain."""
    pretrained = load_pretrained(folders[name])
    scheduler = scheduler_for(pretrained.scheduler, kind, clip=False)
    denoiser, condition = guided(pretrained, 2.0)
    chain = Chain(denoiser, table_for(scheduler, kind, 4), pretrained.event_shape, condition=condition)
    noise = Noise(1)
    with torch.no_grad():
        steps = list(chain.walk(chain.initial(noise, 2), noise))
    drawn = iter([torch.zeros_like(x[0]) if xi is None else xi[0] for _, xi, x in steps])
    for module in ("ddpm", "dpmsolver_multistep"):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *a, **k: next(drawn))
    pipeline = pretrained.pipeline
    pipeline.scheduler, _ = pipeline_for(scheduler, kind)
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "prompt": PROMPTS}
    theirs = run_pipeline(pipeline, chain.initial(noise, 2), **options)
    torch.testing.assert_close(steps[-1][2].reshape_as(theirs), theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_stable_diffusion_3_is_fine_tuned_on_its_own_flow(folders, tmp_path):
    """Two updates through decoder, guidance and transformer, on the deterministic chain of its pipeline, and back."""
    from diffusers import DiffusionPipeline

    pretrained = load_pretrained(folders["sd3"])
    denoiser, condition = guided(pretrained, 3.0)
    before = {name: p.detach().clone() for name, p in pretrained.denoiser.model.named_parameters()}
    chain = Chain(denoiser, read_table(pretrained.scheduler, 4), pretrained.event_shape, condition=condition)

    def redness(z, condition):
        images = pretrained.decoder(z)
        assert images.shape == (2, 3, 16, 16)
        return images[:, 0].flatten(1).mean(1) * (1 - condition["prompt"])

    objective = Reward(redness) + 0.1 * DriftPenalty()
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    values = [m["objective"] for m in Queue(chain, objective, optimizer, batch=2, noise=Noise(0), stride=4).run(2)]
    assert len(values) == 2 and all(v.isfinite() for v in values)
    save_pipeline(tmp_path, denoiser, pretrained.scheduler, "# Red", original=pretrained)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    moved = [name for name, p in loaded.transformer.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 2
    images = loaded(PROMPTS, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3)


def test_dit_predicts_a_variance_that_is_left_out(folders):
    pretrained = load_pretrained(folders["dit"])
    assert (pretrained.num_classes, pretrained.event_shape) == (3, (4, 8, 8))
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 7.0]), torch.tensor([0, 2])
    with torch.no_grad():
        both = pretrained.denoiser.model(x, timestep=t, class_labels=labels).sample
        assert torch.equal(pretrained.denoiser(x, t, class_labels=labels), both[:, :4])
    chain = Chain(
        pretrained.denoiser,
        read_table(scheduler_for(pretrained.scheduler, "ddpm", clip=False), 3),
        (4, 8, 8),
        condition=Drawn("class_labels", torch.arange(3)),
    )
    assert chain.sample(Noise(0), 2).isfinite().all()


@pytest.mark.parametrize("kind", ["sd", "sd3", "dit"])
def test_images_are_those_of_the_pipeline(folders, kind):
    """The decoder against the autoencoder by hand, its gradient against plain autograd, in parts of any size."""
    decoder = load_pretrained(folders[kind]).decoder
    config = decoder.vae.config
    z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = decoder.vae.decode(z / config.scaling_factor + (config.shift_factor or 0)).sample
    assert expected.shape == (5, 3, 16, 16) and decoder.factor == 2
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (slope,) = torch.autograd.grad((expected * weight).sum(), z)
    for pixels in (1, 2 * 256, 10**6):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("implicit_diffusion.models.decoders.PIXELS_AT_ONCE", pixels)
            images = decoder(z)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad((images * weight).sum(), z)[0], slope, rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("kind", ["sd", "sd3", "dit"])
def test_latents_reach_the_decoder_as_the_pipeline_hands_them_over(folders, kind, tmp_path):
    """What each pipeline of diffusers makes of shift, scale, means and deviations that its autoencoder names."""
    folder = shutil.copytree(folders[kind], tmp_path / "model")
    path = folder / "vae" / "config.json"
    named = {"scaling_factor": 0.5, "shift_factor": 0.7, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    pretrained = load_pretrained(folder)
    pipeline, decoder, last, decoded = pretrained.pipeline, pretrained.decoder, [], []
    step, decode = pipeline.scheduler.step, decoder.vae.decode

    def stepping(*arguments, **options):
        found = step(*arguments, **options)
        last.append(found[0] if isinstance(found, tuple) else found.prev_sample)
        return found

    def decoding(z, *arguments, **options):
        decoded.append(z)
        return decode(z, *arguments, **options)

    pipeline.scheduler.step, pipeline.vae.decode, decoder.vae.decode = stepping, decoding, decoding
    pipeline.set_progress_bar_config(disable=True)
    pipeline([1] if kind == "dit" else PROMPTS[:1], num_inference_steps=2, guidance_scale=1.0, output_type="np")
    with torch.no_grad():
        decoder(last[-1])
    theirs, ours = decoded
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert (theirs - last[-1] / 0.5).abs().max() > 0.6 if kind == "sd3" else torch.allclose(theirs, last[-1] / 0.5)


@pytest.mark.parametrize("factors", [{"scaling_factor": -1}, {"shift_factor": None}, {"shift_factor": float("nan")}])
def test_factors_that_cannot_be_are_refused(folders, factors, tmp_path):
    folder = shutil.copytree(folders["sd3"], tmp_path / "model")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | factors))
    said = rf"autoencoder's {next(iter(factors))} is |\(NaN is not a finite number\)"
    with pytest.raises(InvalidInputError, match=said):
        load_pretrained(folder)


@pytest.mark.parametrize("kind", ["sd", "sd3", "dit"])
def test_a_saved_pipeline_is_the_original_with_another_network(folders, kind, tmp_path):
    from diffusers import DiffusionPipeline

    pretrained = load_pretrained(folders[kind])
    with torch.no_grad():
        for p in pretrained.denoiser.parameters():
            p.add_(0.01)
    (folders[kind] / "vae" / "old.bin").write_bytes(b"a pickle")
    saved = save_pipeline(tmp_path / "saved", pretrained.denoiser, pretrained.scheduler, "# Card", original=pretrained)
    (folders[kind] / "vae" / "old.bin").unlink()
    loaded = DiffusionPipeline.from_pretrained(saved, local_files_only=True)
    assert type(loaded).__name__ == pretrained.family.pipelines[0]
    network = getattr(loaded, pretrained.family.part)
    for name, weight in pretrained.denoiser.model.state_dict().items():
        assert torch.equal(network.state_dict()[name], weight)
    for part in pretrained.checkpoint.parts.keys() - {pretrained.family.part, "scheduler"}:
        for file in (folders[kind] / part).iterdir():
            assert (saved / part / file.name).read_bytes() == file.read_bytes()
    assert not list(saved.rglob("*.bin"))
    again = load_pretrained(saved)
    assert again.event_shape == pretrained.event_shape and "# Card" in (saved / "README.md").read_text()


def test_prompts_need_text_encoders(tmp_path):
    folder = tiny.stable_diffusion(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    pretrained = load_pretrained(folder)
    with pytest.raises(InvalidInputError, match="no text encoder to encode them"):
        embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, PROMPTS, CPU)


def test_parts_of_different_models_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="latents of 3 channels, but its network works on 4"):
        load_pretrained(tiny.stable_diffusion(tmp_path / "vae", vae=tiny.autoencoder(channels=3)))
    pretrained = load_pretrained(tiny.stable_diffusion(tmp_path / "text", cross_attention_dim=8))
    with pytest.raises(InvalidInputError, match="encoder_hidden_states of width 16, but its network needs 8"):
        embed_prompts(pretrained.checkpoint, pretrained.denoiser.model, PROMPTS, CPU)


def test_latents_without_a_scale_are_refused():
    with pytest.raises(InvalidInputError, match="scaling_factor is 0"):
        Decoder(tiny.autoencoder(scaling_factor=0))


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    folder = tiny.stable_diffusion(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["my_code", "MyEncoder"]}))
    with pytest.raises(InvalidInputError, match=r"own text_encoder code \(my_code.MyEncoder\).*never run"):
        load_pretrained(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "weights.bin")
    with pytest.raises(InvalidInputError, match="pickled weights"):
        load_pretrained(folder)
