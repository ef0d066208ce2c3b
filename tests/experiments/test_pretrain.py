"""Pretraining on a tiny setting, and the model that ships with the package."""

import itertools
import json
import signal
from dataclasses import replace

import pytest
import torch

from implicit_diffusion.cli import main
from implicit_diffusion.denoisers.pretrained import load_pretrained
from implicit_diffusion.errors import InvalidInputError
from implicit_diffusion.experiments import digits, pretrain
from implicit_diffusion.runs import RunDirectory

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


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"data": "letters"}, "data"),
        ({"out": digits.ASSETS}, "--out"),
        ({"chains": (2, 5000)}, "--chains 5000: .* more than"),
        ({"chains": (0,)}, "--chains must be"),
        ({"chains": ()}, "--chains must be"),
        ({"ema_decay": 1.5}, "--ema-decay must lie in"),
        ({"dropout": 2.0}, "--dropout must lie in"),
        ({"samples": 1}, "--samples must be"),
    ],
)
def test_bad_settings_are_refused_before_training(bad, message, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "_train", lambda *arguments: pytest.fail("trained"))
    with pytest.raises(InvalidInputError, match=message):
        pretrain.run(replace(TINY, **{"out": tmp_path / "run"} | bad))
    assert not (tmp_path / "run").exists()


def test_the_model_is_there_whatever_happens_after_its_training(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no samples")

    monkeypatch.setattr(pretrain, "sample_images", fail)
    with pytest.raises(RuntimeError, match="no samples"):
        pretrain.run(replace(TINY, out=tmp_path / "run"))
    assert load_pretrained(tmp_path / "run" / "model").event_shape == digits.EVENT_SHAPE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["updates"] for line in lines] == [1, 2, 3] and all(line["loss"] > 0 for line in lines)


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_average_so_far_is_saved_on_the_way_and_leaves_no_trace_in_the_training(interrupted, tmp_path, monkeypatch):
    directory, plain = RunDirectory.create(tmp_path / "run"), pretrain.train(TINY)[0]
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0.0)
    if interrupted:
        loss = pretrain._loss
        monkeypatch.setattr(pretrain, "_loss", lambda *a: signal.raise_signal(signal.SIGINT) or loss(*a))
        with pytest.raises(KeyboardInterrupt, match="interrupted at step 1 of 3; the average of its weights"):
            pretrain.train(TINY, directory=directory)
        assert "after 1 of 3 steps" in (directory.model / "README.md").read_text()
    else:
        trained, _ = pretrain.train(TINY, directory=directory)
        saved = load_pretrained(directory.model).denoiser.model
        for same in (plain, saved):
            assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), same.parameters(), strict=True))


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


@pytest.mark.parametrize("steps_made", [1, 2])
def test_an_interrupted_pretraining_goes_on_bit_for_bit(steps_made, tmp_path, monkeypatch, capsys):
    call = [
        "--steps",
        "4",
        "--batch",
        "4",
        "--channels",
        "8",
        "8",
        "--samples",
        "8",
        "--chains",
        "2",
        "--dropout",
        ".5",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    loss, calls = pretrain._loss, itertools.count(1)

    def interrupt(*arguments):
        if next(calls) == steps_made:
            signal.raise_signal(signal.SIGTERM)
        return loss(*arguments)

    assert main(["pretrain", *call, "--out", str(whole)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "_loss", interrupt)
        assert main(["pretrain", *call, "--out", str(cut)]) == 143
    assert f"go on with `implicit-diffusion resume {cut}`" in capsys.readouterr().err
    assert main(["pretrain", *call, "--out", str(cut)]) == 2
    assert f"interrupted: go on with `implicit-diffusion resume {cut}`" in capsys.readouterr().err
    assert main(["resume", str(cut)]) == 0
    name = "model/unet/diffusion_pytorch_model.safetensors"
    assert (whole / name).read_bytes() == (cut / name).read_bytes()
    first, second = (RunDirectory(out).read_metrics() for out in (whole, cut))
    assert [m | {"seconds": 0} for m in first] == [m | {"seconds": 0} for m in second]
    summaries = [json.loads((out / "summary.json").read_text()) for out in (whole, cut)]
    assert all(summaries[0][key] == summaries[1][key] for key in ("quality", "loss_train", "loss_held_out"))
