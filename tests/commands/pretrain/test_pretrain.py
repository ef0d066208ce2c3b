"""Pretraining on a tiny setting, and the model that ships with the package."""

import itertools
import json
import math
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from implicit_diffusion import digits
from implicit_diffusion.cli import main
from implicit_diffusion.commands.pretrain import command as pretrain
from implicit_diffusion.commands.pretrain import loss as pretrain_loss
from implicit_diffusion.commands.pretrain import training
from implicit_diffusion.commands.pretrain.images.loading import Images
from implicit_diffusion.commands.pretrain.samples import sample_images
from implicit_diffusion.commands.pretrain.state import begin_pretraining
from implicit_diffusion.errors import InvalidInputError, NonFiniteError
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.runs import RunDirectory, console

TINY = pretrain.Config(steps=3, batch=4, channels=(8, 8), samples=8, chains=(2, 3))
SHIPPED = digits.ASSETS / "digits"


def train(config, data=None, directory=None):
    data = data or pretrain.images_of(config)
    return training.train(pretrain.training_of(config, data), data, directory)


@pytest.mark.drawn
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
    first, second, other = (train(replace(TINY, seed=seed))[0] for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_training_lowers_the_loss():
    untrained, _ = train(replace(TINY, steps=1))
    trained, scheduler = train(replace(TINY, steps=60, batch=32, lr=5e-3))
    held_out = digits.load_digits().held_out
    losses = [pretrain_loss.denoising_loss(unet, scheduler, held_out, repeats=2) for unet in (untrained, trained)]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"data": "letters"}, "data"),
        ({"out": digits.ASSETS}, "`path` "),
        ({"chains": (2, 5000)}, "--chains 5000: .* at most the"),
        ({"chains": (0,)}, "--chains must be"),
        ({"chains": ()}, "--chains must be"),
        ({"ema_decay": 1.5}, "--ema-decay must lie in"),
        ({"dropout": 2.0}, "--dropout must lie in"),
        ({"samples": 1}, "--samples must be"),
    ],
)
def test_bad_settings_are_refused_before_training(bad, message, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_train", lambda *arguments: pytest.fail("trained"))
    with pytest.raises(InvalidInputError, match=message):
        pretrain.run(replace(TINY, **{"out": tmp_path / "run"} | bad))
    assert not (tmp_path / "run").exists()


def test_the_model_is_there_whatever_happens_after_its_training(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no samples")

    monkeypatch.setattr(pretrain, "sampled", fail)
    with pytest.raises(RuntimeError, match="no samples"):
        pretrain.run(replace(TINY, out=tmp_path / "run"))
    assert load_pretrained(tmp_path / "run" / "model").event_shape == digits.EVENT_SHAPE
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["updates"] for line in lines] == [1, 2, 3] and all(line["loss"] > 0 for line in lines)


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_average_so_far_is_saved_on_the_way_and_leaves_no_trace_in_the_training(interrupted, tmp_path, monkeypatch):
    directory, untouched = RunDirectory.create(tmp_path / "run"), train(TINY)[0]
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    if interrupted:
        loss = training.image_losses
        monkeypatch.setattr(training, "image_losses", lambda *a: signal.raise_signal(signal.SIGINT) or loss(*a))
        with pytest.raises(KeyboardInterrupt, match="interrupted at step 1 of 3; the average of its weights"):
            train(TINY, directory=directory)
        assert "after 1 of 3 steps" in (directory.model / "README.md").read_text()
    else:
        trained, _ = train(TINY, directory=directory)
        saved = load_pretrained(directory.model).denoiser.model
        for same in (untouched, saved):
            assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), same.parameters(), strict=True))


def bits(tree):
    """A state with its tensors as bytes: equal to the bit, NaN and dtype included."""
    if isinstance(tree, torch.Tensor):
        return tree.dtype, tuple(tree.shape), tree.numpy().tobytes()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items() if key != "seconds"}
    return [bits(value) for value in tree] if isinstance(tree, list | tuple) else tree


def lines(directory):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in directory.read_metrics()]


def stop_at(step, how):
    """A loss that stops the training while it makes the step."""
    loss, calls = training.image_losses, []

    def stopping(*arguments):
        calls.append(None)
        if len(calls) == step:
            how()
        return loss(*arguments)

    return stopping


def kill():
    raise SystemExit("killed")


LONG = replace(TINY, steps=7, device="cpu")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = RunDirectory.create(tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LINES", 3)  # a line for three steps, and for the last
        train(LONG, directory=directory)
    return directory


@pytest.mark.parametrize(
    ("how", "every"),
    [
        pytest.param(lambda: signal.raise_signal(signal.SIGINT), math.inf, marks=pytest.mark.slow),
        (lambda: signal.raise_signal(signal.SIGTERM), math.inf),
        (kill, 0.0),
        pytest.param(kill, math.inf, marks=pytest.mark.slow),  # the last checkpoint is that before the first step
    ],
    ids=["Ctrl-C", "SIGTERM", "a kill", "a kill before any checkpoint was due"],
)
def test_an_interrupted_training_goes_on_bit_for_bit(how, every, uninterrupted, tmp_path, monkeypatch):
    """Weights, average, moments, rates, all generators, and one line of metrics for every three steps."""
    directory = RunDirectory.create(tmp_path / "run")
    monkeypatch.setattr(training, "LINES", 3)
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", every)
    for step in (5, 1):  # of those that are left
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)):
            patch.setattr(training, "image_losses", stop_at(step, how))
            train(LONG, directory=directory)
        torch.rand(100)  # the caller's randomness is another
    unet, _ = train(LONG, directory=directory)
    ours, theirs = (d.read_checkpoint().state["pretraining"] for d in (directory, uninterrupted))
    assert ours["step"] == 7 and bits(ours) == bits(theirs)
    assert lines(directory) == lines(uninterrupted) and [line["updates"] for line in lines(directory)] == [3, 6, 7]
    saved = load_pretrained(uninterrupted.model).denoiser.model.state_dict()
    assert bits(unet.state_dict()) == bits(dict(saved))


def test_a_signal_in_the_last_instants_of_a_training_ends_it(tmp_path, monkeypatch):
    """After the last step is made and saved: judging would not hear of it."""
    monkeypatch.setattr(console.Progress, "close", lambda bar: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 7 of 7"):
        train(LONG, directory=RunDirectory.create(tmp_path / "run"))


def test_a_training_ends_when_its_minutes_are_over(uninterrupted, tmp_path, monkeypatch, capsys):
    """With the weights that a training without a limit has then; what came before a resumption counts."""
    clock = itertools.count(0, 20)  # seconds from one look at the clock to the next
    late = replace(LONG, minutes=4.0, out=tmp_path / "run")
    monkeypatch.setattr(training, "LINES", 3)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "image_losses", stop_at(2, lambda: signal.raise_signal(signal.SIGINT)))
        pretrain.run(late)
    before = RunDirectory(late.out).read_checkpoint().state["pretraining"]
    assert before["step"] == 2 and 0 < before["seconds"] < 240
    summary = pretrain.run(late, RunDirectory(late.out))
    steps = summary["updates"]
    assert 2 < steps < 7 and 240 <= summary["seconds"] < 300
    assert f"stopped   after 4 minutes and {steps} of 7 steps" in capsys.readouterr().out
    assert lines(RunDirectory(late.out))[-1]["updates"] == steps
    state = RunDirectory(late.out).read_checkpoint().state["pretraining"]
    same = RunDirectory.create(tmp_path / "same")
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(training, "image_losses", stop_at(steps, lambda: signal.raise_signal(signal.SIGINT)))
        train(LONG, directory=same)
    whole = same.read_checkpoint().state["pretraining"]
    for name in ("unet", "average", "optimizer", "generators", "schedule"):
        assert bits(state[name]) == bits(whole[name])
    card = (late.out / "model" / "README.md").read_text()
    assert f"{steps} steps" in card
    with pytest.raises(InvalidInputError, match="--minutes must be positive"):
        replace(LONG, minutes=0.0).check()


@pytest.mark.slow
def test_resume_ends_with_the_summary_and_model_of_an_uninterrupted_run(tmp_path, monkeypatch):
    """On the command line, from another folder, with a batch that does not divide anything."""
    draws = np.random.default_rng(0)
    (tmp_path / "digits").mkdir()  # a name like any other
    for i in range(5):
        Image.fromarray(draws.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(tmp_path / "digits" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    call = [
        "pretrain",
        "--data",
        "./digits",
        "--steps",
        "5",
        "--batch",
        "3",
        "--channels",
        "8",
        "8",
        "--chains",
        "2",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--out",
    ]
    assert main([*call, "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(training, "image_losses", stop_at(3, lambda: signal.raise_signal(signal.SIGINT)))
        assert main([*call, "run"]) == 130
    with monkeypatch.context() as patch:  # and again, while samples are drawn
        patch.setattr(pretrain, "sampled", lambda *a: signal.raise_signal(signal.SIGINT))
        assert main(["resume", "run"]) == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["resume", "../run"]) == 0
    ours, theirs = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole"))
    for summary in (ours, theirs):
        del summary["seconds"], summary["config"]["out"]
    assert ours == theirs and ours["images"]["event_shape"] == [3, 8, 12]
    ours, theirs = tmp_path / "run", tmp_path / "whole"
    for file in ("model/unet/diffusion_pytorch_model.safetensors", "figures/samples.png"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    cards = [re.sub(r"\d+ s\)", "", (folder / "model/README.md").read_text()) for folder in (ours, theirs)]
    assert cards[0] == cards[1] and "# A diffusion model of digits\n" in cards[0] and str(tmp_path) not in cards[0]
    assert lines(RunDirectory(ours)) == lines(RunDirectory(theirs))
    assert main(["resume", "../run"]) == 2  # it is finished
    (ours / "figures/samples.png").unlink()
    assert main(["report", "../run"]) == 0
    assert (ours / "figures/samples.png").read_bytes() == (theirs / "figures/samples.png").read_bytes()


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    directory = RunDirectory.create(tmp_path / "run")
    config = replace(TINY, steps=1)
    train(config, directory=directory)
    real = digits.load_digits()
    fewer = Images(real.train[:-1], real.held_out, "digits")
    with pytest.raises(InvalidInputError, match=r"the images are not those that .*run began with"):
        train(config, fewer, directory)
    with pytest.raises(InvalidInputError, match=r"checkpoint/000001 does not fit this run: .*UNet2DModel"):
        train(replace(config, channels=(8, 16)), directory=directory)
    directory.checkpoints.save(2, {"loop": 1})
    with pytest.raises(InvalidInputError, match="does not fit this run: 'pretraining'"):
        train(config, directory=directory)


def test_missing_lines_of_the_metrics_are_said(tmp_path, capsys):
    directory = RunDirectory.create(tmp_path / "run")
    train(TINY, directory=directory)
    path = directory.path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::2]))
    train(TINY, directory=directory)
    assert "it lacks 1 of 3 lines, among update 2" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_touches_nothing(tmp_path, monkeypatch):
    """The loss is 0, and the slope of its root is infinite: clipped, it would be NaN in every weight."""
    directory = RunDirectory.create(tmp_path / "run")
    before = train(replace(TINY, steps=1))[0]
    loss, calls = training.image_losses, []

    def steep(unet, *arguments):
        calls.append(unet)
        return loss(unet, *arguments) if len(calls) == 1 else (0 * unet.conv_in.bias).square().sqrt()

    monkeypatch.setattr(training, "image_losses", steep)
    with pytest.raises(
        NonFiniteError, match=r"norm of the gradient is nan at step 2 of 3; try a smaller lr; the state"
    ):
        train(TINY, directory=directory)
    assert all(p.isfinite().all() for p in calls[1].parameters())
    assert sum(p.numel() for p in before.parameters()) == sum(p.numel() for p in calls[1].parameters())
    assert directory.read_checkpoint().state["pretraining"]["step"] == 0


def files_of(folder):
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_poisoned_state_never_replaces_a_sound_one(tmp_path):
    directory = RunDirectory.create(tmp_path / "run")
    tiny = pretrain.training_of(TINY, pretrain.images_of(TINY))
    unet, scheduler = tiny.network.build()
    state = begin_pretraining(tiny.descent, unet, scheduler)
    state.descend(sum(p.square().sum() for p in unet.parameters()))
    state.save(directory, ["images"])
    sound = files_of(directory.checkpoint)
    next(iter(state.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'optimizer'.*exp_avg_sq.*holds NaN or infinity"):
        state.save(directory, ["images"])
    assert files_of(directory.checkpoint) == sound


def default_network():
    return pretrain.training_of(pretrain.Config(), pretrain.images_of(pretrain.Config())).network


def test_the_shipped_model_is_small_and_loads_offline():
    from diffusers import DiffusionPipeline

    def as_json(value):
        return json.loads(json.dumps(value))  # a tuple comes back from disk as a list

    pipeline = DiffusionPipeline.from_pretrained(SHIPPED, local_files_only=True, use_safetensors=True)
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 3_000_000
    assert pipeline.scheduler.config.clip_sample is False
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    shipped, default = pipeline.unet.config, default_network().build()[0].config
    assert all(as_json(shipped[key]) == as_json(default[key]) for key in default if not key.startswith("_"))


@pytest.mark.parametrize("num_steps", [10])
def test_the_shipped_model_samples_digits(num_steps):
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(SHIPPED, local_files_only=True)
    samples = sample_images(pipeline.unet, pipeline.scheduler, num_steps, n=200, seed=5)
    result = digits.judge_samples(samples)
    assert result.classifier_confidence > 0.9 and result.judge_agreement > 0.85
    assert result.mmd < 0.01
    assert result.memorised < 0.2
    assert min(result.class_histogram) > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("steps_made", [1, pytest.param(2, marks=pytest.mark.slow)])
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
    loss, calls = training.image_losses, itertools.count(1)

    def interrupt(*arguments):
        if next(calls) == steps_made:
            signal.raise_signal(signal.SIGTERM)
        return loss(*arguments)

    assert main(["pretrain", *call, "--out", str(whole)]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(training, "image_losses", interrupt)
        assert main(["pretrain", *call, "--out", str(cut)]) == 143
    assert f"continue with `implicit-diffusion resume {cut}`" in capsys.readouterr().err
    assert main(["pretrain", *call, "--out", str(cut)]) == 2
    assert f"interrupted: continue with `implicit-diffusion resume {cut}`" in capsys.readouterr().err
    assert main(["resume", str(cut)]) == 0
    name = "model/unet/diffusion_pytorch_model.safetensors"
    assert (whole / name).read_bytes() == (cut / name).read_bytes()
    first, second = (RunDirectory(out).read_metrics() for out in (whole, cut))
    assert [m | {"seconds": 0} for m in first] == [m | {"seconds": 0} for m in second]
    summaries = [json.loads((out / "summary.json").read_text()) for out in (whole, cut)]
    assert all(summaries[0][key] == summaries[1][key] for key in ("quality", "loss_train", "loss_held_out"))
