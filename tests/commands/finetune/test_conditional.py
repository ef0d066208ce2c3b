"""From a conditional diffusers folder to another, by the command line: two updates each."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from implicit_diffusion.cli import main
from implicit_diffusion.commands.finetune import planning, training
from implicit_diffusion.commands.finetune.config import Config
from implicit_diffusion.commands.finetune.problem import setup
from implicit_diffusion.commands.finetune.specs import setup_spec
from implicit_diffusion.evaluation import evaluate
from implicit_diffusion.models.pretrained import load_pretrained
from implicit_diffusion.noise import Noise
from tests.helpers import tiny
from tests.helpers.stops import interrupt_at

TINY = ["finetune", "--num-steps", "4", "--batch", "2", "--updates", "2", "--starts", "4", "--lr", "1e-5"]
TINY += ["--kl-weight", "2.5"]
REWARDS = """
def red(images, prompts):
    assert images.shape[1:] == (3, 16, 16) and set(prompts) <= {"a cat", "red dog"}
    return 50 * images[:, 0].flatten(1).mean(1)
def bright(images):
    assert images.shape[1:] == (3, 16, 16)
    return images.flatten(1).mean(1)
def label(images, labels):
    assert images.shape[1:] == (1, 8, 8) and labels.shape == images.shape[:1]
    return images.flatten(1).mean(1) * (labels + 1)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of every kind, rewards and prompts."""
    made = tmp_path_factory.mktemp("place")
    tiny.class_conditional(made / "classes")
    tiny.stable_diffusion(made / "sd")
    tiny.stable_diffusion_3(made / "sd3")
    tiny.dit(made / "dit")
    (made / "rewards.py").write_text(REWARDS)
    (made / "prompts.txt").write_text("a cat\n\nred dog\n")
    return made


def finetuned(place, out, *options):
    words = [option.format(place=place) for option in options]
    return main([*TINY, "--out", str(out), *words])


TEXT = ("--model", "{place}/sd/model", "--prompts", "{place}/prompts.txt", "--reward", "{place}/rewards.py:red")
FLOW = ("--model", "{place}/sd3/model", *TEXT[2:])
CLASSES = ("--model", "{place}/classes", "--reward", "{place}/rewards.py:label")


@pytest.fixture(scope="module")
def text_run(place, tmp_path_factory):
    """Fine-tuned Stable Diffusion."""
    out = tmp_path_factory.mktemp("runs") / "text"
    assert finetuned(place, out, *TEXT, "--stride", "2") == 0
    return out


def test_stable_diffusion_end_to_end(place, text_run, capsys):
    from diffusers import DiffusionPipeline

    summary, config = (json.loads((text_run / f"{name}.json").read_text()) for name in ("summary", "config"))
    assert summary["updates"] == 2 and summary["path_kl"] > 0 and summary["j_bound"] is not None
    assert config["guidance"] == 7.5 and summary["condition"] == "prompts"
    assert config["scheduler"] == "ddpm" and summary["pipeline_is_the_chain"] is True
    assert (text_run / "prompts.txt").read_text() == "a cat\nred dog\n"
    card = (text_run / "model" / "README.md").read_text()
    assert "guidance_scale=7.5" in card and "text-to-image" in card and "guidance 7.5" in card
    assert "guidance_scale=7.5" in (text_run / "report.html").read_text()
    pipeline = DiffusionPipeline.from_pretrained(text_run / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a cat"] * 2, num_inference_steps=4, guidance_scale=7.5, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    grid = text_run.parent / "grid.png"
    sample = ["sample", "--model", str(text_run / "model"), "--num", "2", "--out", str(grid)]
    assert main([*sample, "--prompts", str(place / "prompts.txt")]) == 0 and grid.exists()
    assert main([*sample[:-1], str(grid.with_name("other.png"))]) == 2
    assert "needs --prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_stable_diffusion_3_on_its_memoryless_flow(place, tmp_path, capsys):
    """By default; the folder has a scheduler that runs this chain in the pipeline of diffusers."""
    from diffusers import DiffusionPipeline

    out, model = tmp_path / "run", tmp_path / "run" / "model"
    assert finetuned(place, out, *FLOW, "--stride", "4") == 0
    config, summary, chain = (
        json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary", "model/chain")
    )
    assert config["scheduler"] == "flow-memoryless" and config["guidance"] == chain["guidance"] == 7.0
    assert summary["updates"] == 2 and summary["path_kl"] > 0 and summary["pipeline_is_the_chain"] is True
    pipeline = DiffusionPipeline.from_pretrained(model, local_files_only=True)
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert pipeline.scheduler.config.use_flow_sigmas and pipeline.scheduler.config.flow_shift == 3.0
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a cat"] * 2, num_inference_steps=4, guidance_scale=7.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    capsys.readouterr()
    sample = ["sample", "--model", str(model), "--num", "3", "--prompts", str(place / "prompts.txt"), "--out"]
    assert main([*sample, str(tmp_path / "chain.png")]) == 0
    assert "of the folder's pipeline" not in capsys.readouterr().out
    # The picture is that of the trained chain under the prompts in turn, decoded.
    words = {"prompts": place / "prompts.txt", "reward": f"{place}/rewards.py:red", "num_steps": 4}
    trained = setup.build(setup_spec(Config(model=str(model), **words))).chain
    turns = trained.replace(condition=lambda noise, batch, index: {"prompt": torch.arange(batch) % 2})
    images = load_pretrained(model).decoder(turns.sample(Noise(0), 3))
    expected = ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    picture = np.asarray(Image.open(tmp_path / "chain.png"))[::4, ::4]
    for i, (top, left) in enumerate(((0, 0), (0, 16), (16, 0))):
        assert np.abs(picture[top : top + 16, left : left + 16].astype(int) - expected[i]).max() <= 3
    assert main([*sample, str(tmp_path / "other.png"), "--num-steps", "2"]) == 0
    assert "these are 2 steps of the folder's pipeline" in capsys.readouterr().out


@pytest.mark.slow
def test_a_reference_keeps_the_kl_to_the_original(place, text_run):
    """Going on from RUN/model: the KL starts at zero, or with --reference at what the first run has spent."""
    spent = json.loads((text_run / "summary.json").read_text())["path_kl"]
    words = {"prompts": place / "prompts.txt", "reward": f"{place}/rewards.py:red", "num_steps": 4}
    for reference, expected in ((None, 0.0), (str(place / "sd" / "model"), spent)):
        going_on = setup.build(setup_spec(Config(model=str(text_run / "model"), reference=reference, **words)))
        noise = Noise(0).stream(setup.AFTER)  # that of the first run's judgement, prompts included
        path_kl = evaluate(going_on.chain, going_on.reward, noise, starts=4, repeats=8).path_kl.mean()
        assert path_kl.item() == pytest.approx(expected, rel=1e-3)
        assert not any(p.requires_grad for p in going_on.chain.reference.parameters())


@pytest.mark.slow
def test_class_conditional_with_guidance(place, tmp_path):
    out = tmp_path / "run"
    assert finetuned(place, out, *CLASSES, "--null-class", "0", "--guidance", "2") == 0
    card = (out / "model" / "README.md").read_text()
    assert "class_labels=labels" in card and "torch.full_like(labels, 0)" in card
    assert load_pretrained(out / "model").num_classes == 3
    grid = tmp_path / "grid.png"
    assert main(["sample", "--model", str(out / "model"), "--num", "3", "--num-steps", "4", "--out", str(grid)]) == 0
    program = card.split("```python\n")[1].split("```")[0].replace("this folder", str(out / "model"))
    space = {}
    with torch.no_grad():
        exec(program, space)
    assert space["x"].shape == (2, 1, 8, 8) and space["x"].isfinite().all()


@pytest.mark.slow
def test_dit_with_its_null_class(place, tmp_path):
    """The published DiTPipeline has 1000 classes hard-coded, so its own drawing is left out."""
    out = tmp_path / "run"
    options = ("--model", "{place}/dit", "--reward", "{place}/rewards.py:bright", "--scheduler", "ddim")
    assert finetuned(place, out, *options) == 0
    assert json.loads((out / "config.json").read_text())["guidance"] == 4.0
    # It has no way to ask for the noise of DDIM, so its folder runs another chain, and says so.
    assert json.loads((out / "summary.json").read_text())["pipeline_is_the_chain"] is False
    assert "samples another chain" in (out / "model" / "README.md").read_text()
    grid = tmp_path / "grid.png"
    assert main(["sample", "--model", str(out / "model"), "--num", "2", "--out", str(grid)]) == 0 and grid.exists()
    assert load_pretrained(out / "model").event_shape == (4, 8, 8)


@pytest.mark.slow
def test_an_adapter_goes_on_from_a_run_and_is_saved_merged_and_by_itself(place, text_run, tmp_path, capsys):
    from safetensors.torch import load_file

    out, start = tmp_path / "run", text_run / "model"
    assert (
        finetuned(
            place,
            out,
            "--model",
            str(start),
            *TEXT[2:],
            "--lora-rank",
            "2",
            "--gradient-checkpointing",
            "--loop",
            "nested",
        )
        == 0
    )
    adapter = load_file(out / "model" / "lora" / "pytorch_lora_weights.safetensors")
    assert adapter and all(".lora" in name for name in adapter)
    state = load_file(out / "checkpoint" / "000002" / "state.safetensors")
    assert sum(v.numel() for v in state.values()) < 60_000  # of the network's own weights, none
    weights = "unet/diffusion_pytorch_model.safetensors"
    ours, before = load_file(out / "model" / weights), load_file(start / weights)
    moved = {name for name in before if not torch.equal(ours[name], before[name])}
    assert ours.keys() == before.keys() and moved and all("attn" in name for name in moved)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["path_kl"] > 0
    assert summary["reward_exported"] == pytest.approx(summary["reward_after"], abs=1e-2)
    assert "in `lora/`" in (out / "model" / "README.md").read_text()
    printed = capsys.readouterr().out
    assert f'{out / "model" / "lora"}: pipeline.load_lora_weights("lora")' in printed
    kohya = load_file(out / "model" / "lora-comfyui.safetensors")
    assert len(kohya) == 1.5 * len(adapter) and f"{out / 'model' / 'lora-comfyui.safetensors'}, for" in printed
    assert "`lora-comfyui.safetensors` holds it" in (out / "model" / "README.md").read_text()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_own_prompts(place, text_run, tmp_path, monkeypatch):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text((place / "prompts.txt").read_text())
    words = [option.format(place=place) for option in TEXT]
    words[3] = str(prompts)

    with monkeypatch.context() as patched:
        own = training.callbacks
        patched.setattr(training, "callbacks", lambda *arguments: [interrupt_at(1), *own(*arguments)])
        assert main([*TINY, "--stride", "2", "--out", str(out), *words]) == 130
    prompts.unlink()
    assert main(["resume", str(out)]) == 0
    name = "model/unet/diffusion_pytorch_model.safetensors"
    assert (out / name).read_bytes() == (text_run / name).read_bytes()


BAD = {
    "has no text encoder, it is unconditional": ("--prompts", "{place}/prompts.txt"),
    "has no text encoder, it is conditioned on class labels": (*CLASSES, "--prompts", "{place}/prompts.txt"),
    "is text-conditional: give --prompts": TEXT[:2],
    "cannot be read": (*TEXT[:2], "--prompts", "{place}/nowhere.txt"),
    "holds no prompts": (*TEXT[:2], "--prompts", "{place}/empty.txt"),
    "is unconditional, there is nothing to guide": ("--guidance", "2"),
    "--guidance needs --null-class": (*CLASSES, "--guidance", "2"),
    "--null-class must lie in 0..2": (*CLASSES, "--null-class", "3"),
    "is not conditioned on classes": ("--null-class", "1"),
    "--guidance must be finite": (*CLASSES, "--guidance", "nan"),
    "come without a condition": ("--reward", "{place}/rewards.py:label"),
    "no layer of the network is called nonsense": ("--lora-rank", "2", "--lora-targets", "nonsense"),
    "--lora-targets needs --lora-rank": ("--lora-targets", "to_q"),
    "it is of another network": (*TEXT, "--init-lora", "{place}/other"),
    "--lora-rank must be": ("--lora-rank", "0"),
    "is a flow model (FlowMatch": (*FLOW, "--scheduler", "ddpm"),
    "has noise, so a path KL leaves nothing": (*FLOW, "--scheduler", "flow-euler"),
    "its samples are (1, 8, 8), not (4, 8, 8)": (*TEXT, "--reference", "digits"),
    "its classes are None, not 3": (*CLASSES, "--reference", "digits"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_clear_line_before_any_work(message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "evaluate_pretrained", lambda *arguments, **options: pytest.fail("the plan was made"))
    (place / "empty.txt").write_text("\n \n")
    if "{place}/other" in BAD[message]:
        (place / "other").mkdir()
        layer = "unet.mid_block.attentions.9.to_q.lora_{}.weight"
        save_file({layer.format(which): torch.ones(2, 2) for which in "AB"}, place / "other" / "other.safetensors")
    assert finetuned(place, tmp_path / "run", *BAD[message]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_deterministic_chain_under_labels_is_trained_with_a_drift_penalty(place, tmp_path):
    """Its samples differ by their starts alone, so that the deviation is that between all of them."""
    words = [option.format(place=place) for option in CLASSES]
    options = ["--scheduler", "euler", "--penalty", "drift", "--kl-weight", "0.1", "--out", str(tmp_path / "run")]
    assert main([*TINY, *options, *words]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] > 0
