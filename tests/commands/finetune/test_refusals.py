"""What fine-tuning refuses, in one clear line, before any work."""

import pytest

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import planning

TINY = ["--num-steps", "4", "--batch", "2", "--updates", "6", "--starts", "8", "--lr", "1e-3", "--kl-weight", "2.5"]


REWARDS = """
import torch
def fine(x): return x.flatten(1).sum(1)
def scalar(x): return x.mean()
def other_dtype(x): return x.double().flatten(1).sum(1)
def nan(x): return (x.flatten(1).sum(1) - 1e6).log()
def detached(x): return x.detach().flatten(1).sum(1)
"""
BAD = {
    "one number per sample": ["--reward", "{file}:scalar"],
    "must return the dtype": ["--reward", "{file}:other_dtype"],
    "NaN or infinite": ["--reward", "{file}:nan"],
    "not differentiable": ["--reward", "{file}:detached", "--estimator", "adjoint"],
    "no function 'missing'": ["--reward", "{file}:missing"],
    "there is no file": ["--reward", "nowhere.py:fine"],
    "no module 'nowhere'": ["--reward", "nowhere:fine"],
    "neither brightness": ["--reward", "shiny"],
    "is not a folder": ["--model", "nowhere-at-all"],
    "--num-steps must be": ["--num-steps", "0"],
    "--num-steps must be at most the 1000 timesteps": ["--num-steps", "2000"],
    "--kl-weight must be finite": ["--kl-weight", "-1"],
    "--kl-weight must be finite and": ["--kl-weight", "nan"],
    "--lr must be": ["--lr", "0"],
    "--updates must be": ["--updates", "0"],
    "stride must lie": ["--stride", "9"],
    "no row of": ["--scheduler", "ddim", "--eta", "0"],
    "--eta must be finite and": ["--scheduler", "ddim", "--eta", "-1"],
    "--eta is the noise of --scheduler ddim; the default has": ["--eta", "0.5"],
    "--eta is the noise of --scheduler ddim; ddpm has": ["--scheduler", "ddpm", "--eta", "1"],
    "--stride is for --loop queue": ["--loop", "nested", "--stride", "2"],
    "--target-kl-mode needs a --target-kl": ["--target-kl-mode", "adapt"],
    "--penalty drift is not a KL": ["--penalty", "drift", "--plan"],
    "exists and is not empty": ["--out", "{folder}"],
    "--target-kl needs a path KL in": ["--target-kl", "0.5", "--kl-weight", "0"],
    "--target-kl needs --penalty path-kl": ["--target-kl", "0.5", "--penalty", "drift"],
    "will not fit": ["--batch", "1000000000"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line_before_any_work(message, tmp_path, capsys, monkeypatch):
    """Not a single trajectory of the plan is drawn, and no run directory is left behind."""
    monkeypatch.setattr(planning, "evaluate_pretrained", lambda *arguments, **options: pytest.fail("the plan was made"))
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    options = [o.format(file=file, folder=tmp_path) for o in BAD[message]]
    out = [] if "--out" in options else ["--out", str(tmp_path / "run")]
    assert main(["finetune", *TINY, *out, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_what_only_the_plan_can_refuse_leaves_no_run_directory(tmp_path, capsys):
    file = tmp_path / "rewards.py"
    file.write_text("def constant(x): return 0 * x.flatten(1).sum(1)")
    assert main(["finetune", *TINY, "--reward", f"{file}:constant", "--out", str(tmp_path / "run")]) == 2
    assert "needs one that varies" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_scheduler_is_refused(capsys):
    assert main(["finetune", "--scheduler", "heun"]) == 2
    assert "ddpm" in capsys.readouterr().err
