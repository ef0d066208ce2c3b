"""The scripts in examples/ run at a small size, print true numbers, are short, and use the public face alone."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script in an empty folder, as the command line does; its lines."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def numbers(line):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]


def test_an_objective_of_ones_own_agrees_with_closed_forms(run):
    lines = run("own_objective.py", "--particles", "20000")
    assert len(lines) == 2
    for line in lines:
        gamma, error, exact, z = numbers(line)
        assert abs(gamma - exact) < 4 * error < 0.05
        assert abs(z) < 4


def test_an_energy_model_beats_a_gaussian_on_held_out_points(run):
    *_, log_z, scores = run("energy_model.py", "--updates", "40")
    assert numbers(log_z)[1] < 0.2
    model, gaussian = numbers(scores)
    assert model > gaussian + 0.5


def test_messages_bring_opinions_together(run):
    spread, _ = run("opinions.py", "--agents", "100", "--updates", "120")
    before, after = numbers(spread)
    assert after < before / 2


@pytest.mark.slow
def test_a_folder_is_fine_tuned_for_more_reward(run, tmp_path):
    before, after, captured, _ = run("finetune_folder.py", "--out", "tuned")
    assert numbers(after)[0] > numbers(before)[0]
    share, error = map(int, re.findall(r"(-?\d+)%", captured))
    assert share > 4 * error
    assert (tmp_path / "tuned" / "model_index.json").exists()


def test_a_folder_is_written(run, tmp_path):
    from diffusers import DiffusionPipeline

    run("finetune_folder.py", "--steps", "3", "--updates", "3", "--starts", "4", "--out", "tuned")
    images = DiffusionPipeline.from_pretrained(tmp_path / "tuned")(num_inference_steps=3, output_type="np").images
    assert images.shape == (1, 8, 8, 1)


def test_guidance_is_learned_a_little(run):
    (before, _), (after, _) = map(numbers, run("learn_guidance.py", "--pretraining", "100", "--updates", "3"))
    assert before > 0 and after > 0


@pytest.mark.slow
def test_guidance_is_learned(run):
    """The path KL falls towards 0, and from the same noise one call draws what two draw."""
    (before, far), (after, near) = map(numbers, run("learn_guidance.py"))
    assert after < 0.25 * before and near < 0.3 * far


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_examples_are_short_and_import_the_public_face(script):
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 60
    names = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert [name for name in names if name.startswith("implicit_diffusion")] == ["implicit_diffusion"]
