"""Diffusers models in and out: round trips, fresh processes, refusals."""

import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.denoisers.gaussian import GaussianDenoiser
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.tables.named import scheduler_for
from implicit_diffusion.tables.scheduler import read_table
from tests.helpers import tiny

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def tiny_unet(**changes):
    return tiny.unet(**tiny.PLAIN | changes)


@pytest.fixture
def folder(tmp_path):
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler(beta_end=0.015)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loading_gives_the_network_its_scheduler_and_its_shape(folder):
    loaded = load_pretrained(str(folder))
    assert loaded.event_shape == (1, 8, 8)
    assert loaded.source == str(folder)
    assert isinstance(loaded.scheduler, DDPMScheduler)
    assert loaded.scheduler.config.beta_end == 0.015
    assert not loaded.denoiser.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.denoiser.parameters())
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 10, 999])
    with torch.no_grad():
        assert torch.equal(loaded.denoiser(x, t), tiny_unet()(x, t).sample)
        assert torch.equal(loaded.denoiser(x, t.double()), loaded.denoiser(x, t))
    assert loaded.pipeline.unet is loaded.denoiser.model


def test_double_precision():
    denoiser = DiffusersDenoiser(tiny_unet().double())
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    u = denoiser(x, torch.tensor([5.0, 7.0], dtype=torch.float64))
    u.sum().backward()
    assert u.dtype == x.grad.dtype == torch.float64


def test_conditions_reach_the_model():
    denoiser = DiffusersDenoiser(tiny_unet(num_class_embeds=3).eval())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    with torch.no_grad():
        outputs = [denoiser(x, t, class_labels=torch.tensor([label, label])) for label in (0, 1)]
    assert not torch.equal(*outputs)


def test_old_hub_layout_with_everything_in_one_folder(folder):
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()
    assert load_pretrained(folder).event_shape == (1, 8, 8)


def test_the_shipped_digits_model():
    digits = load_pretrained("digits")
    assert digits.event_shape == (1, 8, 8)
    read_table(scheduler_for(digits.scheduler, "ddpm", clip=False), 10)


DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

for folder in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=5, output_type="np", generator=generator).images
    save_file({"images": torch.from_numpy(images)}, folder + "/drawn.safetensors")
    print(type(pipeline).__name__, "implicit_diffusion" in sys.modules)
"""


@pytest.mark.slow
def test_saved_pipelines_load_in_a_fresh_process_and_draw_the_same(folder, tmp_path):
    loaded = load_pretrained(folder)
    schedulers = {kind: scheduler_for(loaded.scheduler, kind, clip=False) for kind in ("ddpm", "ddim")}
    for kind, scheduler in schedulers.items():
        save_pipeline(tmp_path / kind, loaded.denoiser, scheduler, "# A tiny model\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", DRAW, str(tmp_path / "ddpm"), str(tmp_path / "ddim")]
    answer = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["DDPMPipeline", "False", "DDIMPipeline", "False"]

    for kind, scheduler in schedulers.items():
        # The same chain, by our table; diffusers draws no noise where there is none.
        table, generator = read_table(scheduler, 5), torch.Generator().manual_seed(0)
        x = torch.randn(2, 1, 8, 8, generator=generator)
        with torch.no_grad():
            for k in range(5):
                mean = table.a[k] * x + table.b[k] * loaded.denoiser(x, table.t[k].expand(2))
                x = mean + (table.s[k] * torch.randn(x.shape, generator=generator) if table.s[k] > 0 else 0)
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        drawn = load_file(tmp_path / kind / "drawn.safetensors")["images"]
        torch.testing.assert_close(drawn, images.float(), rtol=0, atol=1e-5)

        again = load_pretrained(tmp_path / kind)
        assert again.scheduler.config.clip_sample is False
        assert again.scheduler.config.timestep_spacing == "trailing"
        for name, parameter in loaded.denoiser.state_dict().items():
            assert torch.equal(again.denoiser.state_dict()[name], parameter)


def test_a_saved_folder_has_a_card_and_no_pickles_or_local_paths(folder, tmp_path):
    loaded = load_pretrained(folder)
    saved = save_pipeline(tmp_path / "saved", loaded.denoiser, loaded.scheduler, "# Title\n")
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert card.endswith("---\n\n# Title\n")
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert not [path for path in files if path.suffix == ".json" and str(tmp_path) in path.read_text()]
    own = save_pipeline(saved, loaded.denoiser, loaded.scheduler, "---\nlicense: mit\n---\n")
    assert (own / "README.md").read_text() == "---\nlicense: mit\n---\n"


def test_only_what_diffusers_has_a_pipeline_for_is_saved(tmp_path):
    with pytest.raises(InvalidInputError, match="DDPMScheduler or DDIMScheduler"):
        save_pipeline(tmp_path, DiffusersDenoiser(tiny_unet()), EulerDiscreteScheduler(), "")


@pytest.mark.parametrize("kind", ["ddpm", "ddim", None])
@pytest.mark.parametrize("original", [DDPMScheduler, DDIMScheduler])
def test_scheduler_for_keeps_the_noise_schedule_and_switches_clipping(original, kind):
    scheduler = original(beta_end=0.015, prediction_type="v_prediction", thresholding=True)
    made = scheduler_for(scheduler, kind, clip=False)
    assert type(made) is {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, None: original}[kind]
    assert torch.equal(made.alphas_cumprod, scheduler.alphas_cumprod)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.timestep_spacing == "trailing"
    assert (made.config.clip_sample, made.config.thresholding) == (False, False)
    assert scheduler.config.thresholding
    kept = scheduler_for(scheduler, kind, spacing="linspace")
    assert (kept.config.clip_sample, kept.config.thresholding, kept.config.timestep_spacing) == (True, True, "linspace")
    assert scheduler_for(made, kind, clip=True).config.clip_sample


def test_unknown_schedulers_and_spacings():
    with pytest.raises(InvalidInputError, match=r"sampler must be one of ddpm, ddim, euler.*got 'heun'"):
        scheduler_for(DDPMScheduler(), "heun")
    with pytest.raises(InvalidInputError, match="spacing must be one of trailing, leading, linspace"):
        scheduler_for(DDPMScheduler(), spacing="even")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_channels": 2}, "returns 2 channels for 1"),
        ({"class_embed_type": "timestep"}, "embeds its classes by .timestep."),
        ({"sample_size": None}, "no sample_size"),
    ],
)
def test_networks_that_cannot_be_used(tmp_path, changes, message):
    DDPMPipeline(unet=tiny_unet(**changes), scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=message):
        load_pretrained(tmp_path)


def test_rectangles_have_their_shape(tmp_path):
    DDIMPipeline(unet=tiny_unet(sample_size=[8, 16]), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).event_shape == (1, 8, 16)


def test_damaged_weights_are_refused(folder):
    weights = load_file(folder / WEIGHTS)
    first = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != first}, folder / WEIGHTS)
    with pytest.raises(InvalidInputError, match=f"lack 1 tensors that its config asks for, such as '{first}'"):
        load_pretrained(folder)
    save_file({**weights, first: torch.zeros(7)}, folder / WEIGHTS)
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        load_pretrained(folder)
    (folder / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(InvalidInputError, match="cannot be loaded"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UNet2DModel", "__version__"])
def test_schedulers_that_diffusers_does_not_have(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    with pytest.raises(InvalidInputError, match=f"{name}.*{diffusers.__version__} does not have"):
        load_pretrained(folder)


def test_local_folders_never_ask_the_network(folder, monkeypatch):
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("a local folder asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_pretrained(folder)


def test_a_gaussian_denoiser_is_no_pipeline(tmp_path):
    denoiser = GaussianDenoiser.ornstein_uhlenbeck(torch.zeros(2), 1.0)
    import inspect

    with pytest.raises(
        InvalidInputError, match="only a DiffusersDenoiser can be saved as a diffusers pipeline, got GaussianDenoiser"
    ):
        inspect.unwrap(save_pipeline)(tmp_path, denoiser, DDPMScheduler(), "")
