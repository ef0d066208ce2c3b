"""Pretraining on a tiny setting, and the model that ships with the package."""

import json
from dataclasses import replace

import pytest
import torch

from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments import digits, pretrain

TINY = pretrain.Config(steps=3, batch=4, channels=(8, 8), samples=8, chains=(2, 3))
SHIPPED = digits.ASSETS / "digits"


def test_run_writes_a_folder_that_diffusers_loads(tmp_path):
    from diffusers import DiffusionPipeline

    summary = pretrain.run(replace(TINY, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert set(summary["quality"]) == {"2", "3"}
    assert (tmp_path / "run" / "figures" / "samples.png").stat().st_size > 1000
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "implicit-diffusion pretrain --data digits --out DIR" in card
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "model", local_files_only=True)
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert not list((tmp_path / "run").rglob("*.bin"))


def test_one_seed_gives_one_network_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second, other = (pretrain.train(replace(TINY, seed=seed))[0] for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert torch.equal(before, torch.get_rng_state())


def test_training_lowers_the_loss():
    untrained, _ = pretrain.train(replace(TINY, steps=1))
    trained, scheduler = pretrain.train(replace(TINY, steps=60, batch=32, lr=5e-3))
    held_out = digits.load_digits().held_out
    losses = [pretrain.denoising_loss(unet, scheduler, held_out, repeats=2) for unet in (untrained, trained)]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("bad", [{"data": "letters"}, {"out": digits.ASSETS}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        pretrain.run(replace(TINY, **bad))


def test_the_shipped_model_is_small_and_loads_offline():
    from diffusers import DiffusionPipeline

    def as_json(value):
        return json.loads(json.dumps(value))  # a tuple comes back from disk as a list

    pipeline = DiffusionPipeline.from_pretrained(SHIPPED, local_files_only=True, use_safetensors=True)
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 3_000_000
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    shipped, default = pipeline.unet.config, pretrain.build(pretrain.Config())[0].config
    assert all(as_json(shipped[key]) == as_json(default[key]) for key in default if not key.startswith("_"))


@pytest.mark.parametrize("num_steps", [10])
def test_the_shipped_model_samples_digits(num_steps):
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(SHIPPED, local_files_only=True)
    samples = pretrain.sample_images(pipeline.unet, pipeline.scheduler, num_steps, n=200, seed=5)
    result = digits.quality(samples)
    assert result["classifier_confidence"] > 0.9 and result["judge_agreement"] > 0.85
    assert result["mmd"] < 0.01
    assert result["memorised"] < 0.2
    assert min(result["class_histogram"]) > 0.03
