"""A fine-tuning that is stopped: what it ends with, what is said first, and that it resumes as it was."""

import json
from html import escape

import pytest
import torch
from safetensors.torch import load_file

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import judging, training

SMALL = ["--num-steps", "2", "--batch", "4", "--updates", "12", "--starts", "8", "--lr", "1e-4", "--kl-weight", "2.5"]
WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


def kicked(at, by, original, seen):
    """The run's own callbacks, after one that spoils the model at an update and notes what it has been."""

    def kick(state):
        first = next(state.loop.model.parameters())
        seen[state.updates] = first.detach().clone()
        if state.updates == at:
            first.data.add_(by)

    return lambda *arguments: [kick, *original(*arguments)]


@pytest.mark.slow
def test_the_best_model_is_judged_exported_and_named(tmp_path, monkeypatch, capsys):
    """Also where the process ends between the stop and the judgement."""
    seen = {}
    monkeypatch.setattr(training, "callbacks", kicked(7, 2.0, training.callbacks, seen))
    call = ["finetune", *SMALL, "--out"]
    assert main([*call, str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(judging, "evaluate_all", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*call, str(tmp_path / "parts")]) == 130
    assert main(["resume", str(tmp_path / "parts")]) == 0
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "parts")]
    whole = summaries[0]
    assert [s | {"seconds": 0} for s in summaries] == [whole | {"seconds": 0}] * 2
    best = whole["kept"]["updates"]
    assert 1 < best < 7 and whole["updates"] == 9 and whole["worse"] is None
    assert whole["j_after"] < whole["j_before"] and f"The model is that of update {best}, the best" in whole["stopped"]
    exported = [load_file(tmp_path / run / WEIGHTS) for run in ("whole", "parts")]
    assert any(value.shape == seen[best].shape and torch.equal(value, seen[best]) for value in exported[0].values())
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())
    assert (tmp_path / "whole" / "kept" / "better" / "state.safetensors").is_file()
    first = f"Stopped after update {whole['updates']}: {whole['stopped']}."
    assert printed.index(first) < printed.index("\nreward    ")
    assert f'<p class="lead"><b>{escape(first)}</b>' in (tmp_path / "whole" / "report.html").read_text()
    assert f"\n**{first}**\n" in (tmp_path / "whole" / "model" / "README.md").read_text()
    assert "Try --lr 1e-0" in first
