"""The main job end to end, on a tiny scale: from a diffusers folder to a diffusers folder."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import implicit_diffusion as idf
from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import judging, planning, training
from implicit_diffusion.commands.rewards.shipped import brightness
from implicit_diffusion.denoisers.adapter import DiffusersDenoiser
from implicit_diffusion.evaluation import effect_of_clipping, evaluate, make_plan
from implicit_diffusion.models.pretrained import load_pretrained, save_pipeline
from implicit_diffusion.noise import Noise
from implicit_diffusion.runs import clock
from implicit_diffusion.samplers.chain import Chain
from implicit_diffusion.tables.named import scheduler_for
from implicit_diffusion.tables.scheduler import read_table
from tests.helpers import tiny
from tests.helpers.stops import interrupt_at

TINY = ["--num-steps", "4", "--batch", "2", "--updates", "6", "--starts", "8", "--lr", "1e-4", "--kl-weight", "2.5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the queue on the shipped digits."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["finetune", *TINY, "--out", str(out)]) == 0
    return out


def test_the_run_directory_holds_what_is_promised(finished):
    summary = json.loads((finished / "summary.json").read_text())
    promised = """reward_before reward_after path_kl j_before j_after j_bound j_bound_se captured seconds updates
        network_evaluations classifier_confidence_before classifier_confidence_after class_histogram_before
        class_histogram_after reward_exported"""
    assert set(promised.split()) <= summary.keys()
    assert summary["updates"] == 6 and summary["path_kl"] > 0
    assert summary["j_bound"] < summary["j_before"]
    assert summary["j_after"] == pytest.approx(-summary["reward_after"] + 2.5 * summary["path_kl"], rel=1e-6)
    law = summary["reweighted"]
    assert law["j"] == pytest.approx(2.5 * law["path_kl"] - law["reward"], rel=1e-6) and law["kl_weight"] == 2.5
    assert law["j_fall"] == pytest.approx(summary["j_before"] - law["j"]) and summary["reweighted_missing"] is None
    assert "trained and weighted" in (finished / "report.html").read_text()
    config = json.loads((finished / "config.json").read_text())
    assert config["kl_weight"] == 2.5 and config["scheduler"] == "ddpm" and config["seed"] == 0
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 6 and metrics[-1]["network_evaluations"] == summary["network_evaluations"]
    assert {"plan.png", "samples.png", "frontier.png", "training.png"} <= {p.name for p in finished.glob("figures/*")}
    assert "http://" not in (finished / "report.html").read_text()
    card = (finished / "model" / "README.md").read_text()
    assert "num_inference_steps=4" in card and "brightness" in card


def test_time_and_metrics_are_told_once_and_whole(finished):
    """All seconds by parts, in the file and in the report; nothing that a draining queue did not see."""
    spent = clock.seconds(finished)
    assert {"loading", "planning", "training", "held-out checks", "saving", "judging", "drawing"} <= spent.keys()
    assert spent["training"] == pytest.approx(json.loads((finished / "summary.json").read_text())["seconds"], rel=0.2)
    page = (finished / "report.html").read_text()
    assert all(f'<th scope="row">{part}</th>' in page for part in (*spent, "all"))
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    rewards = [m["reward"] for m in metrics if "reward" in m]
    assert len(rewards) == len(set(rewards)) == 6 - 3 and metrics[-1]["phase"] == "draining"
    for m in metrics:
        if "held_out_objective" in m:
            formula = 2.5 * m["held_out_path_kl"] - m["held_out_reward"]
            assert m["held_out_objective"] == pytest.approx(formula, rel=1e-6)


def test_a_finished_run_is_reopened_as_the_page_on_python_says(finished, capsys):
    page = (Path(__file__).parents[3] / "docs" / "howto" / "python.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"<!-- skip: next -->\n\n```python\n([^`]*runs/sharp[^`]*)```", page)
    names = {"idf": idf}
    exec(recipe.replace("runs/sharp", str(finished)), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["images"].isfinite().all()
    assert capsys.readouterr().out.startswith("2.5 0.")


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipeline.set_progress_bar_config(disable=True)
draws = torch.Generator().manual_seed(0)
images = pipeline(batch_size=3, num_inference_steps=4, generator=draws, output_type="np").images
print(type(pipeline).__name__, images.shape)
"""


@pytest.mark.slow  # tests/models/test_pretrained.py has a fresh process for what `save_pipeline` writes
def test_plain_diffusers_loads_the_result_in_a_fresh_process(finished):
    call = [sys.executable, "-c", LOAD, finished / "model"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "DDPMPipeline (3, 8, 8, 1)"


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_the_exported_pipeline_is_our_sampler(finished, kind, monkeypatch):
    """The same draws, before the pipeline clamps: every scheduler step of the pipeline against every row of ours."""
    loaded = load_pretrained(finished / "model")
    scheduler = scheduler_for(loaded.scheduler, kind)
    options = {"eta": 1.0} if kind == "ddim" else {}
    chain = Chain(loaded.denoiser, read_table(scheduler, 4, **options), loaded.event_shape)
    noise, batch = Noise(3), 5
    ours = chain.sample(noise, batch)
    draws = iter([noise.normal((batch, *chain.event_shape), 0, k) for k in range(5)])
    for module in ("ddpm", "ddim"):
        monkeypatch.setattr(f"diffusers.pipelines.{module}.pipeline_{module}.randn_tensor", lambda *a, **k: next(draws))
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *a, **k: next(draws))
    pipeline = type(loaded)(loaded.denoiser, scheduler, loaded.event_shape, "").pipeline
    pipeline.set_progress_bar_config(disable=True)
    last = []
    step = pipeline.scheduler.step  # DDIMPipeline makes its own
    monkeypatch.setattr(pipeline.scheduler, "step", lambda *a, **k: last.append(step(*a, **k)) or last[-1])
    pipeline(batch_size=batch, num_inference_steps=4, output_type="np", **options)
    torch.testing.assert_close(last[-1].prev_sample, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--loop", "nested"], id="nested", marks=pytest.mark.slow),
        pytest.param(["--scheduler", "ddim"], id="ddim", marks=pytest.mark.slow),
        pytest.param(["--stride", "2", "--ema", "0.9", "--accumulate", "2"], id="stride, average, accumulation"),
    ],
)
def test_variants_run(options, tmp_path):
    assert main(["finetune", *TINY, "--updates", "2", *options, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["updates"] == 2 and summary["j_bound"] is not None


@pytest.mark.slow
@pytest.mark.parametrize(("num_steps", "stride"), [(4, 1), (10, 1), (11, 2)])
def test_the_stride_keeps_ten_batches_in_flight(num_steps, stride, tmp_path):
    options = ["--plan", "--num-steps", str(num_steps), "--starts", "4", "--out", str(tmp_path / "run")]
    assert main(["finetune", *TINY, *options]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["stride"] == stride


@pytest.mark.slow
def test_deterministic_chain_with_drift_penalty(tmp_path, capsys):
    """No plan, no KL and no J, and nothing is said about them."""
    options = ["--scheduler", "ddim", "--eta", "0", "--penalty", "drift", "--out", str(tmp_path / "run")]
    assert main(["finetune", *TINY, "--updates", "2", *options]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reward_after"] is not None
    assert all(summary[name] is None for name in ("path_kl", "captured", "j_before", "j_after", "j_bound"))
    printed, card = capsys.readouterr().out, (tmp_path / "run" / "model" / "README.md").read_text()
    assert "pretrained reward" in printed and "KL" not in printed and "J  " not in printed
    assert "KL" not in card and "share" not in card and "2.5 × the squared distance of the drifts" in card
    page = re.sub('base64,[^"]*', "", (tmp_path / "run" / "report.html").read_text())
    assert "KL" not in page and summary["reweighted"] is None and summary["reweighted_missing"] in page


@pytest.mark.slow
def test_target_kl_stops(tmp_path):
    options = ["--target-kl", "1e-6", "--target-kl-mode", "stop", "--updates", "60", "--out", str(tmp_path / "run")]
    assert main(["finetune", *TINY, *options]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["updates"] < 60 and "reached the target" in summary["stopped"] and summary["reached_target"]
    assert summary["path_kl"] == pytest.approx(1e-6, rel=0.5)  # however small beside a single step


@pytest.mark.slow
def test_an_adapted_kl_weight_reads_the_same_everywhere(tmp_path):
    """config.json says where β began and the command that repeats the run; all else says where it ended, or both."""
    out = tmp_path / "run"
    assert main(["finetune", *TINY, "--target-kl", "1e-3", "--out", str(out)]) == 0
    config, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary"))
    end = summary["kl_weight"]
    assert config["kl_weight"] == summary["kl_weight_at_start"] == 2.5 and end > 2.5
    report = (out / "report.html").read_text()
    assert f"KL weight {end:.4g} (adapted, 2.5 at the start)" in report
    assert "kl_weight, at the start</th><td>2.5<" in report and f"target_kl)</th><td>{end:.6g}<" in report
    assert "--kl-weight 2.5" in report and f"{end:.4g} × KL" in (out / "model" / "README.md").read_text()


@pytest.mark.slow
def test_too_large_a_rate_is_the_first_thing_that_is_said(tmp_path, capsys):
    """The bound is where pretrained samples see it, and the rate that is advised makes J fall."""
    out = tmp_path / "run"
    assert main(["finetune", *TINY, "--lr", "0.1", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["j_after"] > summary["j_before"] + 10 and summary["captured"] is None
    assert summary["j_bound_from"] == "pretrained" and summary["j_bound"] < summary["j_before"]
    assert next(iter(summary)) == "worse" and summary["worse"] in (out / "model" / "README.md").read_text()
    (printed, said), report = capsys.readouterr(), (out / "report.html").read_text()
    assert said.count("Stopped: the path KL is") == 1 and summary["updates"] <= 2  # at once, whatever is still to come
    assert summary["stopped"] in printed and f"<b>Stopped after update {summary['updates']}: J on" in report
    assert printed.index("Fine-tuning made the model worse: J ") < printed.index("\nreward    ")
    assert f'<p class="lead"><b>{summary["worse"]}</b>' in report
    rate = re.search(r"Try --lr (\S+), \d+ times smaller", summary["stopped"]).group(1)
    assert "Try" not in summary["worse"]  # it is said once
    assert main(["finetune", *TINY, "--lr", rate, "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["worse"] is None and again["j_after"] < again["j_before"] and again["captured"] > 0


@pytest.mark.slow
def test_a_plan_is_kept_and_the_run_may_go_into_its_folder(tmp_path, capsys):
    out = tmp_path / "run"
    plan = ["--plan", "--num-steps", "4", "--starts", "8", "--kl-weight", "100", "--out", str(out)]
    assert main(["finetune", *plan]) == 0
    printed = capsys.readouterr().out
    files = [out / "plan.json", out / "figures" / "plan.png", out / "figures" / "pretrained.png"]
    assert all(file.exists() and str(file) in printed for file in files) and not (out / "model").exists()
    assert 100 in [row["kl_weight"] for row in json.loads(files[0].read_text())["rows"]] and " 100 " in printed
    assert main(["finetune", *TINY, "--updates", "1", "--out", str(out)]) == 0
    assert (out / "model").exists()
    assert main(["finetune", *TINY, "--updates", "1", "--out", str(out)]) == 2


@pytest.fixture
def clipping_folder(tmp_path):
    """A three-channel model whose scheduler clips, as many on the hub do."""
    from diffusers import DDPMScheduler

    unet = tiny.unet(in_channels=3, out_channels=3, **tiny.PLAIN | {"add_attention": True})
    return save_pipeline(tmp_path / "clips", DiffusersDenoiser(unet), DDPMScheduler(clip_sample=True), "a test")


@pytest.mark.slow
def test_clipping_is_refused_unless_switched_off_and_then_accounted_for(clipping_folder, tmp_path, capsys):
    call = ["finetune", *TINY, "--updates", "2", "--model", str(clipping_folder), "--out", str(tmp_path / "run")]
    assert main(call) == 2
    assert "--no-clip" in capsys.readouterr().err
    assert main([*call, "--no-clip"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["clipping"]["largest_change"] > 0 and summary["quality_before"] is None
    saved = json.loads((tmp_path / "run" / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["clip_sample"] is False


def test_effect_of_clipping_uses_the_chains_own_draws():
    """With a clip range that never bites, both samplers agree."""
    loaded = load_pretrained("digits")
    free = scheduler_for(loaded.scheduler, "ddpm")
    chain = Chain(loaded.denoiser, read_table(free, 4), loaded.event_shape)
    clipped = type(free).from_config(free.config, clip_sample=True, clip_sample_range=1e6)
    effect = effect_of_clipping(chain, clipped, brightness, Noise(0), {})
    assert effect.largest_change < 1e-4


def test_a_constant_reward_has_no_plan():
    loaded = load_pretrained("digits")
    chain = Chain(loaded.denoiser, read_table(loaded.scheduler, 2), loaded.event_shape)
    with pytest.raises(ValueError, match="varies"):
        make_plan(evaluate(chain, lambda x: 0 * x.flatten(1).sum(1), Noise(0), starts=4, repeats=2))


def test_sample_draws_a_grid(finished, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "grid.png"
    assert main(["sample", "--model", str(finished / "model"), "--num", "5", "--out", str(out)]) == 0
    assert Image.open(out).size == (3 * 64, 2 * 64)
    assert main(["sample", "--model", str(finished / "model"), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_images_do_not_depend_on_what_shares_their_batch_but_on_their_number(finished, tmp_path, monkeypatch):
    """Batches of two give five images, in order, each batch from noise of its own."""
    from PIL import Image

    sizes, original = [], Chain.sample
    monkeypatch.setattr(
        Chain, "sample", lambda chain, noise, n, first: sizes.append((first, n)) or original(chain, noise, n, first)
    )
    monkeypatch.setattr("implicit_diffusion.evaluation.chains.NUMBERS", 2 * 64)
    out = tmp_path / "grid.png"
    assert main(["sample", "--model", str(finished / "model"), "--num", "5", "--out", str(out)]) == 0
    assert sizes == [(0, 2), (2, 2), (4, 1)] and Image.open(out).size == (3 * 64, 2 * 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "grid"], "must end in .png"),
        (["--out", "grid.foo"], "must end in .png"),
        (["--out", "grid.npy"], "only an energy-based model"),
        (["--out", "file/grid.png"], "cannot be made"),
        (["--num-steps", "0"], "--num-steps must be"),
        (["--num-steps", "-1"], "--num-steps must be"),
        (["--num-steps", "5000"], "--num-steps must be at most the 1000 timesteps"),
        (["--num", "0"], "--num must be"),
        (["--model", "{run}"], "is the folder of a run; its model is"),
    ],
)
def test_sample_refuses_before_it_samples(options, message, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("implicit_diffusion.commands.sample.command.progress", lambda *a: pytest.fail("sampled"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["sample", *(o.format(run=finished) for o in options)]) == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_run_resumes_to_the_same_model(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C after three of six updates, then `resume`: the exported weights agree bit for bit."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(3)])
        assert main(["finetune", *TINY, "--out", str(out)]) == 130
    assert "implicit-diffusion resume" in capsys.readouterr().err
    with monkeypatch.context() as patched:  # what the plan was made of is read back
        patched.setattr(planning, "draw", lambda *arguments: pytest.fail("the plan was made again"))
        assert main(["resume", str(out)]) == 0
    name = "model/unet/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert [json.loads(line)["updates"] for line in (out / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, 7)
    )


def test_resume_says_why_there_is_nothing_to_resume(finished, tmp_path, capsys):
    for name, files in {"plan": ["plan.json"], "early": ["config.json"], "sweep": ["beta-2/config.json"]}.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
    for path, message in {
        finished: "it is finished",
        tmp_path / "nowhere": "there is no run",
        tmp_path / "plan": "it holds a plan",
        tmp_path / "early": "does not say which command",
        tmp_path / "sweep": "is a sweep",
    }.items():
        assert main(["resume", str(path)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("during", ["plan", "judging"])
def test_ctrl_c_outside_training_says_what_can_be_done(during, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    stage = {"plan": (planning, "evaluate_pretrained"), "judging": (judging, "evaluate_all")}[during]
    monkeypatch.setattr(*stage, interrupt)
    assert main(["finetune", *TINY, "--updates", "1", "--out", str(tmp_path / "run")]) == 130
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"interrupted; continue with `implicit-diffusion resume {tmp_path / 'run'}`"
