"""A sweep over β: one run each, kept and gone on with, and the frontier beside them."""

import itertools
import json
import signal

import pytest
from diffusers import DDPMScheduler

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import command as finetune
from implicit_diffusion.commands.finetune import planning, training
from implicit_diffusion.commands.shared.formatting import distinct
from implicit_diffusion.commands.sweep import command as sweep
from implicit_diffusion.commands.sweep import folders
from implicit_diffusion.commands.sweep.summary import SweepRow, SweepSummary
from implicit_diffusion.evaluation.chains import Estimate
from tests.helpers import tiny
from tests.helpers.toy_model import folder
from tests.helpers.toy_result import changed, digits_result

TINY = ["--num-steps", "3", "--batch", "2", "--updates", "4", "--starts", "8", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ["--model", folder(tmp_path_factory.mktemp("models") / "model", DDPMScheduler(clip_sample=False))]


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweeps") / "sweep"
    assert main(["sweep", *model, *TINY, "--kl-weights", "4", "2", "--out", str(out)]) == 0
    return out


def read(out):
    return json.loads((out / "summary.json").read_text())


def test_one_run_per_weight_and_one_summary(swept):
    summary = read(swept)
    assert [row["kl_weight"] for row in summary["rows"]] == [2, 4]
    for row in summary["rows"]:
        own = read(swept / row["run"])
        assert own["kl_weight"] == row["kl_weight"] and own["reward_after"] == row["reward_after"]
        assert row["path_kl"] > 0 and row["updates"] == 4 and row["captured"] is not None
    assert (swept / "figures" / "frontier.png").exists()
    assert json.loads((swept / "config.json").read_text())["num_steps"] == 3


def test_the_frontier_is_the_bound_of_the_pretrained_samples(swept):
    """Weaker weights buy more reward for more KL, and the slope between neighbours is their β (dR = β dKL)."""
    summary = read(swept)
    points = summary["frontier"]
    betas = [p["kl_weight"] for p in points]
    assert betas == sorted(betas, reverse=True) and {2.0, 4.0} <= set(betas)
    assert points[0]["reward"] > summary["reward_pretrained"]
    for strong, weak in itertools.pairwise(points[1:]):
        slope = (weak["reward"] - strong["reward"]) / (weak["path_kl"] - strong["path_kl"])
        assert weak["kl_weight"] * 0.98 < slope < strong["kl_weight"] * 1.02


def test_weights_that_are_close_have_folders_of_their_own(tmp_path):
    """Names round-trip; and a run is found by its β, whatever its folder is called."""
    from implicit_diffusion.commands.sweep.folders import finished, folder_of

    betas = [1.0, 1.0000001, 2.4567891, 1e-7, 1 / 3]

    def begin(folder, beta):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"kl_weight": beta}))
        (folder / "summary.json").write_text("{}")

    begin(tmp_path / "beta-2.45679", 2.4567891)  # renamed by hand
    for beta in betas:
        folder = folder_of(tmp_path, beta)
        if not folder.exists():
            begin(folder, beta)
    assert len(list(tmp_path.iterdir())) == len(betas)
    assert folder_of(tmp_path, 2.4567891).name == "beta-2.45679" and folder_of(tmp_path, 1.0).name == "beta-1"
    assert finished(tmp_path) == {beta: folder_of(tmp_path, beta) for beta in betas}
    assert folder_of(tmp_path, 1.0000001).name == "beta-1.0000001"
    assert distinct([1.0, 1.0000001, 2.4567891]) == ["1", "1.0000001", "2.4567891"]
    assert distinct([1.0, 2.4567891, 2.4567891]) == ["1", "2.457", "2.457"]


def test_runs_that_made_things_worse_are_named(capsys):
    good = digits_result()
    bad = changed(good, worse="J rose.", captured=None)
    rows = [SweepRow.of(result.summary, beta, "beta") for beta, result in ((2.0, good), (3.0, bad))]
    sweep.show(SweepSummary("brightness", Estimate(1.0, 0.1), rows, []))
    printed = capsys.readouterr().out
    assert printed.startswith("KL weight 3: J rose.") and "J rose │" in printed


@pytest.mark.slow
@pytest.mark.drawn
def test_finished_runs_are_kept_and_more_may_be_added(swept, model, monkeypatch, capsys):
    runs = []
    original = finetune.run

    def run(config, **options):
        runs.append(config.kl_weight)
        return original(config, **options)

    monkeypatch.setattr(finetune, "run", run)
    monkeypatch.setattr(planning, "draw", lambda *arguments: pytest.fail("drawn again"))
    capsys.readouterr()
    before = (swept / "beta-2" / "summary.json").stat().st_mtime_ns
    assert main(["sweep", *model, *TINY, "--kl-weights", "2", "8", "--out", str(swept)]) == 0
    assert runs == [8.0] and (swept / "beta-2" / "summary.json").stat().st_mtime_ns == before
    printed = capsys.readouterr().out
    assert "finished" in printed and "What the KL weight buys" not in printed
    assert [row["kl_weight"] for row in read(swept)["rows"]] == [2, 4, 8]
    assert (swept / "figures" / "frontier.png").stat().st_size > 5000
    assert main(["sweep", *model, *TINY, "--lr", "2e-3", "--kl-weights", "2", "--out", str(swept)]) == 2
    assert "lr was 0.001 and is 0.002" in capsys.readouterr().err
    assert main(["sweep", *model, *TINY, "--kl-weights", "2", "--out", str(swept / "beta-2")]) == 2
    assert "something else than a sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_a_class_conditional_model_is_swept_given_the_label(tmp_path):
    """Runs and frontier are of rewards given the start: what labels earn apart is nobody's gain."""
    tiny.class_conditional(tmp_path / "classes", **tiny.PLAIN)
    (tmp_path / "rewards.py").write_text("def label(x, labels): return x.flatten(1).mean(1) + 100.0 * labels")
    words = ["--model", str(tmp_path / "classes"), "--reward", f"{tmp_path}/rewards.py:label"]
    guided, out = ["--guidance", "2", "--null-class", "0"], tmp_path / "sweep"
    assert main(["sweep", *words, *guided, *TINY, "--kl-weights", "0.5", "--out", str(out)]) == 0
    summary = read(out)
    (row,), (point,) = summary["rows"], summary["frontier"]
    assert row["kl_weight"] == 0.5 and row["path_kl"] > 0 and row["j_bound"] is not None
    assert 100 < summary["reward_pretrained"] < point["reward"] < summary["reward_pretrained"] + 10
    assert (out / "figures" / "frontier.png").exists()


@pytest.mark.slow  # test_finetune resumes a run
def test_an_interrupted_sweep_goes_on_where_it_was(swept, model, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second run; the same command finishes it, with the weights of an uninterrupted one."""
    out = tmp_path / "sweep"
    call = ["sweep", *model, *TINY, "--kl-weights", "2", "4", "--out", str(out)]

    def interrupt(fit):
        if fit.updates == 2 and fit.loop.objective.weight(training.PathKL) == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt])
        assert main(call) == 130
    assert f"the same command, with --out {out}, continues the sweep" in capsys.readouterr().err
    assert (out / "beta-2" / "summary.json").exists() and not (out / "summary.json").exists()
    assert main(call) == 0
    name = "model/unet/diffusion_pytorch_model.safetensors"
    assert (out / "beta-4" / name).read_bytes() == (swept / "beta-4" / name).read_bytes()


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(model, tmp_path):
    out = tmp_path / "sweep"
    (out / "beta-2" / "figures").mkdir(parents=True)
    (out / "beta-2" / "config.json").write_text("{}")
    settings = folders.settings(
        sweep.Config(each=finetune.Config(model=model[1], num_steps=3, batch=2, updates=2, starts=8, lr=1e-3))
    )
    (out / "config.json").write_text(json.dumps(settings))
    assert main(["sweep", *model, *TINY, "--updates", "2", "--kl-weights", "2", "--out", str(out)]) == 0
    assert read(out)["rows"][0]["updates"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kl-weights", "0"], "--kl-weights must be positive"),
        (["--kl-weights", "2", "2"], "--kl-weights must differ"),
        (["--kl-weight", "2"], "--kl-weight is for one run; in a sweep, use --kl-weights"),
        (["--plan"], "--plan is for one run"),
        (["--penalty", "drift"], "path KLs"),
        (["--batch", "0"], "--batch"),
        (["--model", "nowhere-at-all"], "is not a folder"),
        (["--out", "{folder}"], "exists and is not empty"),
    ],
)
def test_bad_options_leave_nothing_behind(options, message, tmp_path, capsys):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "something").write_text("else")
    options = [o.format(folder=folder) for o in options]
    out = [] if "--out" in options else ["--out", str(tmp_path / "sweep")]
    assert main(["sweep", *TINY, *out, *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "sweep").exists()
